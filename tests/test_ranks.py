"""Two CPU ranks under torchrun and gloo learn what one rank learns, to rounding.

They see the same images. Half a batch is another shape, though, and the halves' mean
another sum, so a gradient differs in its last bits, and Adam divides it by its size.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = '''
import os, signal, sys
from dataclasses import replace
import torch
from torch import nn
from dpi_nbdev.conditioning import LabelMap
from dpi_nbdev.core import each
from dpi_nbdev.couplings import Coupled, Transport
from dpi_nbdev.data import Unpaired, digits
from dpi_nbdev.diffusion import DiffusionLoss, VPDiffusion
from dpi_nbdev.dpi import DPI
from dpi_nbdev.flow import FlowLoss, FlowMatching, TwoSidedInterpolant
from dpi_nbdev.guidance import DropLabels
from dpi_nbdev.monotone import MonotoneLambda
from dpi_nbdev.training import TrainingStopped, TrainSettings, Run, train

torch.set_num_threads(1)
out, rank = sys.argv[1], int(os.environ.get("RANK", 0))
data = digits()

def model(objective):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
    process = getattr(objective, "objective", objective).process
    if isinstance(objective, DropLabels):
        net[0] = nn.Conv2d(12, 8, 3, padding=1)
        net = LabelMap(net, 10)
    lam = MonotoneLambda(1000, process.s_min, process.s_max)
    return DPI(net, lam, init="fresh")

few = TrainSettings(steps=12, batch_size=32, phi_lr=0.1)
two = int(os.environ.get("WORLD_SIZE", 1))
cases = dict(plain=(DiffusionLoss(VPDiffusion()), few),
             groups=(DiffusionLoss(VPDiffusion(), groups=8), replace(few, accumulate=8 // two)),
             labels=(DropLabels(DiffusionLoss(VPDiffusion()), null=10, share=0.3),
                     replace(few, accumulate=2, flip=True)),
             flow=(FlowLoss(FlowMatching(), antithetic=True), replace(few, flip=True)),
             pairs=(Coupled(FlowLoss(TwoSidedInterpolant()), Transport()),
                    replace(few, accumulate=4 // two)))
if "cases" in sys.argv:
    for name, (objective, settings) in cases.items():
        net, seen = model(objective), []
        parts = data.labelled() if name == "labels" else data
        real = Run.batch
        Run.batch = lambda self: (x := real(self), seen.append(each(torch.clone, x)))[0]
        if name == "pairs": parts = [(Unpaired(x[:100]), x) for x in (data.train, data.held_out)]
        else: parts = parts.train, parts.held_out
        end = train(net, objective, parts[0], settings, held_out=parts[1], check_every=6, progress=False)
        Run.batch = real
        torch.save(dict(losses=end.losses, held_out=end.held_out, seen=seen, network=dict(net.state_dict()), average=dict(end.model.state_dict())), f"{out}/{name}-{rank}of{two}.pt")
if "resume" in sys.argv:
    objective, settings = cases["plain"]
    class Nan(nn.Module):
        def __init__(self): super().__init__(); self.net, self.calls = model(objective), 0
        def forward(self, x, s): self.calls += 1; return self.net(x, s) * (float("nan") if rank == 1 and self.calls == 10 else 1)
    try: train(Nan(), objective, data.train, settings, f"{out}/nan", save_every=4, progress=False)
    except FloatingPointError as e: open(f"{out}/nan-{rank}.txt", "w").write(str(e))
    tell = lambda step, average: os.kill(int(open(f"{out}/pid-1").read()), signal.SIGTERM) if step == 5 else None
    open(f"{out}/pid-{rank}", "w").write(str(os.getpid()))
    try: train(model(objective), objective, data.train, settings, f"{out}/stopped", watch=[tell], progress=False)
    except TrainingStopped as e: open(f"{out}/stopped-{rank}.txt", "w").write(str(e)); sys.exit(e.exit_code)
'''
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).resolve().parent.parent))


def launch(out, ranks, *args):
    script = out / "script.py"
    script.write_text(SCRIPT)
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([sys.executable, *torchrun, str(script), str(out), *args], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, 1, "cases")
    launch(folder, 2, "cases", "resume")
    return folder


@pytest.mark.parametrize("case", ["plain", "groups", "labels", "flow", "pairs"])
def test_two_ranks_are_one(out, case):
    one, first, second = (torch.load(out / f"{case}-{name}.pt", weights_only=True) for name in ("0of1", "0of2", "1of2"))
    parts = lambda x: x if isinstance(x, tuple) else (x,)
    for steps in zip(one["seen"], first["seen"], second["seen"]):
        for whole, a, b in zip(*map(parts, steps)):
            if case == "pairs":  # they are made from the whole batch, on each rank
                assert torch.equal(whole, a) and torch.equal(whole, b)
            else:
                assert torch.equal(whole, torch.cat([a, b]))  # the same, in this order
    for part in ("network", "average"):
        for k in first[part]:  # in sync: both take the one gradient that was reduced
            assert torch.equal(first[part][k], second[part][k])
        for k, v in one[part].items():
            torch.testing.assert_close(first[part][k], v, rtol=1e-3, atol=2e-5)
    assert torch.equal(first["losses"], second["losses"])
    torch.testing.assert_close(first["losses"], one["losses"], rtol=1e-5, atol=1e-6)
    assert first["held_out"] == second["held_out"]
    torch.testing.assert_close(torch.tensor(first["held_out"]), torch.tensor(one["held_out"]), rtol=1e-5, atol=1e-6)
    assert one["network"]["lam.phi"].abs().max() > 0  # and φ did learn


def test_a_nan_on_one_rank_stops_both(out):
    said = [(out / f"nan-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(s.startswith("the loss became nan at step 10 of 12") for s in said)
    assert "step-000000008" in said[0]


def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(out):
    said = [(out / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    step = int(said[0].split("at step ")[1].split()[0])
    assert step == int(said[1].split("at step ")[1].split()[0]) and 5 <= step <= 7
    lines = """
import sys
sys.argv = ["", sys.argv[1]]
exec(open(sys.argv[1] + "/script.py").read())
objective, settings = cases["plain"]
end = train(model(objective), objective, data.train, settings, f"{out}/stopped", progress=False)
torch.save(end.losses, f"{out}/continued.pt")
"""
    done = subprocess.run([sys.executable, "-c", lines, str(out)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    one = torch.load(out / "plain-0of1.pt", weights_only=True)
    torch.testing.assert_close(torch.load(out / "continued.pt", weights_only=True), one["losses"], rtol=1e-5, atol=1e-6)
