"""Sums whose last bits depend on their shape, as those of a BLAS library may.

Intel's MKL takes another kernel for a batch of one than for a batch of three, and two
threads add up in another order than one; on other processors all of these may agree
to the last bit. Under `OtherKernels` no two shapes agree, on any processor, so what
asks for bits between two batch sizes, ranks or machines fails at once.

    python tests/rounding.py nbs/24_likelihood.ipynb ...    # notebooks, under it
"""
import os
import sys
import zlib
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
SUMS = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear",
    "convolution", "convolution_backward", "native_group_norm", "native_layer_norm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "sum", "mean", "var", "var_mean", "std", "linalg_vector_norm", "_cdist_forward",
}
ROUNDINGS = 4  # how far two ways of adding up the same numbers are apart


def few_digits(x) -> bool:
    "Multiples of 1/64, none large: sums and products of these are exact in any order."
    return bool(((64 * x == (64 * x).round()) & (x.abs() < 100)).all())


class OtherKernels(TorchDispatchMode):
    "Moves what is a sum by a few roundings; how far says the shape of the result."

    def __init__(self, machine: int = 0):  # two machines differ for equal shapes too
        super().__init__()
        self.machine = machine
        self.factors = {}

    def factor(self, out):
        "Numbers within ROUNDINGS of 1, the same whenever the shape is."
        key = (*out.shape, out.dtype)
        if key not in self.factors:
            seed = zlib.crc32(repr((self.machine, key)).encode())
            g = torch.Generator().manual_seed(seed)
            u = 2 * torch.rand(out.shape, generator=g, dtype=torch.float64) - 1
            off = ROUNDINGS * torch.finfo(out.dtype).eps * u
            self.factors[key] = (1 + off).to(out.dtype)
        return self.factors[key]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket.__name__ not in SUMS or "out" in kwargs:
            return out
        given = [v for v in args if plain(v)]
        if not given or all(map(few_digits, given)):
            return out
        move = lambda v: v * self.factor(v) if plain(v) else v
        return tuple(map(move, out)) if isinstance(out, tuple) else move(out)


def plain(v) -> bool:
    "Floating-point numbers in the processor's memory."
    return type(v) is torch.Tensor and v.is_floating_point() and v.device.type == "cpu"


def run_notebook(path: Path, machine: int = 0) -> bool:
    "Runs a notebook's cells as `nbdev_test` does, prints what failed; is all well?"
    from nbdev.test import test_nb
    with OtherKernels(machine):
        ok, seconds = test_nb(path.resolve(), ["notest", "slow", "cuda"], basepath=ROOT)
    print(f"{'ok    ' if ok else 'FAILED'} {seconds:5.1f} s  {path}", flush=True)
    return ok


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(not all([run_notebook(Path(path)) for path in sys.argv[1:]]))
