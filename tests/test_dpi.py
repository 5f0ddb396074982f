"""What a notebook cell cannot show about DPI: a real compiler, other processes, and random networks by the dozen."""
import copy
import pickle
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from dpi_nbdev import DPI, LinearLambda, MonotoneLambda, check_exact


def moved(net, dtype=torch.float64, **kwargs):
    "A DPI model on [0, 1] whose two sets differ."
    torch.manual_seed(1)
    model = DPI(net.to(dtype), LinearLambda(0, 1), **kwargs).eval()
    with torch.no_grad():
        for p in model.theta1.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def random_net(rng, depth=4):
    "A random stack of layers on images (B, 4, 8, 8), with residual branches."
    def layer():
        return rng.choice([
            lambda: nn.Conv2d(4, 4, 3, padding=1, groups=rng.choice([1, 2]), bias=rng.random() < 0.5),
            lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
            lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm2d(4), lambda: nn.InstanceNorm2d(4, affine=True),
            lambda: nn.PReLU(4), lambda: nn.SiLU(), lambda: nn.LayerNorm(8), lambda: nn.Linear(8, 8),
        ])()
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gain = nn.Sequential(layer(), layer()), nn.Parameter(torch.rand(4, 1, 1))
        def forward(self, x):
            return x + self.gain * self.body(x)
    return nn.Sequential(nn.Conv2d(4, 4, 1), *[Residual() if rng.random() < 0.5 else layer() for _ in range(depth)])


@pytest.mark.parametrize("seed", range(25))
def test_random_networks_agree_with_the_plain_reference(seed):
    torch.manual_seed(seed)
    model = moved(random_net(random.Random(seed)))
    x, s = torch.randn(5, 4, 8, 8, dtype=torch.float64), torch.rand(5)
    assert check_exact(model, x, s) < 1e-10
    model.granularity = "unique"
    assert check_exact(model, x, s) < 1e-10


@pytest.mark.parametrize("seed", range(8))
def test_gradients_do_not_depend_on_how_it_runs(seed):
    torch.manual_seed(seed)
    x, s = torch.randn(4, 4, 8, 8, dtype=torch.float64), torch.rand(4)
    net, grads = random_net(random.Random(seed)), []
    for granularity in ("per_sample", "unique"):
        model = moved(copy.deepcopy(net), granularity=granularity)
        model.lam = MonotoneLambda(11, 0, 1).double()
        model(x, s).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_positional_tensor_is_cut_and_a_keyword_is_shared():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)
        def forward(self, x, y, scale=None):
            return {"sum": self.a(x) + self.b(y) * scale, "name": "a string"}
    model, x, y = moved(TwoInputs()), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    s, scale = torch.rand(4), torch.tensor([1., 2., 3.]).double()
    together = model(x, s, y, scale=scale)
    assert together["name"] == "a string"
    for i in range(4):
        alone = model.freeze_at(s[i])(x[i:i + 1], y[i:i + 1], scale=scale)["sum"]
        torch.testing.assert_close(together["sum"][i:i + 1], alone)
    with pytest.raises(ValueError, match="pass what all samples share by keyword"):
        model(x, s, y[:2], scale=scale)


def test_a_buffer_that_changes_is_not_changed_once_for_each_group():
    model = moved(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))), granularity="unique").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(ValueError, match="updates its buffer"):
        model(torch.randn(2, 3).double(), torch.tensor([0.1, 0.9]))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model(torch.randn(2, 3).double(), 0.5)  # one scalar for the batch is fine


def test_a_buffer_that_is_replaced_or_changes_in_eval_mode_is_noticed():
    class Counts(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.fc, self.in_place = nn.Linear(3, 3), in_place
            self.register_buffer("calls", torch.zeros(()))
        def forward(self, x):
            if self.in_place: self.calls += 1
            else: self.calls = self.calls + 1
            return self.fc(x)
    x = torch.randn(2, 3).double()
    for in_place in (True, False):
        for training in (True, False):
            model = moved(Counts(in_place), granularity="unique").train(training)
            with pytest.raises(ValueError, match="updates its buffer 'calls'"):
                model(x, torch.tensor([0.1, 0.9]))
            assert model.net.calls == 0
            model(x, 0.5)
            assert model.net.calls == 1


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
    def forward(self, x): return self.again(torch.tanh(self.first(torch.relu(self.again(x)))))


class TiedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.embed, self.body, self.head = nn.Embedding(11, 8, padding_idx=0), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 11)
        self.head.weight = self.embed.weight
    def forward(self, i): return self.head(self.body(self.embed(i)))


class Einsum(nn.Module):
    def __init__(self): super().__init__(); self.w, self.v = nn.Parameter(torch.randn(8, 4, 2)), nn.Parameter(torch.randn(4, 2))
    def forward(self, x): return torch.einsum("bnd,dhk,hk->bnh", x, self.w, self.v)


class Spectrum(nn.Module):
    def __init__(self): super().__init__(); self.filter, self.fc = nn.Parameter(torch.randn(5, dtype=torch.cfloat)), nn.Linear(8, 4)
    def forward(self, x): return self.fc(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8))


class PartlyFrozen(nn.Module):
    "A layer that does not learn, an integer parameter and an integer buffer."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.order = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8), nn.Parameter(torch.tensor([3, 1, 0]), requires_grad=False)
        self.register_buffer("times", torch.tensor(2))
    def forward(self, x): return self.b(self.a(x))[..., self.order] * self.times


class Lists(nn.Module):
    def __init__(self): super().__init__(); self.gains, self.more = nn.ParameterList(torch.randn(8) for _ in range(3)), nn.ParameterDict({"a": torch.randn(8)})
    def forward(self, x):
        for g in self.gains: x = torch.tanh(x * g)
        return x + self.more["a"]


class Rolled(nn.Module):
    def __init__(self): super().__init__(); self.cell = nn.GRUCell(8, 8)
    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]): h = self.cell(x[:, t], h)
        return h


class Pair(nn.Module):
    def __init__(self): super().__init__(); self.form = nn.Bilinear(8, 8, 3)
    def forward(self, x): return self.form(x, x.tanh())


@pytest.mark.filterwarnings("ignore:this network cannot run all samples at once", "ignore:There is a performance drop")
@pytest.mark.parametrize("kind", [TwoNames, TiedEncoder, Einsum, Spectrum, PartlyFrozen, Lists, Rolled, Pair])
def test_odd_networks_agree_with_functional_call(kind):
    x = torch.randint(11, (6, 5)) if kind is TiedEncoder else torch.randn(6, 5, 8)
    s = torch.tensor([0.5, 0., 0.1, 1., 0.9, 0.3])
    torch.manual_seed(0)
    net = kind()
    for granularity in ("auto", "unique"):
        model = DPI(copy.deepcopy(net), LinearLambda(0, 1), granularity=granularity).eval()
        with torch.no_grad():
            for p in model.theta1.parameters(): p += 0.3 * torch.randn_like(p)
        theta0, theta1 = ({n: p.detach().clone() for n, p in d.items()} for d in model.theta())
        mixed = [{n: (1 - v) * p + v * theta1[n] for n, p in theta0.items()} for v in s]
        want = [torch.func.functional_call(copy.deepcopy(net).eval(), m, (x[i:i + 1],)) for i, m in enumerate(mixed)]
        for _ in range(2):  # the second call finds the parameters as the first one did
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(model(x, s), torch.cat(want), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(model(x[2:3], s[2]), want[2], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(p, theta0[n]) and isinstance(p, nn.Parameter) for n, p in model.theta()[0].items())


def test_outputs_that_cannot_be_put_together_are_refused():
    class Net(nn.Module):
        def __init__(self, out): super().__init__(); self.fc, self.out = nn.Linear(3, 3), out
        def forward(self, x): return self.out(self.fc(x))
    class Box:
        def __init__(self, y): self.y = y
    x, s = torch.randn(3, 3).double(), torch.tensor([0.1, 0.5, 0.9])
    for granularity in ("auto", "unique"):
        run = lambda out: moved(Net(out), granularity=granularity)(x, s)
        with pytest.raises(ValueError, match="not of Box"): run(Box)
        with warnings.catch_warnings(), pytest.raises(ValueError, match="plain values"):
            warnings.simplefilter("ignore")
            run(lambda y: (y, y.sum().item()))
        y = run(lambda y: {"y": y, "none": None, "n": 3})
        assert y["none"] is None and y["n"] == 3 and y["y"].shape == (3, 3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_calls_no_layer_is_refused(reentrant):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a, self.gain = nn.Linear(3, 3), nn.Parameter(torch.rand(3))
        def forward(self, x): return torch.utils.checkpoint.checkpoint(lambda h: torch.tanh(h * self.gain), self.a(x), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpointing"):
        moved(Net())(torch.randn(2, 3).double(), 0.5)


def test_saved_tensor_hooks_around_the_model_are_the_callers_business():
    model, x = moved(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), torch.randn(2, 3).double()
    with torch.autograd.graph.save_on_cpu(): model(x, 0.5).sum().backward()
    assert model.net[0].weight.grad.abs().sum() > 0


def test_dropout_draws_a_mask_for_each_sample():
    model = moved(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))).train()
    y = model(torch.ones(2, 64).double(), torch.tensor([0.2, 0.8]))
    assert ((y[0] == 0) != (y[1] == 0)).any() and 10 < (y[0] == 0).sum() < 54


def test_a_frozen_network_can_be_pickled_and_exported():
    model = moved(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), torch.float32)
    x = torch.randn(2, 4, 8, 8)
    model(x, 0.5)  # arms the guards that must not be on the frozen copy
    plain = model.freeze_at(0.5)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), plain(x))
    exported = torch.export.export(plain, (x,))
    torch.testing.assert_close(exported.module()(x), plain(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, 0.5), model(x, 0.5))


def test_an_optimizer_step_moves_both_sets_and_phi():
    torch.manual_seed(0)
    model = DPI(nn.Linear(3, 3), MonotoneLambda(10, 0, 1), init="fresh")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1, phi_lr=0.1))
    model(torch.randn(8, 3), torch.rand(8)).square().sum().backward()
    optimizer.step()
    assert all((p != before[n]).any() for n, p in model.named_parameters())
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [("theta", 0.05), ("phi", 0.)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_compiled_with_the_default_backend():
    model = moved(nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)), torch.float32)
    x, compiled = torch.randn(3, 4, 8, 8), torch.compile(model)
    torch.testing.assert_close(compiled(x, 0.3), model(x, 0.3), rtol=1e-4, atol=1e-5)
    compiled(x, 0.3).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, 0.3).sum().backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


def test_importing_does_not_load_the_compiler():
    code = "import sys, dpi_nbdev; dpi_nbdev.DPI; print('torch._dynamo' in sys.modules, 'sklearn' in sys.modules, 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 3
