"""Extractors: the Inception network against torch-fidelity's and against one written from its names alone, files that must not pass, streaming, and the digit network in other processes."""
import hashlib
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from independent import ANSWERS, SIZES, image, shown, weights as formula_weights

from dpi_nbdev import features
from dpi_nbdev.features import DigitFeatures, Features, Inception, InceptionV3, PhotoFeatures, PixelFeatures, extract, resize_tf1

# ---------------------------------------------------------------- the published file: every name and shape, written out from its rules


def convolutions():
    "name -> (out, in, rows, columns) of all 94."
    c = {"Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
         "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3)}
    for block, i, p in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        c |= {f"{block}.branch1x1": (64, i, 1, 1), f"{block}.branch5x5_1": (48, i, 1, 1), f"{block}.branch5x5_2": (64, 48, 5, 5),
              f"{block}.branch3x3dbl_1": (64, i, 1, 1), f"{block}.branch3x3dbl_2": (96, 64, 3, 3), f"{block}.branch3x3dbl_3": (96, 96, 3, 3),
              f"{block}.branch_pool": (p, i, 1, 1)}
    c |= {"Mixed_6a.branch3x3": (384, 288, 3, 3), "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1), "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3), "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3)}
    for block, n in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        c |= {f"{block}.branch1x1": (192, 768, 1, 1), f"{block}.branch7x7_1": (n, 768, 1, 1), f"{block}.branch7x7_2": (n, n, 1, 7), f"{block}.branch7x7_3": (192, n, 7, 1),
              f"{block}.branch7x7dbl_1": (n, 768, 1, 1), f"{block}.branch7x7dbl_2": (n, n, 7, 1), f"{block}.branch7x7dbl_3": (n, n, 1, 7),
              f"{block}.branch7x7dbl_4": (n, n, 7, 1), f"{block}.branch7x7dbl_5": (192, n, 1, 7), f"{block}.branch_pool": (192, 768, 1, 1)}
    c |= {"Mixed_7a.branch3x3_1": (192, 768, 1, 1), "Mixed_7a.branch3x3_2": (320, 192, 3, 3), "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1),
          "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7), "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1), "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3)}
    for block, i in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        c |= {f"{block}.branch1x1": (320, i, 1, 1), f"{block}.branch3x3_1": (384, i, 1, 1), f"{block}.branch3x3_2a": (384, 384, 1, 3), f"{block}.branch3x3_2b": (384, 384, 3, 1),
              f"{block}.branch3x3dbl_1": (448, i, 1, 1), f"{block}.branch3x3dbl_2": (384, 448, 3, 3), f"{block}.branch3x3dbl_3a": (384, 384, 1, 3),
              f"{block}.branch3x3dbl_3b": (384, 384, 3, 1), f"{block}.branch_pool": (192, i, 1, 1)}
    return c


def published_shapes():
    "name -> shape of everything in the file."
    out = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convolutions().items():
        out[f"{name}.conv.weight"] = shape
        out |= {f"{name}.bn.{k}": (shape[0],) for k in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.bn.num_batches_tracked": ()}
    return out


def random_state(seed=0):
    "Random weights under the published names; variances that keep a signal alive."
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes().items():
        if name.endswith("tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 0.5 + torch.rand(shape, generator=g)
        else:
            state[name] = torch.randn(shape, generator=g) * ((2 / torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 0.1)
    return state


def inception_reference(w, x):
    "pool, spatial, logits from the weights `w` and x (B, 3, 299, 299): the computation written down block by block, in another way than the class."
    def conv(name, x, stride=1, valid=False):
        k = w[f"{name}.conv.weight"]
        y = F.conv2d(x, k, stride=stride, padding=0 if valid or stride == 2 else (k.shape[2] // 2, k.shape[3] // 2))
        scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + 1e-3).sqrt()
        shift = w[f"{name}.bn.bias"] - w[f"{name}.bn.running_mean"] * scale
        return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp(min=0)

    def mean3(x):  # the sum over the pixels that are there, divided by their number
        total = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=True) * 9
        return total(x) / total(torch.ones_like(x[:1, :1]))

    def max3(x):
        return F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))

    def shrink(x):
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))

    def run(x, *names):
        for name in names:
            x = conv(name, x)
        return x
    x = conv("Conv2d_1a_3x3", x, stride=2)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, valid=True))
    x = shrink(x)
    x = shrink(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), valid=True))
    for m in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat([run(x, f"{m}.branch1x1"), run(x, f"{m}.branch5x5_1", f"{m}.branch5x5_2"),
                       run(x, *(f"{m}.branch3x3dbl_{i}" for i in (1, 2, 3))), run(mean3(x), f"{m}.branch_pool")], 1)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2), conv("Mixed_6a.branch3x3dbl_3", run(x, "Mixed_6a.branch3x3dbl_1", "Mixed_6a.branch3x3dbl_2"), 2), shrink(x)], 1)
    for m in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        first = run(x, f"{m}.branch1x1")
        if m == "Mixed_6d":
            spatial = torch.stack([first[:, c] for c in range(7)], -1).reshape(len(x), -1)
        x = torch.cat([first, run(x, *(f"{m}.branch7x7_{i}" for i in (1, 2, 3))), run(x, *(f"{m}.branch7x7dbl_{i}" for i in range(1, 6))), run(mean3(x), f"{m}.branch_pool")], 1)
    m = "Mixed_7a"
    x = torch.cat([conv(f"{m}.branch3x3_2", run(x, f"{m}.branch3x3_1"), 2), conv(f"{m}.branch7x7x3_4", run(x, *(f"{m}.branch7x7x3_{i}" for i in (1, 2, 3))), 2), shrink(x)], 1)
    for m, pool in (("Mixed_7b", mean3), ("Mixed_7c", max3)):
        a, b = run(x, f"{m}.branch3x3_1"), run(x, f"{m}.branch3x3dbl_1", f"{m}.branch3x3dbl_2")
        x = torch.cat([run(x, f"{m}.branch1x1"), run(a, f"{m}.branch3x3_2a"), run(a, f"{m}.branch3x3_2b"),
                       run(b, f"{m}.branch3x3dbl_3a"), run(b, f"{m}.branch3x3dbl_3b"), run(pool(x), f"{m}.branch_pool")], 1)
    pool = x.flatten(2).mean(2)
    return pool, spatial, F.linear(pool, w["fc.weight"])


def save(state, folder, legacy=False):
    "A weights file with its hash in its name, as published."
    draft = folder / "draft"
    torch.save(state, draft, _use_new_zipfile_serialization=not legacy)
    path = folder / f"random-{hashlib.sha256(draft.read_bytes()).hexdigest()[:8]}.pth"
    return draft.rename(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "(state, its file in the older format that the published file has)."
    state = random_state()
    return state, save(state, tmp_path_factory.mktemp("weights"), legacy=True)


def test_every_name_and_shape():
    with torch.device("meta"):
        have = {k: tuple(v.shape) for k, v in InceptionV3().state_dict().items()}
    assert have == published_shapes()
    assert len(convolutions()) == 94 and len(have) == 566
    count = sum(torch.Size(s).numel() for k, s in have.items() if "running" not in k and "tracked" not in k)
    assert count == 23_850_960


def test_inception_agrees_with_the_reference(weights):
    state, path = weights
    extractor = Inception(path)
    images = torch.randint(256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    passes = []
    hook = extractor.net.register_forward_hook(lambda *_: passes.append(1))
    out = extract(extractor, images, progress=False)
    hook.remove()
    assert len(passes) == 1 and extractor.name == path.stem and not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())
    with torch.no_grad():
        expected = inception_reference(state, (resize_tf1(images.float(), 299) - 128) / 128)
    for name, a, b, width in zip(out._fields, out, expected, (2048, 2023, 1008)):
        assert a.shape == (1, width) and b.std() > 0.1, name
        assert (a - b).abs().max() < 2e-4 * b.abs().max(), name


def furthest(net, images, answers):
    "By kind of feature: the largest difference to torch-fidelity's answers, relative to the largest of them."
    with torch.no_grad():
        out = net((images - 128) / 128)
    return {k: ((shown(v[0]) - (want := torch.tensor(answers[k]))).abs().max() / want.abs().max()).item() for k, v in out._asdict().items()}


def test_inception_agrees_with_torch_fidelity():
    "Weights and images made by a formula; the answers are torch-fidelity's, stored. Every mistake that evaluations have made before shows."
    answers = json.loads(ANSWERS.read_text(encoding="utf-8"))["answers"]
    net = InceptionV3().eval()
    net.load_state_dict(formula_weights(published_shapes()))
    for size in SIZES:
        gaps = furthest(net, resize_tf1(image(*size).float(), 299), answers["{}×{}".format(*size)])
        assert max(gaps.values()) < 2e-5, (size, gaps)
    want = answers["32×32"]
    half_pixel = F.interpolate(image(32, 32).float(), size=(299, 299), mode="bilinear", align_corners=False)
    assert min(furthest(net, half_pixel, want).values()) > 1e-3
    images = resize_tf1(image(32, 32).float(), 299)
    net.Mixed_7c.pool, right = net.Mixed_7b.pool, net.Mixed_7c.pool                               # the average in the last block, as in the paper
    assert furthest(net, images, want)["pool"] > 1e-3
    net.Mixed_7c.pool = right
    net.Mixed_5b.pool = torch.nn.AvgPool2d(3, 1, 1)                                               # padding counted
    assert min(furthest(net, images, want).values()) > 1e-3


def test_files_that_must_not_pass(weights, tmp_path):
    state, path = weights
    with pytest.raises(FileNotFoundError) as e:
        Inception(tmp_path / features.INCEPTION_FILE)
    for says in (features.INCEPTION_FILE, features.INCEPTION_SHA256, features.INCEPTION_URL, "put it into any folder", "PhotoFeatures()", "DigitFeatures()", "PixelFeatures()"):
        assert says in str(e.value)
    assert features.INCEPTION_SHA256.startswith("6726825d") and features.INCEPTION_FILE.endswith("-6726825d.pth")
    with pytest.raises(FileNotFoundError, match="that is a folder"):
        Inception(tmp_path)
    (tmp_path / features.INCEPTION_FILE).write_bytes(b"an error page")
    with pytest.raises(ValueError, match="by its name its SHA-256 begins with 6726825d, but it begins with"):
        Inception(tmp_path / features.INCEPTION_FILE)
    (tmp_path / "inception.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="keeps its published name"):
        Inception(tmp_path / "inception.pth")
    small = {k: v for k, v in state.items() if k.startswith("Conv2d") or k == "fc.bias"} | {"fc.bias": torch.zeros(1000), "AuxLogits.fc.bias": torch.zeros(1000)}
    with pytest.raises(ValueError) as e:
        Inception(save(small, tmp_path))
    missing = len(published_shapes()) - (len(small) - 1)
    assert f"in {missing + 2} places" in str(e.value) and str(e.value).count("missing: Mixed") == missing - 1
    assert "another shape: fc.bias is (1000,), should be (1008,)" in str(e.value) and "not part of the network: AuxLogits.fc.bias" in str(e.value)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    class Nasty:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    with pytest.raises(ValueError, match="only plain tensors"):
        Inception(save({"fc.bias": Nasty()}, tmp_path))
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- the resize


@pytest.mark.parametrize("n,m", [(1, 4), (2, 5), (3, 3), (4, 3), (7, 2), (64, 299), (299, 299), (512, 299)])
def test_resize_row_by_row(n, m):
    "One axis at a time, against numpy's interpolation at i·n/m with the end held."
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    at = np.arange(m) * n / m
    rows = np.stack([np.interp(at, np.arange(n), row) for row in x.numpy()])
    both = np.stack([np.interp(at, np.arange(n), column) for column in rows.T]).T
    np.testing.assert_allclose(resize_tf1(x, m).numpy(), both, atol=1e-12)


def test_resize_is_not_the_half_pixel_one():
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False)
    assert (resize_tf1(x, 32) - other).abs().max() > 0.1
    assert torch.equal(resize_tf1(x, 32)[..., ::4, ::4], x)                                          # old pixels stand at whole places
    ramp = torch.arange(8.).expand(1, 1, 8, 8)
    gap = resize_tf1(ramp, 32) - F.interpolate(ramp, size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(gap[..., 2:28], torch.tensor(0.5 * (1 - 8 / 32)))                          # the shift, away from the ends


# ---------------------------------------------------------------- streaming


class Counted:
    "An array of images that notes what is read from it."
    def __init__(self, n):
        self.shape, self.asked = (n, 16, 16, 3), []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        self.asked.append(np.asarray(rows))
        return np.broadcast_to(np.asarray(rows, np.uint8).reshape(-1, 1, 1, 1), (len(rows), *self.shape[1:]))


def test_each_image_is_read_once_and_never_more_than_a_batch():
    source = Counted(103)
    f = extract(lambda x: x.float().mean((2, 3)), source, batch_size=10, progress=False)
    assert max(map(len, source.asked)) == 10 and np.concatenate(source.asked).tolist() == list(range(103))
    assert f.pool[:, 0].tolist() == list(range(103))


def test_features_do_not_hold_on_to_images():
    "An extractor that returns a view of something large: only the view is kept."
    f = extract(lambda x: x.float().flatten(1)[:, :2], torch.zeros(64, 3, 32, 32, dtype=torch.uint8), batch_size=64, progress=False)
    assert f.pool.untyped_storage().nbytes() == 64 * 2 * 4
    once = torch.zeros(4, 2)
    def reuses(x):  # writes every answer into the same memory
        return once.copy_(x.float()[:, 0, 0, :2])
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 4, 4)
    assert extract(reuses, images, batch_size=4, progress=False).pool[:, 0].tolist() == list(range(8))


def test_read_only_memory_map_without_warning(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = extract(PhotoFeatures(), np.load(tmp_path / "x.npy", mmap_mode="r"), batch_size=8, progress=False)
    g = extract(PhotoFeatures(), torch.from_numpy(x).permute(0, 3, 1, 2), batch_size=20, progress=False)
    torch.testing.assert_close(f, g, rtol=1e-4, atol=1e-4)
    assert f.logits is None and f.pool.dtype == torch.float32


def test_bad_images_and_bad_features():
    ok = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    grow = lambda x: Features(torch.zeros(len(x), 3), spatial=torch.zeros(len(x), 2) if len(x) == 4 else None)
    with pytest.raises(ValueError, match=r"widths \{'pool': 3\} from image 4 on"):
        extract(grow, ok, batch_size=4, progress=False)
    with pytest.raises(ValueError, match="logits of image 5 contains NaN or infinity"):
        extract(lambda x: Features(torch.zeros(6, 1), logits=torch.tensor([0., 0, 0, 0, 0, torch.inf]).view(6, 1)), ok, progress=False)
    for bad, error, says in [(ok.float(), TypeError, "bytes"), (ok.numpy().astype(np.int64), TypeError, "got int64"), (ok.bool(), TypeError, "bool"), (ok.permute(0, 2, 3, 1), ValueError, "C = 1 or 3"),
                             (ok[:0], ValueError, "no images"), (5, TypeError, "got int"), ([ok, ok.float()], TypeError, "bytes"), (list(ok), ValueError, r"got shape \(3, 16, 16\)")]:
        with pytest.raises(error, match=says):
            extract(PixelFeatures(), bad, progress=False)
    for bad in (ok[:, :1], ok[..., :12]):
        with pytest.raises(ValueError, match="at least 16×16"):
            PhotoFeatures()(bad)


# ---------------------------------------------------------------- the digit network

WEIGHTS = """
import torch
torch.set_num_threads({threads}); torch.manual_seed({seed})
before = torch.get_rng_state()
with {context}:
    from dpi_nbdev.features import DigitFeatures
    net = DigitFeatures()
assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == {threads}
torch.save(net.state_dict(), {file!r})
"""


def test_the_digit_network_is_the_same_in_every_process(tmp_path):
    "Another process, random state and thread count: the weights agree to nine digits."
    file = str(tmp_path / "weights.pt")
    script = WEIGHTS.format(threads=2, seed=5, context="torch.inference_mode()", file=file)
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert there.returncode == 0, there.stderr
    weights = DigitFeatures().state_dict()
    torch.testing.assert_close(torch.load(file), weights, rtol=1e-9, atol=1e-9)


def test_digit_features_do_not_depend_on_the_batch():
    x = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    a, b = (extract(DigitFeatures(), x, batch_size=size, progress=False) for size in (50, 3))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # float32 rounds at 1.2e-7
