"""What a notebook cell cannot show about DPI: random networks by the dozen, a real
compiler, other processes, memory that runs out, and that nothing is changed."""
import copy
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import types
import warnings

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dpi_nbdev import DPI, LinearLambda, MonotoneLambda, check_exact
from dpi_nbdev import dpi as engine
from dpi_nbdev import ways

quiet = pytest.mark.filterwarnings("ignore:There is a performance drop")


def moved(net, dtype=torch.float64, **kwargs):
    "A DPI model on [0, 1] whose two sets differ."
    torch.manual_seed(1)
    model = DPI(net.to(dtype), LinearLambda(0, 1), **kwargs).eval()
    with torch.no_grad():
        for p in model.theta1.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def rand(*shape): return torch.randn(shape, dtype=torch.float64)


class Small(nn.Module):
    "A layer and a gain; `f` is its forward function."
    def __init__(self, f=None):
        super().__init__()
        self.fc, self.gain = nn.Linear(3, 3), nn.Parameter(torch.rand(3) + 0.5)
        self.f = f or Small.body

    def body(self, x): return torch.tanh(self.fc(x)) * self.gain
    def forward(self, x, *args, **kwargs): return self.f(self, x, *args, **kwargs)


def agrees(make, s, x, tolerance=1e-9, training=True, call=None, **kwargs):
    "Compares two calls of DPI, outputs and gradients, with plain networks made anew."
    def born():
        torch.manual_seed(0)
        return make().double().train(training)
    model = moved(born(), **kwargs).train(training)
    call = call or (lambda f, x, rows: f(x))
    many = s.reshape(-1)
    for scalars in (many, many.flip(0) * 0.9):
        got = plain.by_dpi(model, scalars if s.ndim else scalars[0], call, x)
        nets = [born() for _ in scalars]
        want = plain.by_hand(nets, plain.two_sets(model), scalars, call, x)
        assert plain.largest(got, want) < tolerance
    return model


S = torch.tensor([0.1, 0.5, 0.9])


# ---- random networks

def random_layer(rng):
    return rng.choice([
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=rng.choice([1, 2]),
                          bias=rng.random() < 0.5),
        lambda: nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
        lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
        lambda: nn.GroupNorm(2, 4), lambda: nn.BatchNorm2d(4),
        lambda: nn.InstanceNorm2d(4, affine=True), lambda: nn.PReLU(4),
        lambda: nn.SiLU(), lambda: nn.LayerNorm(8), lambda: nn.LayerNorm((8, 8)),
        lambda: nn.RMSNorm(8), lambda: nn.Linear(8, 8)])()


class Residual(nn.Module):
    def __init__(self, rng):
        super().__init__()
        self.body = nn.Sequential(random_layer(rng), random_layer(rng))
        self.gain = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x): return x + self.gain * self.body(x)


def random_net(seed, depth=4):
    "A random stack of layers on images (B, 4, 8, 8); odd ones have residual branches."
    rng = random.Random(seed)
    branch = lambda: seed % 2 and rng.random() < 0.5
    layers = [Residual(rng) if branch() else random_layer(rng) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(4, 4, 1), *layers)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_agree_with_the_plain_reference(seed):
    torch.manual_seed(seed)
    net, x, s = random_net(seed), rand(5, 4, 8, 8), torch.rand(5)
    s[3] = s[0]
    for granularity in ("auto", "vmap", "unique"):
        model = moved(copy.deepcopy(net), granularity=granularity)
        assert check_exact(model, x, s) < 1e-10
    if seed % 2 == 0:    # a wrong rule must not hide behind a way that is right
        assert check_exact(moved(net, granularity="layers"), x, s) < 1e-10


@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_random_networks(seed):
    s = torch.tensor([0.3, 0.8, 0.3, 0.1])
    for granularity in ("auto", "layers", "vmap", "unique"):
        if granularity == "layers" and seed % 2: continue
        torch.manual_seed(seed)
        x = rand(4, 4, 8, 8)
        agrees(lambda: random_net(seed), s, x, granularity=granularity, training=False)


@pytest.mark.parametrize("seed", range(0, 8, 2))
@pytest.mark.parametrize("cheap", ["own", "groups", "twice"])
def test_gradients_do_not_depend_on_how_it_runs(seed, cheap, monkeypatch):
    "φ's among them; a layer's own kernels, its groups, and both sets on everything."
    price = {"own": (1e9, 1e9, 0), "groups": (0, 0, 1e9), "twice": (1e9, 1e9, 1e9)}
    for name, value in zip(("CALL", "EACH", "OWN"), price[cheap]):
        monkeypatch.setattr(ways, name, value)
    torch.manual_seed(seed)
    x, s = rand(6, 4, 8, 8), torch.tensor([0.7, 0.2, 0.7, 0.9, 0.2, 0.7])
    net, found = random_net(seed), []
    for granularity in ("unique", "auto"):
        model = moved(copy.deepcopy(net), granularity=granularity)
        model.lam = MonotoneLambda(11, 0, 1).double()
        y = model(x, s)
        y.square().sum().backward()
        found.append([y, *[p.grad for p in model.parameters()]])
    assert model.plan(s) == "layers"
    assert model.lam.phi.grad.abs().sum() > 0
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [True, False])
def test_a_layer_runs_in_groups_where_that_is_cheapest(groups, monkeypatch):
    model, calls = moved(nn.Sequential(nn.Conv2d(4, 4, 3))), []
    monkeypatch.setattr(ways, "CALL", 0 if groups else 1e12)
    monkeypatch.setattr(ways, "OWN", 1e12)
    x, s = rand(6, 4, 8, 8), torch.tensor([0.7, 0.2, 0.7, 0.9, 0.2, 0.7])
    model(x, s)
    count = lambda *a: calls.append(a[1].shape[0]) or F.conv2d(*a[1:2], *a[2:4])
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *a: count(*a))
    model(x, s)
    assert calls == ([2, 3, 1] if groups else [6, 6])


# ---- odd networks

class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.tanh(self.first(torch.relu(self.again(x)))))


class TiedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 11)
        self.head.weight = self.embed.weight

    def forward(self, i): return self.head(self.body(self.embed(i)))


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(rand(8, 4, 2)), nn.Parameter(rand(4, 2))

    def forward(self, x): return torch.einsum("bnd,dhk,hk->bnh", x, self.w, self.v)


class PartlyFrozen(nn.Module):
    "A layer that does not learn, an integer parameter and an integer buffer."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)
        self.order = nn.Parameter(torch.tensor([3, 1, 0]), requires_grad=False)
        self.register_buffer("times", torch.tensor(2))

    def forward(self, x): return self.b(self.a(x))[..., self.order] * self.times


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterList(torch.randn(8) for _ in range(3))
        self.more = nn.ParameterDict({"a": torch.randn(8)})

    def forward(self, x):
        for g in self.gains: x = torch.tanh(x * g)
        return x + self.more["a"]


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]): h = self.cell(x[:, t], h)
        return h


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(8, 8, 3)

    def forward(self, x): return self.form(x, x.tanh())


class Bag(nn.Module):
    def __init__(self, mode="sum"):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4, mode=mode)

    def forward(self, i): return self.bag(i)


@quiet
@pytest.mark.parametrize("kind", [TwoNames, TiedEncoder, Einsum, PartlyFrozen, Lists,
                                  Rolled, Pair, Bag])
def test_odd_networks_agree_with_plain_ones(kind):
    torch.manual_seed(0)
    s = torch.tensor([0.5, 0., 0.1, 1., 0.9, 0.3])
    x = torch.randint(11, (6, 5)) if kind in (TiedEncoder, Bag) else rand(6, 5, 8)
    for granularity in ("auto", "unique"):
        agrees(kind, s, x, training=False, granularity=granularity)
    agrees(kind, s[5], x, training=False)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_is_exact(mode):
    i = torch.tensor([[0, 1, 1], [2, 2, 3], [4, 4, 4]])
    assert agrees(lambda: Bag(mode), S, i).plan(S) == "vmap"


def test_a_weight_as_a_layers_input_gets_the_mix():
    class Input(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(rand(3, 3)), nn.Parameter(rand(3, 3))

        def forward(self, x): return x @ F.linear(self.a, self.b)
    model = agrees(Input, S, rand(3, 3))
    assert model.plan(S) == "vmap"       # by a second way it would be exact as well
    agrees(Input, S, rand(3, 3), granularity="vmap")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_parameter_that_is_first_touched_without_gradients_has_some(context):
    def touches(net, x):
        with context(): net.fc.weight.abs().mean(), net.gain.abs().mean()
        return Small.body(net, x)
    model = agrees(lambda: Small(touches), S, rand(3, 3), granularity="vmap")
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_parameter_normalised_under_no_grad_first():
    "As KarrasUnet does: a forced weight normalisation, and then the weight itself."
    def normed(net, x):
        with torch.no_grad(): scale = net.fc.weight.norm(dim=1, keepdim=True)
        w = net.fc.weight / scale
        return F.linear(x, w / w.norm(dim=1, keepdim=True)) * net.gain
    agrees(lambda: Small(normed), S, rand(3, 3), granularity="vmap")


def test_the_second_set_may_be_left_alone():
    model = moved(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    model.theta1.requires_grad_(False)
    model(rand(3, 3), S).sum().backward()
    assert model.net[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.theta1.parameters())


# ---- what is cut

def test_tensors_of_the_samples_are_cut_by_position_and_by_keyword():
    class Inputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

        def forward(self, x, y, scale=None, mask=None):
            h = self.a(x) + self.b(y)
            h = h if scale is None else h * scale
            return {"h": h if mask is None else h * mask, "name": "a string"}

    model, x, y = moved(Inputs()), rand(4, 3), rand(4, 2)
    s, scale, mask = torch.rand(4), rand(3), rand(4, 3)
    for given in (dict(scale=scale), dict(mask=mask), dict(mask=mask, scale=scale)):
        together = model(x, s, y, **given)
        assert together["name"] == "a string"
        for i in range(4):
            own = {k: v[i:i + 1] if k == "mask" else v for k, v in given.items()}
            alone = model.freeze_at(s[i])(x[i:i + 1], y[i:i + 1], **own)["h"]
            torch.testing.assert_close(together["h"][i:i + 1], alone)
    with pytest.raises(ValueError, match="pass what all samples share by keyword"):
        model(x, s, y[:2], scale=scale)


@pytest.mark.parametrize("shared", [True, False])
def test_a_keyword_with_as_many_rows_as_samples_is_told_by_comparison(shared):
    def uses(net, x, rows): return net.body(x) @ rows if shared else net.body(x) * rows
    model, x, rows = moved(Small(uses)), rand(3, 3), rand(3, 3)
    y = model(x, S, rows=rows)
    for i in range(3):
        own = rows if shared else rows[i:i + 1]
        alone = model.freeze_at(S[i])(x[i:i + 1], rows=own)
        torch.testing.assert_close(y[i:i + 1], alone)


def test_outputs_that_cannot_be_put_together_are_refused():
    class Box:
        def __init__(self, y): self.y = y
    x = rand(3, 3)
    for granularity in ("auto", "unique"):
        def run(out):
            net = Small(lambda net, x: out(net.fc(x)))
            return moved(net, granularity=granularity)(x, S)
        with pytest.raises(ValueError, match="not of Box"): run(Box)
        with pytest.raises(ValueError): run(lambda y: (y, y.sum().item()))
        with pytest.raises(ValueError): run(lambda y: [y] * (1 + int(y.sum() > 0)))
        with pytest.raises(ValueError, match="its first axis"): run(lambda y: y.sum())
        with pytest.raises(ValueError, match="its first axis"): run(lambda y: y.T[:2])
        y = run(lambda y: {"y": y, "none": None, "n": 3})
        assert y["none"] is None and y["n"] == 3 and y["y"].shape == (3, 3)


def test_an_output_whose_structure_depends_on_the_sample_is_refused_later_too():
    "Two samples agree at first; a third does not."
    net = Small(lambda net, x: [net.fc(x)] * (2 if x.abs().max() > 50 else 1))
    model, x = moved(net, granularity="unique"), rand(3, 3)
    model(x, S)
    x[1] = 100
    with pytest.raises(ValueError, match="same structure"): model(x, S)
    net.f = lambda net, x: (net.fc(x), float(x.abs().max() > 50))
    with pytest.raises(ValueError, match="same plain values"): model(x, S)


def test_weights_that_were_untied_or_are_cached_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    model, x = moved(net), rand(2, 3)
    model(x, 0.5)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="was tied to another"): model(x, 0.5)
    normed = moved(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    normed(x, 0.5)
    with nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
        normed(x, 0.9)


# ---- buffers

def test_a_buffer_that_changes_is_not_changed_once_for_each_group():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    model = moved(net, granularity="unique").train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(ValueError, match="updates its buffer"):
        model(rand(2, 3), torch.tensor([0.1, 0.9]))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model(rand(2, 3), 0.5)  # one scalar for the batch is fine


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_counts_calls(in_place, training):
    def counts(net, x):
        if in_place: net.calls += 1
        else: net.calls = net.calls + 1
        return net.fc(x)

    def make(**kwargs):
        net = Small(counts)
        net.register_buffer("calls", torch.zeros(()))
        return moved(net, **kwargs).train(training)
    x, model = rand(2, 3), make(granularity="unique")
    with pytest.raises(ValueError, match="updates its buffer 'calls'"):
        model(x, torch.tensor([0.1, 0.9]))
    assert model.net.calls == 0
    model(x, 0.5)
    assert model.net.calls == 1


def test_a_buffer_that_is_a_view_of_a_parameter_is_refused():
    net = Small()
    net.register_buffer("top", net.fc.weight.data[1:])
    with pytest.raises(ValueError, match="'top' shares its memory .* 'fc.weight'"):
        DPI(net)
    net.top = net.top.clone()
    DPI(net)


# ---- nothing is changed

@quiet
@pytest.mark.parametrize("s", [0.3, S])
def test_the_first_call_changes_what_a_plain_call_changes(s):
    def forward(net, x, y):
        net.calls += 1
        net.seen.lerp_(x.mean(0), 0.1) if not isinstance(s, torch.Tensor) else None
        x.add_(1)
        y.mul_(2)
        return net.body(x) + y
    net = Small(forward)
    net.calls = 0
    net.register_buffer("seen", torch.zeros(3))
    model, x, y = moved(net).train(), rand(3, 3), rand(3, 3)
    before = x.clone(), y.clone(), {k: v.clone() for k, v in model.state_dict().items()
                                    if isinstance(v, torch.Tensor)}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    model(x, s, y)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (np.random.get_state()[1] == states[1]).all()
    torch.testing.assert_close(x, before[0] + 1)
    torch.testing.assert_close(y, before[1] * 2)
    assert net.calls == 1
    for k, v in before[2].items():
        if k != "net.seen": assert torch.equal(model.state_dict()[k], v), k
    if s is not S: torch.testing.assert_close(net.seen, 0.1 * before[0].mean(0))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_were_there_stay():
    model = moved(Small())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model(rand(3, 3), S)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_random_numbers_of_a_network_are_those_of_a_plain_call():
    net = Small(lambda net, x: net.body(x) * torch.rand_like(x) * random.random())
    model, x = moved(net), rand(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5), random.seed(5)
        y = model(x, 0.5)
    frozen = model.freeze_at(0.5)
    torch.manual_seed(5), random.seed(5)
    torch.testing.assert_close(y, frozen(x))


# ---- memory that runs out

def oom(kind):
    if kind == "cuda": return torch.OutOfMemoryError("CUDA out of memory")
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("when", ["comparison", "call"])
def test_running_out_of_memory_is_passed_on_and_changes_nothing(kind, when):
    left = types.SimpleNamespace(calls=None)

    def hungry(net, x):
        if left.calls is not None and len(x) >= (1 if when == "comparison" else 3):
            left.calls -= 1
            if left.calls == -1: raise oom(kind)      # once: it is transient
        return net.body(x)
    model, x = moved(Small(hungry), granularity="auto"), rand(3, 3)
    for calls in range(12 if when == "comparison" else 1):   # at every single run
        if when == "call": model(x, 0.5), model(x, 0.5)
        left.calls = calls
        try: model(x, 0.5 if when == "call" else S)
        except (RuntimeError, torch.OutOfMemoryError) as e:
            assert str(e) == str(oom(kind)) and type(e) is type(oom(kind))
            verdicts = [v for k in model.kinds.values() for v in k.verdicts.values()]
            assert not any(verdicts)     # nothing is said against any way
        else: assert when == "comparison" and calls > 8   # it ran nine times
        left.calls = None
    assert not model.running
    model(x, S)
    assert model.plan(S) == "vmap"


# ---- recomputation

@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_calls_no_layer_is_refused(reentrant):
    def forward(net, x):
        f = lambda h: torch.tanh(h * net.gain)
        return checkpoint(f, net.fc(x), use_reentrant=reentrant)
    for s in (0.5, torch.tensor([0.2, 0.7])):
        with pytest.raises((RuntimeError, ValueError), match="checkpointing|gradient"):
            moved(Small(forward))(rand(2, 3), s)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("s", [0.5, torch.tensor([0.2, 0.7])])
def test_checkpointing_switched_on_later_is_noticed(reentrant, s):
    def forward(net, x):
        if net.on: return checkpoint(net.fc, x, use_reentrant=reentrant)
        return net.fc(x)
    net = Small(forward)
    net.on = False
    model, x = moved(net), rand(2, 3).requires_grad_()
    model(x, s).sum().backward()
    net.on = True
    late = "heckpointing|setup_context"    # vmap has complaints of its own
    with pytest.raises(RuntimeError, match=late): model(x, s).sum().backward()
    with torch.no_grad(): model(x, s)     # nothing is recomputed


def test_saved_tensor_hooks_around_the_model_are_the_callers_business():
    model, x = moved(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), rand(2, 3)
    with torch.autograd.graph.save_on_cpu(): model(x, 0.5).sum().backward()
    assert model.net[0].weight.grad.abs().sum() > 0


def test_a_layer_does_not_run_outside_of_its_model():
    model, x = moved(Small()), rand(2, 3)
    with pytest.raises(RuntimeError, match="outside its forward pass"): model.net(x)
    with torch.no_grad(): model.net(x)
    copy.deepcopy(model.net)(x)
    clone = copy.deepcopy(model)
    clone(x, 0.5)
    with pytest.raises(RuntimeError, match="outside its forward pass"): clone.net(x)


# ---- copies, files, other processes

def test_copies_and_pickles_answer_alike():
    model, x = moved(Small()), rand(3, 3)
    y = model(x, S)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, S), y) and torch.equal(twin(x, 0.5), model(x, 0.5))
        with torch.no_grad():
            for p in twin.parameters(): p.zero_()
        assert torch.equal(model(x, S), y)


def test_a_frozen_network_can_be_pickled_exported_and_mixed_again():
    model = moved(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), torch.float32)
    x = torch.randn(2, 4, 8, 8)
    model(x, 0.5)
    frozen = model.freeze_at(0.5)
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    exported = torch.export.export(frozen, (x,))
    torch.testing.assert_close(exported.module()(x), frozen(x))
    held = [p.data_ptr() for p in frozen.parameters()]
    assert model.freeze_at(0.9, into=frozen) is frozen
    assert held == [p.data_ptr() for p in frozen.parameters()]
    assert torch.equal(frozen(x), model.freeze_at(0.9)(x))
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & set(held)


class Keeps(Small):
    "Computes its weight once in eval mode; train() drops it."
    kept = None

    def train(self, mode=True):
        if mode: self.kept = None
        return super().train(mode)

    def body(self, x):
        if self.training: return F.linear(x, self.fc.weight)
        if self.kept is None: self.kept = self.fc.weight.detach().clone()
        return F.linear(x, self.kept)


def test_what_a_network_kept_does_not_reach_its_frozen_copies():
    net = Keeps(lambda net, x: net.body(x)).double().eval()
    net(rand(1, 3))                      # before it was wrapped
    model, x = moved(net), rand(2, 3)
    with torch.no_grad(): model.net(x)
    weight = lambda s: torch.lerp(net.fc.weight, model.theta1.fc.weight, s)
    frozen = model.freeze_at(0.2)
    torch.testing.assert_close(frozen(x), F.linear(x, weight(0.2)))
    model.freeze_at(0.9, into=frozen)
    torch.testing.assert_close(frozen(x), F.linear(x, weight(0.9)))
    assert not frozen.training
    for s in (0.5, torch.tensor([0.2, 0.7])):
        with pytest.raises(ValueError, match="is off by|keeps a tensor"): model(x, s)


def test_an_optimizer_step_moves_both_sets_and_phi():
    torch.manual_seed(0)
    model = DPI(nn.Linear(3, 3), MonotoneLambda(10, 0, 1), init="fresh")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1, phi_lr=0.1))
    model(torch.randn(8, 3), torch.rand(8)).square().sum().backward()
    optimizer.step()
    assert all((p != before[n]).any() for n, p in model.named_parameters())
    groups = [(g["name"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [("theta", 0.05), ("phi", 0.)]


def test_a_fresh_second_set_needs_layers_that_can_be_drawn_anew():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    for net in (normed, nn.Sequential(nn.Linear(3, 3), normed), Small()):
        with pytest.raises(ValueError, match="Give another network as init"):
            DPI(net, init="fresh")
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = DPI(net, init="fresh")
    assert (model.theta1.get_parameter("0.weight") != net[0].weight).any()


def test_parallel_wrappers_belong_outside():
    dist = torch.distributed
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/at", rank=0, world_size=1)
        try:
            inner = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
            with pytest.raises(TypeError, match="wrap the other way round"): DPI(inner)
            outer = nn.parallel.DistributedDataParallel(moved(nn.Linear(3, 3)))
            outer(rand(2, 3), torch.tensor([0.2, 0.7])).sum().backward()
            grads = [p.grad for p in outer.module.theta1.parameters()]
            assert all(g.abs().sum() > 0 for g in grads)
        finally: dist.destroy_process_group()


def test_dropout_draws_a_mask_for_each_sample():
    model = moved(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5))).train()
    y = model(torch.ones(2, 64).double(), torch.tensor([0.2, 0.8]))
    assert ((y[0] == 0) != (y[1] == 0)).any() and 10 < (y[0] == 0).sum() < 54


@pytest.mark.skipif(shutil.which("g++") is None,
                    reason="torch.compile's default backend needs a C++ compiler")
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") == "default",
                    reason="PyTorch 2.13 then generates vectors that it does not declare")
def test_compiled_with_the_default_backend():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3))
    model = moved(net, torch.float32)
    x, compiled = torch.randn(3, 4, 8, 8), torch.compile(model)
    torch.testing.assert_close(compiled(x, 0.3), model(x, 0.3), rtol=1e-4, atol=1e-5)
    compiled(x, 0.3).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x, 0.3).sum().backward()
    for a, p in zip(got, model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4)


def test_importing_does_not_load_the_compiler():
    code = ("import sys, dpi_nbdev; dpi_nbdev.DPI;"
            "print(*[m in sys.modules for m in"
            " ('torch._dynamo', 'sklearn', 'matplotlib')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"] * 3


# ---- the comparison itself

def test_the_comparison_finds_a_wrong_parameter_of_one_percent(monkeypatch):
    "For each way: a run that is off by little is refused, and says what is off."
    def off(way, sets, lam, s, inputs, grouped=True):
        return true_run(way, sets, lambda s: lam(s) * 0.99, s, inputs, grouped)
    true_run = engine.run
    monkeypatch.setattr(engine, "run", off)
    for granularity, s in (("auto", S), ("unique", S), ("auto", 0.5)):
        with pytest.raises(ValueError, match="is off by"):
            moved(Small(), torch.float32, granularity=granularity)(torch.randn(3, 3), s)


def test_a_way_is_on_trial_three_times(monkeypatch):
    "Rounding that flips a decision may spoil one comparison, or two."
    true_fault = engine._Comparison.fault
    unlucky = lambda self, way: "bad luck" if self.seed < 2 else true_fault(self, way)
    monkeypatch.setattr(engine._Comparison, "fault", unlucky)
    model = moved(Small())
    model(rand(3, 3), S)
    assert model.plan(S) == "vmap"


def test_the_comparison_looks_away_from_zeros_and_equal_sets():
    "As at the start of training: a branch of zeros, and two sets that are equal."
    mixes = Small(lambda net, x: net.body(x) + net.zero(x - x.mean(0)))
    mixes.zero = nn.Linear(3, 3)
    for p in mixes.zero.parameters(): nn.init.zeros_(p)
    with pytest.raises(ValueError, match="mixes the samples"):
        DPI(mixes, LinearLambda(0, 1))(torch.randn(3, 3), S)
    hides = Small(lambda net, x: net.fc(x) * net.own[0])
    hides.own = [hides.gain]
    for s in (0.5, S):
        with pytest.raises(ValueError, match="is off by"):
            DPI(hides, LinearLambda(0, 1))(torch.randn(3, 3), s)


def test_the_comparison_finds_a_wrong_gradient(monkeypatch):
    class Tampered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v): return v.clone()
        @staticmethod
        def backward(ctx, g): return 1.02 * g
    true_run = engine.run
    wrong = lambda *args: Tampered.apply(true_run(*args))
    monkeypatch.setattr(engine, "run", wrong)
    for s in (S, 0.5):
        with pytest.raises(ValueError, match="the gradient with respect to"):
            moved(Small(), torch.float32)(torch.randn(3, 3), s)
        with torch.no_grad(): moved(Small())(rand(3, 3), s)


# ---- strange networks that were once silently wrong, or refused for no reason

def unequal(model, x, s, want):
    with torch.no_grad(): torch.testing.assert_close(model(x, s), want)


def test_a_python_number_is_not_rounded_for_a_float64_model():
    net = nn.Linear(3, 3, bias=False).double()
    model, x, s = moved(net), rand(2, 3), 1 / 3
    want = F.linear(x, (1 - s) * net.weight + s * model.theta1.weight)
    torch.testing.assert_close(model(x, s), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("s", [0.5, S])
def test_the_second_set_may_learn_alone(s):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model = moved(net)
    net.requires_grad_(False)
    model(rand(3, 3), s).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.theta1.parameters())


@pytest.mark.parametrize("view", [
    lambda p: p.data, lambda p: [p.detach()[:2]], lambda p: p.detach().numpy()])
def test_a_plain_tensor_that_is_a_view_of_a_parameter_is_refused(view):
    net = Small(lambda net, x: net.body(x))
    net.held = view(net.gain)
    with pytest.raises(ValueError, match="shares its memory"): DPI(net)


def test_parameters_that_overlap_are_refused():
    flat, net = torch.randn(4), Small()
    net.a, net.b = nn.Parameter(flat[:3]), nn.Parameter(flat[1:])
    with pytest.raises(ValueError, match="memory"): DPI(net)


@pytest.mark.parametrize("late", [True, False])
def test_hooks_on_parameters_are_refused(late):
    net = Small()
    if late: net.gain.register_post_accumulate_grad_hook(lambda p: None)
    else: net.gain.register_hook(lambda g: 3 * g)
    with pytest.raises(ValueError, match="hook"): DPI(net)


class Merges(nn.Module):
    "loralib: a low-rank update, merged into the weight by eval()."
    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = (nn.Parameter(torch.randn(3, 3)) for _ in range(3))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.w.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.w if self.merged else self.w + self.b @ self.a)


def test_a_network_whose_train_rewrites_parameters():
    try: model, x = DPI(Merges(), LinearLambda(0, 1), init=Merges()), torch.randn(2, 3)
    except ValueError: return     # refused is fine too
    y = model(x, 1.)
    torch.testing.assert_close(model.eval()(x, 1.), y)


class Derives(Small):
    "A buffer that is computed from the parameters whenever a state dict is loaded."
    def __init__(self):
        super().__init__(lambda net, x: net.body(x) / net.size)
        self.register_buffer("size", self.gain.detach().max())
        self.register_load_state_dict_post_hook(Derives.again)

    def again(self, keys): self.size.copy_(self.gain.detach().max())


@pytest.mark.parametrize("s", [0.5, S])
def test_buffers_computed_when_a_state_dict_is_loaded(s):
    with pytest.raises(ValueError): moved(Derives())(rand(3, 3), s)


@pytest.mark.parametrize("out", [
    lambda net, x: (net.fc(x), lambda v: net.fc(v)), lambda net, x: iter([net.fc(x)])])
def test_outputs_that_run_later_are_refused(out):
    with torch.no_grad(), pytest.raises(ValueError):
        moved(Small(out))(rand(2, 3), 0.5)


def test_objects_that_are_given_are_changed_once():
    def forward(net, x, cache):
        cache.n += 1
        return net.body(x)
    cache = types.SimpleNamespace(n=0)
    moved(Small(forward))(rand(2, 3), 0.5, cache=cache)
    assert cache.n == 1


def test_a_list_that_is_given_is_filled():
    def forward(net, x, found):
        found.append(net.fc(x))
        return net.body(x)
    found = []
    try: moved(Small(forward))(rand(2, 3), 0.5, found=found)
    except ValueError: return     # refused is fine too
    assert len(found) == 1


@pytest.mark.parametrize("s", [0.5, S])
def test_a_buffer_registered_at_the_first_call_is_exact(s):
    def forward(net, x):
        if not hasattr(net, "table"): net.register_buffer("table", torch.arange(3.))
        return net.body(x) + net.table
    moved(Small(forward))(rand(3, 3), s)


def test_a_loss_is_an_output_with_one_scalar():
    model, x = moved(Small(lambda net, x: net.body(x).mean())), rand(3, 3)
    torch.testing.assert_close(model(x, 0.5), model.freeze_at(0.5)(x))


@pytest.mark.parametrize("s", [0.5, torch.ones(0)])
def test_an_empty_batch(s):
    assert moved(nn.Linear(3, 2))(rand(0, 3), s).shape == (0, 2)


def test_noise_in_eval_mode_and_a_layer_without_a_vmap_rule():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 3, batch_first=True)

        def forward(self, x): return self.rnn(x)[0] + 0.1 * torch.randn_like(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved(Noisy())(rand(3, 4, 3), S)


@pytest.mark.parametrize("s", [0.5, S])
def test_dropout_in_training_from_a_generator_of_its_own(s):
    def forward(net, x):
        if not net.training: return net.body(x)
        return net.body(x) * (torch.rand(x.shape, generator=net.draw) < 0.5)
    net = Small(forward)
    net.draw = torch.Generator().manual_seed(0)
    # The generator goes on from call to call, which looks like a value that is kept.
    with pytest.raises(ValueError, match="would not be exact|mixes the samples"):
        moved(net).train()(rand(3, 3), s)


def test_two_keywords_of_which_one_is_cut():
    f = lambda net, x, mask, table: (net.body(x) * mask) @ table
    moved(Small(f))(rand(3, 3), S, mask=rand(3, 3), table=rand(3, 3))


def test_a_loss_beside_a_mask_names_what_is_wrong():
    f = lambda net, x, mask: (net.body(x) * mask).mean()
    with pytest.raises(ValueError, match="first axis"):
        moved(Small(f))(rand(4, 3), torch.rand(4), mask=rand(4, 3))


def test_sparse_parameters_are_refused():
    net = Small(lambda net, x: torch.sparse.mm(net.sparse, net.body(x).T).T)
    net.sparse = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="sparse"): DPI(net)


def test_a_value_kept_for_ever_is_not_mixed_over():
    def forward(net, x):
        if getattr(net, "kept", None) is None: net.kept = net.gain.detach().clone()
        return x * net.kept
    model, x = moved(Small(forward)), rand(2, 3)
    frozen = model.freeze_at(0.)
    frozen(x)
    again = model.freeze_at(1., into=frozen)
    torch.testing.assert_close(again(x), model.freeze_at(1.)(x))


def test_one_row_for_all_samples_becomes_a_row_for_each():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.place = nn.Embedding(11, 8), nn.Embedding(5, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, i):
            return self.out(torch.tanh(self.word(i) + self.place(torch.arange(5)[None])))

    model, i = moved(Positions()), torch.randint(11, (3, 5))
    assert check_exact(model, i, S) < 1e-12
    assert model.plan(S) == "layers"


def test_a_parametrized_layer_does_not_hold_two_sets():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).double()
    model = moved(net, select="*bias")
    with torch.no_grad(): model(rand(3, 3), S)
    assert model.plan(S) != "layers"
