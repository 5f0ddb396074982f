"""Bits are promised for equal shapes only; between batch sizes all is to rounding.

Each comparison runs under `OtherKernels`, where no sum over products has the same last
bits in two shapes. A test that asks for bits fails there on every processor.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import ROUNDINGS, OtherKernels
from torch import nn

from dpi_nbdev.adm import ADM
from dpi_nbdev.core import seeded
from dpi_nbdev.data import digits
from dpi_nbdev.diffusion import DiffusionLoss, VPDiffusion
from dpi_nbdev.dpi import DPI
from dpi_nbdev.drunet import DRUNet
from dpi_nbdev.evaluate import shares
from dpi_nbdev.features import DigitFeatures, PhotoFeatures, extract
from dpi_nbdev.flow import FlowLoss, FlowMatching
from dpi_nbdev.generate import collect_samples, generate_samples
from dpi_nbdev.likelihood import invert, log_likelihood
from dpi_nbdev.metrics import eps_mse, frechet_distance, velocity_mse
from dpi_nbdev.monotone import LinearLambda, MonotoneLambda
from dpi_nbdev.samplers import (ddim, ddpm, dpm_solver, noise_streams, random_walk,
                                start_noise)
from dpi_nbdev.solvers import sample_ode, sample_sde
from dpi_nbdev.training import TrainSettings, train

VP, FLOW, QUIET = VPDiffusion(), FlowMatching(), dict(progress=False)
NOTEBOOKS = ["24_likelihood", "35_generate"]  # the shortest that compare batches


@pytest.fixture(autouse=True)
def other_kernels():
    "All of a test runs under the mode."
    with OtherKernels():
        yield


def network(process, dtype=torch.float64):
    "A small convolutional network under DPI, no two of its sums alike."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(),
                        nn.Conv2d(8, 1, 3, padding=1))
    lam = LinearLambda(process.s_min, process.s_max)
    return DPI(net, lam, init="fresh").to(dtype).eval()


def close(a, b, tolerance):
    "Equal to rounding, and not to the bit: without a difference nothing was tested."
    difference = (a - b).abs().max().item()
    assert 0 < difference < tolerance


# ---------------------------------------------------------------- the mode has teeth

@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(20, 5), (6, 20)), (nn.Conv2d(3, 4, 3), (6, 3, 8, 8)),
    (nn.MultiheadAttention(8, 2, batch_first=True), (6, 5, 8)),
    (nn.GroupNorm(2, 4), (6, 4, 5, 5))])
def test_a_batch_and_one_by_one_differ_in_the_last_bits(layer, shape):
    attends = isinstance(layer, nn.MultiheadAttention)
    run = (lambda x: layer(x, x, x)[0]) if attends else layer
    x = torch.randn(shape, generator=seeded(0))
    whole, ones = run(x), torch.cat([run(part) for part in x.split(1)])
    assert torch.equal(whole, run(x))  # the same shapes: the same bits
    assert not torch.equal(whole, ones)  # other shapes: a test for bits would fail
    torch.testing.assert_close(whole, ones, rtol=1e-5, atol=1e-6)


def test_what_is_exact_in_any_order_stays_exact():
    counts = torch.arange(12.).view(3, 4)
    assert torch.equal(counts @ counts.T, torch.tensor([[14., 38, 62], [38, 126, 214],
                                                        [62, 214, 366]]))
    assert (counts / 64).mean() == 5.5 / 64
    draw, one_by_one = noise_streams(6, seeded(0)), seeded(0)
    x = torch.zeros(6, 1, 8, 8)
    parts = [noise_streams(n, one_by_one)(x[:n]) for n in (1, 2, 3)]
    assert torch.equal(draw(x), torch.cat(parts))  # noise has no sums


def test_two_machines_differ_for_equal_shapes():
    x = torch.randn(5, 7, dtype=torch.float64, generator=seeded(0))
    with OtherKernels(machine=1):
        there = x @ x.T
    here = x @ x.T
    assert not torch.equal(here, there)
    eps = torch.finfo(x.dtype).eps
    assert ((here / there - 1).abs() <= 4 * ROUNDINGS * eps).all()


# ---------------------------------------------------------------- samplers, likelihood

SAMPLERS = {
    "ddim": lambda *a, **kw: ddim(*a, 6, eta=1., **kw),
    "ddpm": lambda *a, **kw: ddpm(*a, 6, **kw),
    "dpm_solver": lambda *a, **kw: dpm_solver(*a, 6, **kw),
    "random_walk": lambda *a, **kw: random_walk(*a, spacing=[500, 300, 100], **kw),
    "sample_ode": lambda *a, **kw: sample_ode(*a, 6, **kw),
    "sample_sde": lambda *a, **kw: sample_sde(*a, 6, diffusion=1e-3, **kw),
    "invert": lambda *a, **kw: invert(*a, 6, **kw),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_in_batches(name):
    "A rounding is 2e-16; VP divides it by a = 0.006, and the network stretches it."
    model, x = network(VP), start_noise(5, (1, 8, 8), seeded(1)).double()
    runs = [SAMPLERS[name](model, VP, x, generator=seeded(2), batch_size=n, **QUIET)
            for n in (5, 5, 2)]
    assert torch.equal(runs[0], runs[1])
    size = runs[0].abs().max().item()
    close(runs[0] / size, runs[2] / size, 1e-10)


def test_log_likelihood_in_batches():
    "Thirty images: a sum over pixels may swallow the last bits of one."
    model = network(FLOW)
    x = digits(n_held_out=30).held_out.double()
    a, b = (log_likelihood(model, FLOW, x, 3, method="heun", generator=seeded(0),
                           batch_size=n, **QUIET) for n in (30, 7))
    close(a / a.abs().max(), b / a.abs().max(), 1e-12)


def test_a_sampling_job_in_batches_and_on_ranks(tmp_path):
    "The same noise to the last bit; the same images but for pixels between two bytes."
    model, starts = network(FLOW, torch.float32), {}

    def sample(x, streams):
        for noise, stream in zip(x, streams):
            starts.setdefault(stream.initial_seed(), []).append(noise.clone())
        return ddim(model, FLOW, x, 4, eta=1., generator=streams, **QUIET).tanh()

    def job(name, batch_size, world):
        for rank in range(world):
            generate_samples(sample, 12, (1, 8, 8), tmp_path / name,
                             batch_size=batch_size, rank=rank, world=world, **QUIET)
        return np.load(collect_samples(tmp_path / name))["arr_0"].astype(int)

    apart = np.abs(job("fives.npz", 5, 1) - job("threes.npz", 3, 2))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01
    assert len(starts) == 12 and all(torch.equal(a, b) for a, b in starts.values())


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("net", [
    lambda: DRUNet(1, 1, widths=(8, 12, 16), n_blocks=1),
    lambda: ADM(1, 1, width=32, multipliers=(1, 1), attention_at=(4,), head_channels=8,
                image_size=8)])
def test_a_dpi_network_on_a_batch_and_one_by_one(net):
    torch.manual_seed(0)
    model = DPI(net().double(), LinearLambda(0, 999), init="fresh").eval()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=seeded(0))
    s = torch.tensor([0., 250, 250, 700.5, 999])
    with torch.no_grad():
        for p in model.parameters():  # ADM begins with zeros
            p += 0.1 * torch.randn(p.shape, generator=seeded(p.numel()), dtype=p.dtype)
        whole = model(x, s)
        ones = torch.cat([model(a, b) for a, b in zip(x.split(1), s.split(1))])
        plain = torch.cat([model.freeze_at(b)(a[None]) for a, b in zip(x, s)])
    size = whole.abs().max()
    close(whole / size, ones / size, 1e-11)
    close(whole / size, plain / size, 1e-11)


# ---------------------------------------------------------------- measurements

@pytest.mark.parametrize("error, process, at", [(eps_mse, VP, [10, 500]),
                                                (velocity_mse, FLOW, [0.2, 0.7])])
def test_errors_in_batches(error, process, at):
    model, x = network(process, torch.float32), digits(n_held_out=20).held_out
    a, b = (error(model, process, x, at, [0, 1], batch_size=n, **QUIET)
            for n in (20, 7))
    close(a / b, torch.ones(1), 1e-5)


@pytest.mark.parametrize("extractor", [DigitFeatures, PhotoFeatures])
def test_features_in_batches_and_on_ranks(extractor):
    "Extractors answer in float32 or are cut to it: a rounding is 1e-7 of a feature."
    small = extractor is DigitFeatures
    shape = (50, 1, 8, 8) if small else (50, 3, 16, 16)
    x = torch.randint(256, shape, dtype=torch.uint8, generator=seeded(0))
    whole = extract(extractor(), x, batch_size=50, **QUIET).pool
    threes = extract(extractor(), x, batch_size=3, **QUIET).pool
    torch.testing.assert_close(threes, whole, rtol=1e-4, atol=1e-5)
    ranks = []
    for rank, rows in enumerate(shares(50, 8, 3)):
        with OtherKernels(machine=rank):
            part = x[rows.start:rows.stop]
            ranks.append(extract(extractor(), part, batch_size=8, **QUIET).pool)
    torch.testing.assert_close(torch.cat(ranks), whole, rtol=1e-4, atol=1e-5)
    a, b = (frechet_distance(f, whole[:40] + 1.) for f in (whole, threes))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_training_in_parts_and_on_another_machine(kind):
    """A few steps of Adam on two machines, and with a batch in one part and in four.

    Adam divides a gradient by its size, so where the gradient is nearly zero a rounding
    decides about the sign of a step: losses are compared, rather than weights.
    """
    objective = DiffusionLoss(VP) if kind == "diffusion" else FlowLoss(FLOW)
    data, ends = digits(), []
    for machine, parts in ((0, 1), (1, 1), (0, 4)):
        p = objective.process
        model = network(p, torch.float32)
        model.lam = MonotoneLambda(100, p.s_min, p.s_max)
        settings = TrainSettings(steps=8, batch_size=32, accumulate=parts)
        with OtherKernels(machine):
            ends.append(train(model, objective, data.train, settings, check_every=8,
                              held_out=data.held_out[:100], **QUIET))
    for end in ends[1:]:
        torch.testing.assert_close(end.losses, ends[0].losses, rtol=1e-4, atol=1e-5)
        measured, before = end.held_out[-1][1], ends[0].held_out[-1][1]
        assert measured == pytest.approx(before, rel=1e-4)
        assert measured != before or not torch.equal(end.losses, ends[0].losses)


# ---------------------------------------------------------------- notebooks

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_that_compares_batches(name, root):
    script = [Path(__file__).parent / "rounding.py", root / f"nbs/{name}.ipynb"]
    done = subprocess.run([sys.executable, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
