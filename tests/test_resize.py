"""Kernels for other resolutions: what the notebook has no room for."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpi_nbdev import ADM, DPI, DRUNet, Full, Gains, LowRank, LinearLambda, MonotoneLambda, TMap, load_model, save_model
from dpi_nbdev.resize import (
    MODES,
    Axis,
    StepLambda,
    kernel_matrix,
    reduction,
    resize_kernels,
    resize_report,
    resized_axis,
    slide,
)

EXACT = ("matched", "hat", "nearest", "dilate")


def repeated(x, s):
    for axis in range(2, x.ndim):
        x = x.repeat_interleave(s, axis)
    return x


# -- taps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("scale", [1, 1.25, 1.5, 2, 2.5, 3, 4, 0.5])
def test_columns_have_sum_one_and_the_mean_of_the_stretched_tap(mode, scale):
    for k, stride, turned, dilation in itertools.product((1, 2, 3, 4), (1, 2, 3), (False, True), (1, 2)):
        axis = Axis(k, stride, k // 2, k // 2, dilation, turned)
        new = resized_axis(axis, float(scale), mode)
        assert torch.allclose(new.matrix.sum(0), torch.ones(k).double(), atol=1e-9)
        at = new.dilation * torch.arange(len(new.matrix)).double() - new.padding - axis.centre(scale)
        mean = (new.matrix * at[:, None]).sum(0)
        assert torch.allclose(mean, axis.places(scale), atol=1e-6), (axis, new)


@pytest.mark.parametrize("mode", EXACT)
def test_scale_one_changes_nothing(mode):
    for net in (nn.Conv2d(1, 2, 3, 2, 1), nn.ConvTranspose2d(1, 2, 3, 2, 1, output_padding=1), nn.Conv1d(1, 2, 4, dilation=2)):
        same = resize_kernels(net, 1, mode)
        assert torch.equal(same.weight, net.weight) and same.kernel_size == net.kernel_size


def test_hat_taps_sum_to_the_scale_times_the_original_and_customary_ones_do_not():
    for k, s in itertools.product((1, 3, 4, 5), (2, 3, 4)):
        kernel = torch.randn(k).double()
        assert torch.isclose((s * kernel_matrix(k, s, "hat") @ kernel).sum(), s * kernel.sum())
    assert (kernel_matrix(3, 2, "align-corners").sum(0) - 1).abs().max() > 0.2


def test_matched_is_the_best_of_its_size_for_the_images_it_assumes():
    "No small change that keeps sum and mean lowers the expected error."
    s, rho, n = 2, 0.9, 64
    K = kernel_matrix(3, s, "matched", rho=rho)
    cov = rho ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    D, kernel = reduction(n // s, n), torch.randn(3).double()

    def rows(matrix, kernel, size):
        "The convolution as a matrix, without its border."
        taps, out = matrix @ kernel, torch.zeros(size, size).double()
        side = len(taps) // 2
        for i in range(side, size - side):
            out[i, i - side:i + side + 1] = taps
        return out

    up = F.interpolate(torch.eye(n // s).double()[None], scale_factor=s, mode="linear")[0].T
    aim = up @ rows(torch.eye(3).double(), kernel, n // s) @ D

    def error(matrix):
        off = (rows(matrix, kernel, n) - aim)[8:-8]
        return (off @ cov * off).sum()

    best, g = error(K), torch.Generator().manual_seed(0)
    u = torch.arange(7).double() - 3
    for _ in range(20):
        change = 0.02 * torch.randn(7, 3, generator=g).double()
        for basis in (torch.ones(7).double(), u):
            change = change - basis[:, None] * (basis @ change) / basis.square().sum()
        assert error(K + change) > best
    assert best < error(kernel_matrix(3, s, "hat"))


# -- layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sizes_are_multiplied_whatever_the_layer(mode, dims):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    turned = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
    mean = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
    layers = [conv(2, 4, 3, padding=1, groups=2), conv(2, 2, 2, 2), conv(2, 2, 3, 2, 1), conv(2, 2, 3, 1, 2, 2), conv(2, 2, 4, 2, 1),
              turned(2, 4, 2, 2, groups=2), turned(2, 2, 3, 2, 1, output_padding=1), turned(2, 2, 4, 2, 1), turned(2, 2, 3, 1, 1),
              pool(2), pool(3, 2, 1), mean(2), mean(3, 2, 1)]
    for layer, s in itertools.product(layers, (2, 3)):
        x = torch.randn(1, 2, *[8] * dims)
        small, large = layer(x), resize_kernels(layer, s, mode)(repeated(x, s))
        assert large.shape[2:] == tuple(s * n for n in small.shape[2:]), (layer, s)


def test_a_grown_pool_keeps_constants_and_does_not_shift():
    x = torch.full((1, 1, 16, 16), 0.3)
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)):
        assert torch.allclose(resize_kernels(pool, 2)(x), torch.full((1, 1, 8, 8), 0.3))
    ramp = torch.arange(32.).expand(1, 1, 32, 32)
    small, large = nn.AvgPool2d(2)(ramp[..., :16, :16] * 2 + 0.5), resize_kernels(nn.AvgPool2d(2), 2)(ramp)
    assert torch.allclose(F.avg_pool2d(large, 2)[..., 2:-2, 2:-2], small[..., 2:-2, 2:-2])


def test_padding_layers_upsampling_and_norms():
    net = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Upsample(size=(12, 12)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    large = resize_kernels(net.eval(), 2)
    assert large[0].padding == (2, 2, 2, 2) and large[3].size == (24, 24)
    assert large[1](large[0](torch.zeros(1, 1, 12, 12))).shape == (1, 2, 12, 12)
    assert large(torch.randn(1, 1, 12, 12)).shape == (1, 3)
    with pytest.raises(ValueError, match="would have 1.5 pixels"):
        resize_kernels(net, 1.5)


def test_padding_modes_are_kept_and_go_round_at_the_border():
    conv, x = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular").double(), torch.randn(1, 1, 8, 8).double()
    large = resize_kernels(conv, 2, "nearest")
    bigger = F.interpolate(F.pad(conv(x), [2] * 4, mode="circular"), scale_factor=2, mode="bilinear")[..., 4:-4, 4:-4]
    assert torch.allclose(large(repeated(x, 2)), bigger)


def test_select_gives_each_layer_its_scale_and_report_says_so():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2))
    sizes = lambda **how: [m.kernel_size[0] for m in resize_kernels(net, 2, "hat", **how) if isinstance(m, nn.Conv2d)]
    assert sizes() == [7, 7]
    assert sizes(select="0") == sizes(select=["0"]) == sizes(select=lambda name, m: name == "0") == [7, 3]
    assert sizes(select={"0": 3}) == [11, 7] and sizes(select={"0": 1}) == [3, 7] and sizes(select=nn.Conv2d) == [7, 7]
    rows = resize_report(net, 2, select="0")
    assert [(r.name, r.changed) for r in rows] == [("0", True), ("2", False), ("3", False)]
    with pytest.raises(TypeError, match="select must be None"):
        resize_kernels(net, 2, select=3)
    with pytest.raises(ValueError, match="select names 'nothing'"):
        resize_kernels(net, 2, select="nothing")


class Net(nn.Module):
    "Pools to one pixel, or flattens, as it is told."
    def __init__(self, pooled):
        super().__init__()
        self.conv, self.pooled, self.fc = nn.Conv2d(1, 4, 3, padding=1), pooled, nn.Linear(4 if pooled else 64, 3)
        self.more = nn.Linear(3, 12)

    def forward(self, x):
        y = self.conv(x).relu()
        y = F.adaptive_avg_pool2d(y, 1) if self.pooled else F.adaptive_avg_pool2d(y, 4) if self.pooled is None else y
        return self.more(self.fc(y.flatten(1)))


def test_flattened_maps_are_seen_on_an_example_and_pooled_ones_left():
    x = torch.randn(1, 1, 4, 4)
    large = resize_kernels(Net(False), 2, example=x)
    assert large.fc.in_features == 4 * 64 and large.more.in_features == 3
    assert large(torch.randn(2, 1, 8, 8)).shape == (2, 12)
    assert resize_kernels(Net(True), 2, example=x).fc.in_features == 4
    fixed = resize_kernels(Net(None), 2, example=x)   # pooled to 4×4, whatever comes
    assert fixed.fc.in_features == 64 and fixed(torch.randn(2, 1, 8, 8)).shape == (2, 12)
    with pytest.raises(ValueError, match="may be a flattened map"):
        resize_kernels(Net(False), 2)
    with pytest.raises(ValueError, match="does not run on the example"):
        resize_kernels(Net(False), 2, example=torch.randn(1, 2, 4, 4))
    assert resize_kernels(Net(True), 2, flat={"fc": None, "more": None}).fc.in_features == 4


def test_tied_layers_stay_tied_and_shared_modules_are_resized_once():
    one = nn.Conv2d(2, 2, 3, padding=1)
    net = nn.Sequential(one, nn.ReLU(), one, nn.Conv2d(2, 2, 3, padding=1))
    net[3].weight = one.weight
    large = resize_kernels(net, 2)
    assert large[0] is large[2] and large[3].weight is large[0].weight and large[0].kernel_size == (7, 7)


def test_strange_layers_are_refused_or_left_out():
    class Own(nn.Conv2d):
        def forward(self, x): return super().forward(F.pad(x, (1, 1, 1, 1)))
    net = nn.Sequential(Own(1, 2, 3), nn.LayerNorm((2, 8, 8)))
    with pytest.raises(ValueError, match="unknown kind .Own"):
        resize_kernels(net, 2)
    with pytest.raises(ValueError, match="unknown kind .LayerNorm"):
        resize_kernels(net, 2, select={"0": 1})
    assert resize_kernels(net, 2, select={"0": 1, "1": 1})[0].kernel_size == (3, 3)
    with pytest.raises(ValueError, match="makes a map out of a vector"):
        resize_kernels(nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4))), 2)
    with pytest.raises(TypeError, match="an nn.Module"):
        resize_kernels(lambda x: x, 2)


@pytest.mark.parametrize("new_order", [True, False])
def test_attention_of_an_adm_is_scaled_in_its_queries_only(new_order):
    net = ADM(1, 1, width=32, multipliers=(1, 2), attention_at=(4,), image_size=8, head_channels=32, new_attention_order=new_order)
    large = resize_kernels(net, 2, attention=True, example=torch.zeros(1, 1, 8, 8))
    block, other = net.middle_block[1], large.middle_block[1]
    by = math.sqrt(math.log(64) / math.log(16))
    x = torch.randn(1, 64, 4, 4)
    split = lambda b: b.qkv(b.norm(x.flatten(2))).unflatten(1, (3, 2, 32) if new_order else (2, 3, 32))
    a, b = (split(m) if new_order else split(m).transpose(1, 2) for m in (block, other))
    assert torch.allclose(b[:, 0], by * a[:, 0], atol=1e-5) and torch.allclose(b[:, 1:], a[:, 1:], atol=1e-5)
    told = resize_kernels(net, 2, attention={"middle_block.1": 16})
    assert torch.equal(told.middle_block[1].qkv.weight, other.qkv.weight)
    with pytest.raises(ValueError, match="above 1"):
        resize_kernels(net, 2, attention={"middle_block.1": 1})


def test_positions_of_other_shapes():
    class Grid(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.pos = nn.Parameter(torch.randn(shape))
        def forward(self, x): return x + self.pos
    for shape, new in (((1, 3, 4, 4), (1, 3, 8, 8)), ((16, 3), (64, 3)), ((1, 18, 3), (1, 66, 3))):
        net = Grid(shape)
        large = resize_kernels(net, 2, grids={"pos": (4, 4)})
        assert large.pos.shape == new
    assert torch.equal(large.pos[:, :2], net.pos[:, :2])
    with pytest.raises(ValueError, match="may be spatial"):
        resize_kernels(net, 2)
    with pytest.raises(ValueError, match="has no grid"):
        resize_kernels(net, 2, grids={"pos": (9, 9)})
    table = nn.Sequential(nn.Embedding(16, 3))
    assert resize_kernels(table, 2, grids={"0.weight": (4, 4)})[0].num_embeddings == 64


# -- DPI models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sets", [Full(2), Full(3), Gains(2), LowRank(3), LowRank(2, 2), (Full(2), LowRank(2))], ids=repr)
def test_resizing_commutes_with_dpi_for_layers_of_all_kinds(sets):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, groups=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 2, 2, groups=2),
                        nn.MaxPool2d(3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.Flatten(), nn.Linear(4 * 16, 5))
    model = DPI(net, MonotoneLambda(7, curves=sum(k.curves for k in (sets if isinstance(sets, tuple) else (sets,)))), sets=sets).double()
    with torch.no_grad():
        for part in model.sets.parts:
            for p in (p for tree in part.trees for p in tree.parameters()):
                p.add_(0.2 * torch.randn_like(p))
    how = dict(flat={"7": (4, 4, 4)})
    large, x = resize_kernels(model, 2, "hat", **how), torch.randn(3, 1, 16, 16).double()
    assert large.size == sum(p.numel() for p in large.sets.first().values())
    for s in (0, 500.5, 999):
        want = resize_kernels(model.freeze_at(s), 2, "hat", **how)
        for (name, a), b in zip(want.named_parameters(), large.freeze_at(s).parameters()):
            assert torch.allclose(a, b, atol=1e-12), name
        assert torch.allclose(large(x, s), want(x), atol=1e-10)
    each = torch.tensor([3., 400, 999])
    y = large(x, each)
    y.sum().backward()
    assert all(p.grad is not None for p in large.lam.parameters())
    assert torch.allclose(y[1:2], large(x[1:2], 400.), atol=1e-10)


def test_a_wrapped_dpi_model_is_resized_inside_and_conditionings_too():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DPI(DRUNet(1, 1, widths=(4, 8), n_blocks=1))
        def forward(self, x, s): return x - self.inner(x, s)
    outer = Outer()
    large = resize_kernels(outer, 2)
    assert large.inner.net.m_head.kernel_size == (7, 7) and outer.inner.net.m_head.kernel_size == (3, 3)
    assert large(torch.randn(1, 1, 8, 8), 3.).shape == (1, 1, 8, 8)
    assert resize_kernels(outer, 2, select="inner.net.m_body*").inner.net.m_head.kernel_size == (3, 3)
    mapped = resize_kernels(TMap(DRUNet(2, 1, widths=(4, 8), n_blocks=1)), 2)
    assert mapped(torch.randn(2, 1, 8, 8), 7.).shape == (2, 1, 8, 8)


def test_twice_two_is_saved_as_well_as_four(tmp_path):
    model = DPI(DRUNet(1, 1, widths=(4, 8), n_blocks=1), MonotoneLambda(9, curves=2), sets=(Full(2), Gains(1)))
    with pytest.raises(ValueError):
        resize_kernels(model, -1)
    twice = resize_kernels(resize_kernels(model, 2, select="m_body*"), 2, "dilate")
    save_model(tmp_path, twice)
    again, x = load_model(tmp_path), torch.randn(1, 1, 16, 16)
    assert torch.equal(again(x, 40.), twice.eval()(x, 40.))
    assert [c["mode"] for c in again.net.resized["calls"]] == ["matched", "dilate"]
    large = resize_kernels(again, 2)   # what was loaded can be resized on
    assert large.net.m_body[0].res[0].kernel_size[0] > 7


# -- sliding ---------------------------------------------------------------------------------------------


def test_a_slide_learns_its_curve_alone():
    net = DRUNet(1, 1, widths=(4, 8), n_blocks=1)
    model = slide(net, 2, MonotoneLambda(11))
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lam.phi")
    model(torch.randn(2, 1, 8, 8), 300.).square().mean().backward()
    assert model.lam.phi.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", EXACT)
def test_a_slide_ends_at_both_networks_in_every_mode(mode):
    torch.manual_seed(1)
    net, x = DRUNet(1, 1, widths=(4, 8), n_blocks=1).double(), torch.randn(1, 1, 8, 8).double()
    model = slide(net, 2, mode=mode)
    assert torch.allclose(model(x, 0.), net(x)) and torch.allclose(model(x, 999.), resize_kernels(net, 2, mode)(x))


def test_bad_slides():
    net = DRUNet(1, 1, widths=(4, 8), n_blocks=1)
    with pytest.raises(ValueError, match="noise_at"):
        slide(net, 2, noise_at="left")
    with pytest.raises(ValueError, match="of one scalar"):
        slide(DPI(net, [LinearLambda(), LinearLambda()]), 2)
    with pytest.raises(ValueError, match="the step must be above 0"):
        StepLambda(0)
    with pytest.raises(ValueError, match="does not fit into the resized"):
        slide(nn.Conv2d(1, 1, 5, padding=2), 0.5)
    with pytest.raises(ValueError, match="images of different sizes"):
        slide(nn.Conv2d(1, 1, 3), 2)
    assert StepLambda(5, 0, 9)(torch.tensor([4.9, 5., 9])).tolist() == [0, 1, 1]


def test_strides_that_do_not_divide_need_an_example_and_then_fit():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 2, 2))
    for n in (17, 18, 21, 23, 30, 31):
        small = net(torch.randn(1, 1, n, n))
        for s, mode in itertools.product((2, 3), EXACT):
            large = resize_kernels(net, s, mode, example=torch.randn(1, 1, n, n))
            assert large(torch.randn(1, 1, s * n, s * n)).shape[2:] == tuple(s * k for k in small.shape[2:]), (n, s, mode)


def test_queries_of_an_attention_of_ones_own_are_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        def forward(self, x):
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
    net = Attention()
    large = resize_kernels(net, 2, attention={"q": 16})
    by = math.sqrt(math.log(64) / math.log(16))
    assert torch.allclose(large.q.weight, by * net.q.weight) and torch.allclose(large.q.bias, by * net.q.bias)
    assert torch.equal(large.k.weight, net.k.weight)
    with pytest.raises(ValueError, match="computes no queries"):
        resize_kernels(nn.Sequential(nn.ReLU()), 2, attention={"0": 16})


@pytest.mark.parametrize("layers, message", [
    ({"nothing": dict(values={}, shapes={})}, "'nothing' is not part of it"),
    ({"m_head": dict(values={"forward": 1}, shapes={})}, "has a size 'forward', which is unknown")])
def test_a_saved_note_of_what_is_not_there_is_refused(layers, message):
    from dpi_nbdev.build import _rebuild
    node = {"type": "DRUNet", "in_channels": 1, "out_channels": 1, "widths": [4, 8], "n_blocks": 1, "resized": dict(calls=[], layers=layers)}
    with pytest.raises(ValueError, match=message):
        _rebuild(node)


def test_gains_for_each_position_and_unknown_sets_are_refused():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.randn(16, 3))
        def forward(self, x): return x + self.pos
    model = DPI(Grid(), MonotoneLambda(5), sets=Gains(1), select="pos")
    with pytest.raises(ValueError, match="has gains for each position"):
        resize_kernels(model, 2, grids={"net.pos": (4, 4)})
    assert resize_kernels(DPI(Grid(), MonotoneLambda(5)), 2, grids={"pos": (4, 4)}).theta()[1]["pos"].shape == (64, 3)
    low = DPI(Grid(), MonotoneLambda(5), sets=LowRank(2))
    assert resize_kernels(low, 2, grids={"pos": (4, 4)}).theta()[1]["pos"].shape == (64, 3)
