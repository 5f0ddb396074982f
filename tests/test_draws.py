"""Importance sampling: unbiased, calmer, in checkpoints, and the same on every rank."""
import inspect
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dpi_nbdev import training
from dpi_nbdev.cli import dpi_train
from dpi_nbdev.core import seeded
from dpi_nbdev.data import digits
from dpi_nbdev.diffusion import DiffusionLoss, VPDiffusion
from dpi_nbdev.draws import DRAWS, ImportanceDraws, draw_unit
from dpi_nbdev.flow import FlowLoss, FlowMatching
from dpi_nbdev.training import Run, TrainSettings, train

SETTINGS = TrainSettings(steps=60, batch_size=16)


def steep(u, g):
    "Losses exp(-8u) z², with mean square 3 exp(-16u)."
    return (-8 * u).exp() * torch.randn(len(u), generator=g, dtype=torch.float64)**2


def taught(batches=100, n=64, groups=None):
    draws, g = ImportanceDraws(), seeded(0)
    for _ in range(batches):
        u, weight = draws.draw(n, g, groups)
        draws.learn(weight * steep(u, g))
    return draws


@pytest.mark.parametrize("groups", [None, 16, 1])
def test_weights_keep_every_expectation(groups):
    draws, g = taught(), seeded(1)
    assert draws.density().max() > 4  # far from uniform
    late = lambda u: u > 0.9
    for f, exact in ((torch.ones_like, 1.), (torch.square, 1 / 3), (late, 0.1)):
        means = []
        for _ in range(3000):
            u, weight = draws.draw(64, g, groups)
            means.append((weight * f(u).double()).mean())
        means = torch.stack(means)
        error = means.std() / 3000**0.5
        assert abs(means.mean() - exact) < 4 * error
        assert error < 0.05


def test_groups_share_a_scalar_and_a_weight():
    draws = taught()
    for groups in (1, 4, 64):
        for v in draws.draw(64, seeded(5), groups):
            blocks = v.view(groups, -1)
            assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
        assert len(draws.draw(64, seeded(5), groups)[0].unique()) == groups


def test_the_variance_is_nearly_the_best_possible():
    # With the best density each loss counts z² ∫exp(-8u)du, z²/8: 2/64 a sample.
    # Stratified draws have ∫2 exp(-16u)du = 1/8.
    draws, g = taught(300), seeded(2)
    plain, weighted = [], []
    for _ in range(3000):
        plain.append(steep(draw_unit(64, g), g).mean())
        u, weight = draws.draw(64, g)
        weighted.append((weight * steep(u, g)).mean())
    plain, weighted = (64 * torch.stack(v).var().item() for v in (plain, weighted))
    assert plain == pytest.approx(1 / 8, rel=0.1)
    assert 1 / 32 * 0.9 < weighted < 1 / 32 * 1.3


def test_density_is_known_from_few_groups_too():
    place = (torch.arange(40) + 0.5) / 40
    best = 0.05 + 0.95 * (-8 * place).exp() / (-8 * place).exp().mean()
    assert (taught(3000, groups=4).density() / best)[:10].log().abs().max() < 0.7


def test_a_bin_counts_samples_and_forgets_slowly():
    draws = ImportanceDraws(bins=1, rate=0.1)
    seen = []
    for k in range(50):
        draws.draw(2, seeded(k))
        draws.learn(torch.full((2,), float(k < 20)))
        seen.append(draws.state_dict()["square"].item())
    assert draws.state_dict()["count"].item() == 100
    assert seen[:20] == [1.] * 20
    for k in range(20, 50):  # 2 of 42 samples are less than a tenth: the rate decides
        assert seen[k] == pytest.approx(0.9**(k - 19), rel=1e-12)


def test_the_first_losses_weigh_alike():
    draws = ImportanceDraws(bins=1)
    for k in range(5):
        draws.draw(2, seeded(k))
        draws.learn(torch.full((2,), float(k)))
    assert draws.state_dict()["square"].item() == pytest.approx(30 / 5)


def test_a_loss_that_is_not_finite_teaches_nothing():
    draws = taught()
    before = {k: v.clone() for k, v in draws.state_dict().items()}
    u, weight = draws.draw(64, seeded(3))
    values = weight * steep(u, seeded(4))
    values[:60] = float("nan")
    values[60:62] = float("inf")
    draws.learn(values)
    after = draws.state_dict()
    assert (after["count"] - before["count"]).sum() == 2
    assert draws.density().isfinite().all()


# -- objectives ------------------------------------------------------------------------

def objectives(**kw):
    return [DiffusionLoss(VPDiffusion(), **kw), FlowLoss(FlowMatching(), **kw)]


@pytest.mark.parametrize("which", [0, 1])
def test_the_loss_is_the_mean_over_the_schedule(which):
    x = digits().train[:32]
    learned, plain = (objectives(draw=d)[which] for d in ("importance", "stratified"))
    model = lambda x, s: 0.3 * x
    for k in range(100):
        learned.memory.learn(learned(model, x, seeded(k))[1])
    losses = [torch.stack([loss(model, x, seeded(1000 + k))[0] for k in range(300)])
              for loss in (learned, plain)]
    error = sum(v.var() / 300 for v in losses)**0.5
    assert learned.memory.density().std() > 0.1
    assert abs(losses[0].mean() - losses[1].mean()) < 4 * error


@pytest.mark.parametrize("which", [0, 1])
def test_given_scalars_count_the_same_and_teach_nothing(which):
    x = digits().train[:32]
    learned, plain = (objectives(draw=d)[which] for d in ("importance", "stratified"))
    model = lambda x, s: 0.3 * x
    for k in range(60):
        learned.memory.learn(learned(model, x, seeded(k))[1])
    before, last = learned.memory.density(), learned.memory._last
    s = learned.process.from_unit(draw_unit(32, seeded(0)))
    values = [loss(model, x, seeded(1), s)[1] for loss in (learned, plain)]
    assert torch.equal(*values)
    assert torch.equal(learned.memory.density(), before)
    assert learned.memory._last is last


def test_every_way_of_drawing_is_an_objectives_and_an_experiments():
    from dpi_nbdev.experiments import Experiment
    x = digits().train[:8]
    for how in DRAWS:
        named = Experiment(draw=how).make_objective()
        for objective in (*objectives(draw=how, groups=4), named):
            loss, values = objective(lambda x, s: 0 * x, x, seeded(0))
            assert loss > 0 and torch.equal(loss, values.mean())
            assert (objective.memory is not None) == (how == "importance")


def test_an_object_that_draws_needs_no_memory():
    class Half:
        def draw(self, n, generator, groups):
            u = torch.full((n,), 0.5, dtype=torch.float64)
            return u, torch.full((n,), 2.)
    loss, plain = (DiffusionLoss(VPDiffusion(), draw=d) for d in (Half(), "uniform"))
    x = digits().train[:8]
    model = lambda x, s: 0 * x
    same = torch.full((8,), 500)
    assert loss.memory is None
    s = []
    values = loss(lambda x, t: s.append(t) or 0 * x, x, seeded(0))[1]
    assert torch.equal(s[0], same)
    torch.testing.assert_close(values, 2 * plain(model, x, seeded(0), same)[1])


# -- training -------------------------------------------------------------------------

def small():
    torch.manual_seed(0)
    from dpi_nbdev.dpi import DPI
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(8, 1, 3, padding=1))
    return DPI(net, init="fresh")


def learning(**kw):
    return DiffusionLoss(VPDiffusion(), draw="importance", **kw)


def begun(objective, settings=SETTINGS, **kw):
    data = digits()
    return train(small(), objective, data.train, settings, held_out=data.held_out,
                 check_every=20, progress=False, **kw)


def memory(trained):
    return trained.objective.memory.state_dict()


def test_a_killed_run_ends_at_the_same_bits(tmp_path):
    straight = begun(learning())
    assert straight.objective.memory.density().std() > 0.1  # it had learned
    here = str(Path(__file__).resolve())
    lines = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(here).parent)!r})
import torch
torch.set_num_threads(1)
from test_draws import begun, learning
kill = lambda step, model: os.kill(os.getpid(), signal.SIGKILL) if step == 53 else None
begun(learning(), out={str(tmp_path)!r}, save_every=7, watch=[kill])
"""
    killed = subprocess.run([sys.executable, "-c", lines], env=ENV, timeout=120,
                            capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    resumed = begun(learning(), out=tmp_path)
    assert torch.equal(resumed.losses, straight.losses)
    assert resumed.held_out == straight.held_out
    for k, v in memory(straight).items():
        assert torch.equal(memory(resumed)[k], v)
    for a, b in zip(resumed.model.parameters(), straight.model.parameters()):
        assert torch.equal(a, b)


def test_the_same_call_gives_the_same_bits_twice():
    objective = learning()
    first, again = begun(objective), begun(objective)
    assert torch.equal(first.losses, again.losses)
    assert not objective.memory.state_dict()["count"].any()


def test_every_sample_is_learned_once_in_one_part_or_several():
    one, parts = begun(learning()), begun(learning(), replace(SETTINGS, accumulate=4))
    assert memory(one)["count"].sum() == 60 * 16  # and no held-out image
    for k, v in memory(one).items():
        torch.testing.assert_close(memory(parts)[k], v, rtol=1e-3, atol=1e-5)


def test_a_run_does_not_go_on_without_its_memory():
    data = digits().train
    run = Run(small(), learning(), data, SETTINGS)
    state = run.state()
    assert run.faults(state) == []
    assert "only" in run.faults(state | dict(memory=None))[0]
    old = {k: v for k, v in state.items() if k != "memory"}  # of a run without one
    plain = Run(small(), DiffusionLoss(VPDiffusion()), data, SETTINGS)
    assert plain.faults(old | dict(about=plain.about())) == []
    assert "ImportanceDraws" in plain.faults(state)[0]


class Counts:
    "An objective by the documented contract, with a memory of its own."
    def __init__(self):
        self.memory = self
        self._seen = 0

    def __call__(self, model, x, generator):
        s = VPDiffusion().from_unit(draw_unit(len(x), generator))
        values = (model(x, s) - x).square().flatten(1).mean(1)
        return values.mean(), values

    def learn(self, values):
        assert values.shape == (16,) and not values.requires_grad and (values > 0).all()
        self._seen += 1

    def state_dict(self):
        return dict(seen=self._seen)

    def load_state_dict(self, state):
        self._seen = state["seen"]

    def __repr__(self):
        return "Counts()"


def test_any_objective_may_learn(tmp_path):
    few = replace(SETTINGS, steps=6, accumulate=2, schedule="constant", warmup=0.)
    assert begun(Counts(), few, out=tmp_path).objective._seen == 6
    assert begun(Counts(), replace(few, steps=9), out=tmp_path).objective._seen == 9


def test_the_gains_rate_is_handed_on_where_it_is_given(monkeypatch):
    asked = []
    real = training.param_groups
    spy = lambda *args: asked.append(args[-1]) or real(*args)
    monkeypatch.setattr(training, "param_groups", spy)
    for rate in (None, 0.5):
        Run(small(), learning(), digits().train, replace(SETTINGS, gains_lr=rate))
    assert asked == [None, 0.5]
    for bad in (-1., 11., float("nan"), "1e-3", [1.]):
        with pytest.raises(ValueError, match="gains_lr must be"):
            TrainSettings(gains_lr=bad)


def test_every_setting_is_an_option_of_the_command():
    options = inspect.signature(dpi_train).parameters
    assert not {f.name for f in fields(TrainSettings)} - options.keys()


# -- ranks ----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
SCRIPT = '''
import os, sys
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
import torch
torch.set_num_threads(1)
from test_draws import SETTINGS, begun, learning, memory
rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
for name, accumulate in (("whole", 1), ("parts", 2)):
    end = begun(learning(groups=8), replace(SETTINGS, accumulate=accumulate))
    state = dict(losses=end.losses, **memory(end))
    torch.save(state, f"{sys.argv[1]}/{name}-{rank}of{world}.pt")
'''


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how in ([], torchrun):
        line = [sys.executable, *how, str(script), str(folder), str(ROOT / "tests")]
        done = subprocess.run(line, env=ENV, capture_output=True, text=True,
                              timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", ["whole", "parts"])
def test_two_ranks_learn_what_one_learns(out, case):
    names = ("0of1", "0of2", "1of2")
    load = lambda name: torch.load(out / f"{case}-{name}.pt", weights_only=True)
    one, first, second = map(load, names)
    assert one["count"].sum() == 60 * 16
    for k in ("square", "count"):
        assert torch.equal(first[k], second[k])
        torch.testing.assert_close(first[k], one[k], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first["losses"], one["losses"], rtol=1e-3, atol=1e-4)
