"""What a notebook cell cannot show about DPI: a real compiler, other processes, and random networks by the dozen."""
import copy
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
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
