"""Lean sets against mixtures written out from the state dict, without the library."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpi_nbdev import (DPI, DRUNet, Full, Gains, LinearLambda, LowRank, MonotoneLambda,
                       Tents, build_model, check_exact, film, load_model, param_groups,
                       save_model)
from dpi_nbdev import ways
from dpi_nbdev.core import seeded
from dpi_nbdev.lean import hidden_parameters
from dpi_nbdev.training import TrainSettings, train

TURNED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stirred(model, size=0.3, seed=0):
    "The model in float64, with further sets that matter."
    draw = seeded(seed)
    model.double()
    with torch.no_grad():
        for part in model.sets.parts:
            for tree in part.trees:
                for p in tree.parameters():
                    p += size * torch.randn(p.shape, generator=draw).to(p)
    return model


def owner(model, name):
    return model.net.get_submodule(name.rpartition(".")[0])


def gained(model, name, p, w):
    "θ at weights w from the stored gains: one row, or one number, at a time."
    delta = model.state_dict()[f"gains.{name}"]
    change = sum(w[k] * delta[k] for k in range(len(w)))
    if p.ndim < 2:
        return p + change.view(p.shape)
    layer, out = owner(model, name), p.clone()
    for c in range(len(change)):
        if isinstance(layer, TURNED):
            group, own = divmod(c, p.shape[1])
            rows = p.shape[0] // layer.groups
            out[group * rows:(group + 1) * rows, own] *= 1 + change[c]
        elif isinstance(layer, nn.Embedding):
            out[:, c] *= 1 + change[c]
        else:
            out[c] *= 1 + change[c]
    return out


def low_rank(model, name, p, w):
    "θ at weights w from the stored factors, curve by curve, group by group."
    state = model.state_dict()
    up, down = state[f"up.{name}"], state.get(f"down.{name}")
    if p.ndim < 2:
        return p + sum(w[k] * up[k] for k in range(len(w))).view(p.shape)
    layer, total = owner(model, name), p.clone()
    groups = layer.groups if isinstance(layer, (*CONVS, *TURNED)) else 1
    inner = down.shape[1] if isinstance(layer, nn.Embedding) else len(down) // groups
    rank = inner // len(w)
    for g, k in itertools.product(range(groups), range(len(w))):
        own = slice(k * rank, (k + 1) * rank)
        rows = slice(g * p.shape[0] // groups, (g + 1) * p.shape[0] // groups)
        if isinstance(layer, nn.Embedding):
            change = down[:, own] @ up[:, own].T
        elif isinstance(layer, TURNED):
            a = down[g * inner:(g + 1) * inner][own].flatten(1)
            b = up[g * inner:(g + 1) * inner][own]
            change = torch.einsum("ri,r...->i...", a, b)
        else:
            a = down[g * inner:(g + 1) * inner][own]
            b = up[rows].flatten(1)[:, own]
            change = torch.einsum("or,r...->o...", b, a)
        total[rows] += w[k] * change.reshape(total[rows].shape)
    return total


def by_hand(model, x, s, formula):
    "A plain copy of the network for each sample."
    outs = []
    for i, w in enumerate(model.lam(s).view(len(s), -1)):
        net = copy.deepcopy(model.net).eval()
        mixed = {n: formula(model, n, p, w) for n, p in model.theta()[0].items()}
        net.load_state_dict(mixed, strict=False)
        outs.append(net(x[i:i + 1]))
    return torch.cat(outs)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 4, bias=False)

    def forward(self, i): return self.out(torch.tanh(self.embed(i)))


class Bare(nn.Module):
    "Attention, a bare matrix, and a recurrent layer: nothing that layers could hold."
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(6, 4))

    def forward(self, x): return self.attend(x, x, x)[0] @ self.matrix


NETS = {
    "strided, grouped": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "circular, dilated": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular"), nn.SiLU(),
        nn.Conv2d(6, 4, 3, padding="same", bias=False)),
    "turned": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), nn.SiLU(),
        nn.ConvTranspose2d(6, 2, 2)),
    "one axis": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(4, 6, 3), nn.SiLU(), nn.ConvTranspose1d(6, 2, 3)),
    "normed": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 4, 3),
        nn.InstanceNorm2d(4, affine=True)),
    "words": Words, "bare": Bare}


def inputs_of(name):
    draw = seeded(1)
    if name == "words":
        return torch.randint(9, (5, 3), generator=draw)
    shape = (5, 3, 6) if name == "bare" else (5, 4, 6, 6)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("curves", [1, 3])
@pytest.mark.parametrize("kind, formula", [(Gains, gained), (LowRank, low_rank)])
def test_each_equals_the_plain_network_with_the_mixed_state_dict(
        name, curves, kind, formula, monkeypatch):
    torch.manual_seed(0)
    sets = Gains(curves) if kind is Gains else LowRank(2, curves)
    model = stirred(DPI(NETS[name]().eval(), MonotoneLambda(s_min=0, s_max=1, curves=curves),
                        sets=sets, select="*" if kind is LowRank or name in ("words", "bare")
                        else None))
    x, s = inputs_of(name), torch.tensor([0, 0.2, 0.2, 0.7, 1]).double()
    want = by_hand(model, x, s, formula)
    torch.testing.assert_close(model(x, s), want, rtol=1e-9, atol=1e-9)
    cheapest = ways._cheapest
    for how in ("beside", "groups", "own"):
        def forced(layer, held, w, x):
            own = how != "own" or ways._own_is_possible(layer, held, x)
            fits = own and isinstance(layer, (*CONVS, *TURNED)) and "weight" in held.added
            return how if fits and w.sizes else cheapest(layer, held, w, x)
        monkeypatch.setattr(ways, "_cheapest", forced)
        torch.testing.assert_close(model(x, s), want, rtol=1e-9, atol=1e-9)
    for i, v in enumerate(s):
        frozen = model.freeze_at(v)
        for n, p in model.theta()[0].items():
            mixed = formula(model, n, p, model.lam(v).view(-1))
            torch.testing.assert_close(frozen.get_parameter(n), mixed)
        torch.testing.assert_close(model(x, v)[i:i + 1], want[i:i + 1], rtol=1e-9, atol=1e-9)
    assert check_exact(model, x, s) < 1e-9


@pytest.mark.parametrize("sets", [Gains(1), Gains(4), LowRank(2), (Full(2), Gains(2)), Full(3)])
@pytest.mark.parametrize("way", ["layers", "vmap", "unique"])
def test_all_ways_agree_with_gradients(sets, way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 3, 3))
    one = stirred(DPI(net, sets=sets))
    two = copy.deepcopy(one)
    two.granularity = way
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=seeded(0))
    s = torch.tensor([0., 10, 10, 500, 999, 500], dtype=torch.float64)
    one(x, s).square().sum().backward()
    two(x, s).square().sum().backward()
    assert two.plan(s) == way
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m: f"{name}: {m}")


def test_a_network_keeps_its_function_and_learns_from_the_first_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 1, 3))
    x, s = torch.randn(4, 1, 8, 8), torch.tensor([1., 300, 600, 999])
    for sets in (Gains(1), Gains(4), LowRank(2)):
        model = DPI(copy.deepcopy(net), sets=sets)
        torch.testing.assert_close(model(x, s), net(x))
        model(x, s).square().sum().backward()
        moving = {n for n, p in model.named_parameters()
                  if p.grad is not None and p.grad.abs().sum() > 0}
        tree = "gains" if isinstance(sets, Gains) else "up"
        assert f"{tree}.0.weight" in moving


def test_several_curves_start_apart():
    curves = MonotoneLambda(curves=4)(torch.arange(1000))
    difference = (curves[:, None] - curves[..., None]).abs().amax(0)
    assert (difference[~torch.eye(4, dtype=torch.bool)] > 0.4).all()


def test_where_gains_go():
    net = DRUNet(1, 1, widths=(8, 16), n_blocks=1)
    assert hidden_parameters(net) == [f"m_{n}.res.0.weight"
                                      for n in ("down1.0", "body.0", "up1.1")]
    model = DPI(net, sets=Gains(2))
    assert [n.rpartition(".")[2] for n in model.names] == ["weight", "bias"] * 3
    bare = DPI(DRUNet(1, 1, widths=(8, 16), n_blocks=1), sets=Gains(2, shifts=False))
    assert all(n.endswith("weight") for n in bare.names)
    assert bare.net.m_body[0].res[0].bias is None
    chosen = DPI(DRUNet(1, 1, widths=(8, 16), n_blocks=1), sets=Gains(1), select="m_tail*")
    assert chosen.names == ["m_tail.weight", "m_tail.bias"]
    norms = nn.TransformerEncoderLayer(8, 2, 16)
    assert {n.partition(".")[0] for n in hidden_parameters(norms)} == {"norm1", "norm2"}


def test_rates_are_by_kind_and_curves():
    net = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    for sets, rate in ((Gains(1), 10), (Gains(4), 3)):
        groups = {g["name"]: g for g in param_groups(DPI(net(), sets=sets), lr=2e-3)}
        assert groups["gains"]["lr"] == pytest.approx(rate * 2e-3)
        assert groups["gains"]["weight_decay"] == 0
        assert len(groups["gains"]["params"]) == 2 and len(groups["theta"]["params"]) == 4
    groups = param_groups(DPI(net(), sets=Gains(4)), gains_lr=0.5)
    assert next(g["lr"] for g in groups if g["name"] == "gains") == 0.5
    for sets in (Full(2), LowRank(2)):
        assert {g["name"] for g in param_groups(DPI(net(), sets=sets))} == {"theta", "phi"}


@pytest.mark.parametrize("sets", ["gains-1", "gains-4", "low-rank-2", "full+gains-2"])
def test_saved_and_loaded_to_the_bit(sets, tmp_path):
    settings = dict(in_channels=1, widths=(8, 16), n_blocks=1, ones_channel=True, seed=0)
    model = build_model("drunet", "dpi", "flow", sets=sets, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=seeded(p.numel()))
    save_model(tmp_path, model)
    back = load_model(tmp_path)
    x, s = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 1.])
    assert torch.equal(back(x, s), model.eval()(x, s))
    assert repr(back) == repr(model)


@pytest.mark.parametrize("sets", [Gains(4), LowRank(2)])
def test_compiled_and_in_low_precision(sets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 1, 3))
    model = stirred(DPI(net, sets=sets)).float()
    x, s = torch.randn(4, 1, 8, 8), torch.tensor([1., 300, 600, 999])
    y = model(x, s)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, s), y)
    torch.testing.assert_close(compiled(x, 300.), model(x, 300.))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, s)
        one = model(x, 300.)
    assert low.dtype == one.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.05 * y.abs().max().item())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16), s).dtype == torch.bfloat16


def test_training_moves_gains_and_an_average_follows():
    from dpi_nbdev import DiffusionLoss, VPDiffusion
    model = build_model("drunet", "dpi", sets="gains-2", in_channels=1, widths=(8, 16),
                        n_blocks=1, seed=0)
    data = torch.randn(32, 1, 8, 8, generator=seeded(0)).clamp(-1, 1)
    run = train(model, DiffusionLoss(VPDiffusion()), data, TrainSettings(steps=5, batch_size=16),
                progress=False)
    moved = [p.abs().sum().item() for p in run.model.gains.parameters()]
    assert all(v > 0 for v in moved)


def test_film_is_any_piecewise_linear_function():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    model = film(net, 0, 1, knots=3)
    with torch.no_grad():
        model.gains.get_submodule("0").weight.copy_(torch.tensor([[0., 1], [2, 0], [1, 4]]))
    gain = lambda s: model.freeze_at(s)[0].weight.flatten() / net[0].weight.flatten()
    torch.testing.assert_close(gain(0.), torch.tensor([1., 2]))
    torch.testing.assert_close(gain(0.5), torch.tensor([3., 1]))
    torch.testing.assert_close(gain(0.75), torch.tensor([2.5, 3]))
    assert not [n for n, _ in model.lam.named_parameters()]


def test_several_scalars_add_and_are_given_in_three_ways():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    model = stirred(DPI(net, [LinearLambda(0, 1), LinearLambda(0, 10)], sets=Full(2)))
    x = torch.randn(4, 3, dtype=torch.float64)
    a, b = torch.rand(4).double(), 10 * torch.rand(4).double()
    theta0, theta1, theta2 = (t["weight"] for t in model.theta())
    bias0, bias1, bias2 = (t["bias"] for t in model.theta())
    want = []
    for x_i, u, v in zip(x, a, b / 10):
        weight = theta0 + u * (theta1 - theta0) + v * (theta2 - theta0)
        want.append(F.linear(x_i, weight, bias0 + u * (bias1 - bias0) + v * (bias2 - bias0)))
    want = torch.stack(want)
    torch.testing.assert_close(model(x, (a, b)), want)
    torch.testing.assert_close(model(x, torch.stack([a, b], 1)), want)
    torch.testing.assert_close(model(x, (a[1], b[1]))[1], want[1])
    torch.testing.assert_close(model(x, torch.stack([a[1], b[1]]))[1], want[1])
    torch.testing.assert_close(model.freeze_at((a[2], b[2]))(x)[2], want[2])
    torch.testing.assert_close(model(x, (a[1], b)), model(x, (a[1].expand(4), b)))
    for wrong in (0.5, (a,), (a, b, b), torch.zeros(4, 3), torch.zeros(4)):
        with pytest.raises(ValueError, match="takes 2 scalars|one per sample"):
            model(x, wrong)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        model(x, (b + 5, a))


def test_three_sets_are_linear_between_neighbours_and_exact_at_knots():
    net = nn.Linear(3, 2)
    model = stirred(DPI(net, LinearLambda(0, 1), sets=Full(3)))
    sets = model.theta()
    for s, k in ((0., 0), (0.5, 1), (1., 2)):
        assert torch.equal(model.freeze_at(s).weight, sets[k]["weight"])
    torch.testing.assert_close(model.freeze_at(0.75).weight,
                               (sets[1]["weight"] + sets[2]["weight"]) / 2)
    torch.testing.assert_close(model.freeze_at(0.1).weight,
                               0.8 * sets[0]["weight"] + 0.2 * sets[1]["weight"])


def test_kinds_of_sets_are_not_mixed_up():
    net = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    full, gains, low = DPI(net()), DPI(net(), sets=Gains(2)), DPI(net(), sets=LowRank(2))
    for model, other in itertools.permutations((full, gains, low), 2):
        with pytest.raises(ValueError, match="build it with the sets of the saved one"):
            model.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="another number of curves"):
        gains.load_state_dict(DPI(net(), sets=Gains(3)).state_dict())
    for lam, sets in ((MonotoneLambda(curves=2), Full(2)), (LinearLambda(), Gains(2)),
                      (Tents(5), Gains(4)), (MonotoneLambda(curves=4), (Full(2), Gains(4)))):
        with pytest.raises(ValueError, match="needs a λ of"):
            DPI(net(), lam, sets=sets)(torch.randn(1, 1, 8, 8), 1.)
    with pytest.raises(ValueError, match="needs a λ of 1 curve"):     # already when built
        DPI(net(), MonotoneLambda(curves=2))


@pytest.mark.parametrize("sets", [Gains(2), LowRank(2), (Full(2), Gains(2)), Full(3)])
def test_kernels_may_lie_channels_last(sets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3),
                        nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    model = stirred(DPI(net, sets=sets))
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    s = torch.tensor([1., 300, 300, 999], dtype=torch.float64)
    want = model(x, s), model(x, 300.)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    for got, y in zip((model(x, s), model(x, 300.)), want):
        torch.testing.assert_close(got, y)
        got.sum().backward()
    torch.testing.assert_close(model.freeze_at(300.)(x), want[1])


def test_parts_that_share_a_layer_share_its_plain_run():
    from dpi_nbdev.cost import torch_flops
    torch.manual_seed(0)
    net = lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x, s = torch.zeros(3, 4, 8, 8, device="meta"), torch.arange(3, device="meta")
    count = lambda model: torch_flops(model.to("meta"), x, s)
    full, both = count(DPI(net())), count(DPI(net(), sets=(Full(2), Gains(2))))
    once = 2 * 3 * 36 * 8 * 4 * 9        # the gained layer, on three samples
    assert full <= both < full + once / 10


@pytest.mark.parametrize("sets, init, complaint", [
    ((Gains(1), Gains(2)), "copy", "names a kind twice"), ((), "copy", "sets must be"),
    (Gains, "copy", "sets must be"), (LowRank(2), "fresh", "is for full sets"),
    (Full(3), ["copy"], "1 start")])
def test_what_makes_no_sense_is_refused(sets, init, complaint):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    with pytest.raises((TypeError, ValueError), match=complaint):
        DPI(net, sets=sets, init=init)
    with pytest.raises(ValueError, match="no λ at all"):
        DPI(net, [])


def test_kinds_may_have_selections_and_starts_of_their_own():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    model = DPI(net, sets=(Full(2), Gains(1)), init="fresh",
                select={Full: "2.*", Gains: "0.weight"})
    full, gains = model.sets.parts
    assert full.names == ["2.weight", "2.bias"] and gains.names == ["0.weight", "0.bias"]
    assert not torch.equal(full.trees[0].get_parameter("2.weight"), net[2].weight)


@pytest.mark.parametrize("sets", [Gains(2), LowRank(2), Full(3), (Full(2), Gains(1))])
def test_a_network_is_mixed_again_in_place_as_it_was_mixed_first(sets):
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
        model = stirred(DPI(net, sets=sets)).to(dtype)
        kept = model.freeze_at(300.)
        assert model.freeze_at(700., into=kept) is kept
        for p, q in zip(kept.parameters(), model.freeze_at(700.).parameters()):
            assert p.dtype == dtype and torch.equal(p, q)


@pytest.mark.parametrize("sets", [Gains(2), LowRank(2)])
def test_autocast_does_not_reach_into_the_mixing(sets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = stirred(DPI(net, sets=sets)).float()
    w = model.weigh(torch.tensor([[300.]]))[0]
    plain = model.sets.at(w)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.sets.at(w)
    for name, p in plain.items():
        torch.testing.assert_close(low[name], p, rtol=1e-6, atol=1e-6)


def test_a_small_layer_gets_its_own_rank():
    model = DPI(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)),
                sets=LowRank(4))
    shapes = {n: tuple(p.shape) for n, p in model.down.named_parameters()}
    assert shapes == {"0.weight": (4, 4, 3, 3), "2.weight": (1, 8, 3, 3)}


@pytest.mark.parametrize("sets, formula", [(Gains(2), gained), (LowRank(2, 2), low_rank)])
def test_what_lean_sets_do_not_know_is_mixed_also_where_nothing_is_compared(sets, formula):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 4))
    model = stirred(DPI(net, sets=sets, select="*", check=False))
    x = torch.randn(5, 4, dtype=torch.float64)
    s = torch.tensor([0, 200., 200, 700, 999]).double()
    assert model.plan(s) == "vmap"
    torch.testing.assert_close(model(x, s), by_hand(model, x, s, formula))


def test_how_a_gained_layer_runs_depends_on_its_shape_and_layout():
    layer = nn.Conv2d(4, 4, 3)
    further = ways.ParameterSets(layer, [Gains(2).make(layer, "weight")]).further()
    held = ways.Held(layer, {leaf: leaf for leaf in further}, further)
    shared = ways.Weights.of_groups(torch.rand(2, 2), [32, 32])
    large, small = torch.ones(64, 4, 32, 32), torch.ones(64, 4, 3, 3)
    assert ways._cheapest(layer, held, shared, large) == "own"
    assert ways._cheapest(layer, held, shared, small) == "beside"     # groups never pay
    last = large.to(memory_format=torch.channels_last)
    assert ways._cheapest(layer, held, shared, last) == "beside"


def test_a_group_norm_is_as_it_was_and_keeps_the_order_of_pixels():
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    model = stirred(DPI(norm, sets=Gains(2)))
    x, s = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.tensor([1., 300, 999])
    want = by_hand(model, x, s.double(), gained)
    for order in (torch.contiguous_format, torch.channels_last):
        y = model(x.to(memory_format=order), s.double())
        torch.testing.assert_close(y, want)
        assert norm.num_groups == 2 and y.is_contiguous(memory_format=order)
