"""One More Step: the law of its start, what training makes of it, its file, and what it refuses."""
import pytest
import torch
from torch import nn

from dpi_nbdev.adm import ADM
from dpi_nbdev.build import build_model, load_model, save_model
from dpi_nbdev.conditioning import LabelMap
from dpi_nbdev.core import seeded
from dpi_nbdev.data import digits
from dpi_nbdev.diffusion import VPDiffusion
from dpi_nbdev.drunet import DRUNet
from dpi_nbdev.flow import FlowMatching, Interpolant, TwoSidedInterpolant
from dpi_nbdev.guidance import DropLabels
from dpi_nbdev.one_more_step import OneMoreStep, OneMoreStepLoss, SignalLeak
from dpi_nbdev.samplers import ddim, start_noise
from dpi_nbdev.training import TrainSettings, train

SHORT = VPDiffusion.scaled_linear(200)


class Picture(nn.Module):
    "Sees one picture for each label, whatever the noise."
    def __init__(self, pictures):
        super().__init__()
        self.pictures = pictures

    def forward(self, z, y):
        return -self.pictures[y]


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return OneMoreStep(LabelMap(DRUNet(4, 1, widths=(8, 16), n_blocks=1, **kw), classes=2))


def bright_and_dark(n):
    x = digits().train[:n]
    y = torch.arange(n) % 2
    return torch.where(y.view(-1, 1, 1, 1) == 1, -x, x), y


@pytest.mark.parametrize("process", [VPDiffusion(), VPDiffusion.scaled_linear(), SHORT, VPDiffusion.cosine(10)], ids=repr)
@pytest.mark.parametrize("s", [None, 5])
def test_the_start_has_the_law_of_the_theory(process, s):
    "N(√ᾱ μ_y, (1-ᾱ) I): the root, and once; uncorrelated between pixels and with z."
    mu = torch.tensor([[[[0.9, -0.3]]], [[[-1., 0.4]]]])
    n, y = 40_000, torch.arange(40_000) % 2
    z = start_noise(n, (1, 1, 2), seeded(0))
    x = OneMoreStep(Picture(mu)).start(z, process, y, s=s, generator=seeded(1))
    alpha_bar = process.alpha_bar[-1 if s is None else s].item()
    for k in (0, 1):
        v = x[y == k].flatten(1)
        torch.testing.assert_close(v.mean(0), alpha_bar**0.5 * mu[k].flatten(), atol=0.02, rtol=0)
        torch.testing.assert_close(v.T.cov(), (1 - alpha_bar) * torch.eye(2), atol=0.02, rtol=0)
    noise = x - alpha_bar**0.5 * mu[y]
    assert (noise * z).mean().abs() < 0.02 * max(1 - alpha_bar, 1e-3) ** 0.5


def test_the_root_is_taken_once():
    "At ᾱ = 0.3 the shares of other readings are far away."
    process = VPDiffusion.from_betas([0.1, 1 - 0.3 / 0.9])
    x = OneMoreStep(Picture(torch.zeros(1, 1, 8, 8))).start(torch.zeros(500, 1, 8, 8), process, torch.zeros(500, dtype=torch.long), generator=seeded(0))
    assert abs(x.var().item() - 0.7) < 0.02  # not 0.49 (no root), not 0.84 (twice)


def test_training_reaches_the_class_means_and_the_floor():
    x, y = bright_and_dark(600)
    objective = DropLabels(OneMoreStepLoss(), null=2, share=0.2)
    trained = train(small(), objective, (x, y), TrainSettings(steps=250, lr=4e-3), held_out=(x, y), progress=False)
    z = start_noise(64, (1, 8, 8), seeded(0))
    for k, rows in ((0, y == 0), (1, y == 1), (2, y >= 0)):
        with torch.no_grad():
            x0 = trained.model.guess(z, torch.full((64,), k))
        off = (x0.mean(0) - x[rows].mean(0)).square().mean().sqrt()
        assert off < (0.05 if k < 2 else 0.12), (k, off)
        assert x0.std(0).square().mean().sqrt() < 0.1  # the noise tells nothing
    floor = torch.stack([x[y == k].var(0).mean() for k in (0, 1)]).mean()
    assert 0.95 * floor < trained.held_out[-1][1] < 1.05 * floor


def test_a_run_is_the_same_in_parts_and_again():
    data = bright_and_dark(64)
    settings = dict(steps=6, batch_size=16)
    runs = [train(small(), OneMoreStepLoss(), data, TrainSettings(**settings, accumulate=k), progress=False) for k in (1, 1, 4)]
    first, again, parts = (torch.cat([p.flatten() for p in r.model.parameters()]) for r in runs)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, parts, atol=1e-4, rtol=1e-3)


def test_a_stopped_run_goes_on(tmp_path):
    data, objective = bright_and_dark(64), DropLabels(OneMoreStepLoss(), null=2)
    settings = TrainSettings(steps=6, batch_size=16, schedule="constant", warmup=0.)
    straight = train(small(), objective, data, settings, progress=False)
    train(small(), objective, data, TrainSettings(steps=3, batch_size=16, schedule="constant", warmup=0.), out=tmp_path, progress=False)
    resumed = train(small(seed=5), DropLabels(OneMoreStepLoss(), null=2), data, settings, out=tmp_path, progress=False)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("net", [
    lambda: LabelMap(DRUNet(4, 1, widths=(8, 16), n_blocks=1), classes=2),
    lambda: ADM(1, 1, width=32, multipliers=(1,), n_blocks=1, attention_at=(), head_channels=32, image_size=8, n_classes=2, null_label=True)],
    ids=["DRUNet", "ADM"])
def test_the_file_gives_it_back(net, tmp_path):
    torch.manual_seed(0)
    model = OneMoreStep(net()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    save_model(tmp_path / "m", model)
    back = load_model(tmp_path / "m")
    assert type(back) is OneMoreStep and repr(back) == repr(model)
    z, y = start_noise(4, (1, 8, 8), seeded(0)), torch.tensor([0, 1, 1, 2])
    starts = [m.start(z, SHORT, y, generator=seeded(1)) for m in (model, back)]
    assert torch.equal(*starts)


def test_without_labels_too(tmp_path):
    torch.manual_seed(0)
    model = OneMoreStep(DRUNet(1, 1, widths=(8, 16), n_blocks=1)).eval()
    save_model(tmp_path / "m", model)
    z = start_noise(3, (1, 8, 8), seeded(0))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m").guess(z), model.guess(z))
    x = torch.ones(8, 1, 8, 8)
    loss, values = OneMoreStepLoss()(model, x, seeded(0))
    assert loss.shape == () and values.shape == (8,) and loss.requires_grad
    assert torch.equal(OneMoreStepLoss()(model, x, seeded(0))[1], values)
    assert not torch.equal(OneMoreStepLoss()(model, x, seeded(1))[1], values)


def test_one_module_starts_any_model_and_sampler_steps_follow():
    "The frozen model is not asked, and stays as it was."
    model = build_model("drunet", "dpi", SHORT, classes=2, seed=0, in_channels=1, widths=(8, 16), n_blocks=1).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y, z = torch.tensor([0, 1]), start_noise(2, (1, 8, 8), seeded(0))
    x_T, seen = small().start(z, SHORT, y, generator=seeded(1)), []
    out = ddim(model, SHORT, x_T, 5, cond=y, progress=False, callback=lambda s, x: seen.append((s, x)))
    assert seen[0][0] == SHORT.noise_at and torch.equal(seen[0][1], x_T) and out.shape == z.shape
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_precision_and_batches():
    model, y = small().double(), torch.arange(4) % 2
    z = start_noise(4, (1, 8, 8), seeded(0)).double()
    whole = model.start(z, SHORT, y, generator=[seeded(k) for k in range(4)])
    assert whole.dtype == torch.float64
    one = torch.cat([model.start(z[k:k + 1], SHORT, y[k:k + 1], generator=[seeded(k)]) for k in range(4)])
    torch.testing.assert_close(whole, one)


@pytest.mark.parametrize("spread", ["none", "pixels", "low"])
def test_a_signal_leak_has_the_moments_that_it_was_asked_for(spread):
    torch.manual_seed(0)
    y = torch.arange(3000) % 2
    x = torch.randn(3000, 2, 4, 6) * 0.2 + torch.randn(3000, 1, 1, 1) + torch.where(y == 1, 0.5, -0.5).view(-1, 1, 1, 1)
    told = torch.full((20_000,), 1)
    leak = SignalLeak(x, y, spread)
    drawn = leak.start(torch.zeros(20_000, 2, 4, 6), SHORT, told, generator=seeded(0)) / SHORT.alpha_bar[-1].sqrt()
    of = x[y == 1]
    torch.testing.assert_close(drawn.mean(0), of.mean(0), atol=0.03, rtol=0)
    if spread == "none":
        assert drawn.std(0).max() < 1e-5
    if spread == "pixels":
        torch.testing.assert_close(drawn.std(0), of.std(0), atol=0.03, rtol=0)
        assert drawn.flatten(1).T.cov().triu(1).abs().max() < 0.06
    if spread == "low":  # brightness of both channels varies as in the data, and together
        light = [v.mean((2, 3)).T.cov() for v in (drawn, of)]
        torch.testing.assert_close(*light, atol=0.04, rtol=0)
        everything = SignalLeak(x, y, spread, low=6)  # all frequencies: all of the covariance
        drawn = everything.start(torch.zeros(20_000, 2, 4, 6), SHORT, told, generator=seeded(0)) / SHORT.alpha_bar[-1].sqrt()
        torch.testing.assert_close(drawn.flatten(1).T.cov(), of.flatten(1).T.cov(), atol=0.06, rtol=0)


def test_the_label_after_the_last_is_all_data():
    x, y = bright_and_dark(60)
    z, none = torch.zeros(3, 1, 8, 8), torch.full((3,), 2)
    torch.testing.assert_close(SignalLeak(x, y).start(z, SHORT, none), SignalLeak(x).start(z, SHORT))


Z, Y = torch.randn(6, 1, 8, 8), torch.arange(6) % 2


@pytest.mark.parametrize("process, error, message", [
    (FlowMatching(), ValueError, "no signal left at s = 0"),
    (Interpolant(), ValueError, "no signal left"),
    (SHORT.zero_terminal_snr(), ValueError, "no signal left at s = 199"),
    (TwoSidedInterpolant(), TypeError, "joins two data sets"),
    ("vp", TypeError, "needs a Process")], ids=str)
def test_where_there_is_nothing_to_repair(process, error, message):
    for way in (small(), SignalLeak(*bright_and_dark(60))):
        with pytest.raises(error, match=message):
            way.start(Z, process, Y)


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.start(Z, SHORT), ValueError, "wants a label"),
    (lambda m: m.start(Z, SHORT, Y[:4]), ValueError, "one row for each of the 6"),
    (lambda m: m.start(Z, SHORT, Y + 5), ValueError, r"labels must be in \[0, 2\]"),
    (lambda m: m.start(Z, SHORT, 1), ValueError, "one row for each of the 6"),
    (lambda m: m.start(torch.randn(6, 3, 8, 8), SHORT, Y), ValueError, "channels"),
    (lambda m: m.start(Z.long(), SHORT, Y), TypeError, "floating"),
    (lambda m: m.start(Z, SHORT, Y, s=200), ValueError, r"s must lie in \[0, 199\]"),
    (lambda m: m.start(Z, SHORT, Y, generator=[seeded(0)]), ValueError, "got 1 for 6"),
    (lambda m: OneMoreStep(DRUNet(1, 1, widths=(8,), n_blocks=1)).start(Z, SHORT, Y), TypeError, "an image and nothing beside it"),
    (lambda m: OneMoreStep(nn.Identity()).start(Z, SHORT, Y), ValueError, r"was given 1 condition\(s\)"),
    (lambda m: OneMoreStep(nn.Flatten()).start(Z, SHORT), ValueError, "must have one shape"),
    (lambda m: OneMoreStep(DRUNet), TypeError, "must be a torch.nn.Module"),
    (lambda m: OneMoreStepLoss()(m, Z), ValueError, "wants a label"),
    (lambda m: OneMoreStepLoss()(m, (Z, Y[:3])), ValueError, "one row for each of the 6"),
    (lambda m: OneMoreStepLoss()(m, Z.long()), TypeError, "floating"),
    (lambda m: OneMoreStepLoss()(OneMoreStep(nn.Flatten()), Z), ValueError, "must have one shape")])
def test_what_makes_no_sense_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(small())


def test_a_network_beside_ours_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="contains a Picture"):
        save_model(tmp_path / "m", OneMoreStep(Picture(torch.zeros(2, 1, 8, 8))))
