"""Labels, in data and in networks: where they are found, what is refused, and that models told a label are exact."""
import gzip
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpi_nbdev.adm import ADM, adm_stages
from dpi_nbdev.build import build_model, load_model, save_model
from dpi_nbdev.conditioning import (LabelMap, NCSNv2, SigmaMap, TimestepMLP, TMap, Unconditional, film,
                                    label_channels)
from dpi_nbdev.core import as_labels, seeded
from dpi_nbdev.data import ImageArray, ImageSplit, digits, idx_images, load_images
from dpi_nbdev.dpi import DPI, check_exact
from dpi_nbdev.drunet import DRUNet, OnesChannel
from dpi_nbdev.files import class_folders

# -- networks -----------------------------------------------------------------------

ADM_SMALL = dict(in_channels=1, width=32, multipliers=(1,), attention_at=(8,), head_channels=32,
                 image_size=8, dropout=0.)
DRUNET_SMALL = dict(in_channels=1, widths=(8, 16), n_blocks=1)
SMALL = {"adm": ADM_SMALL, "drunet": DRUNET_SMALL}
MODELS = [(b, c) for b in SMALL for c in ("dpi", "film", "t_map", "sigma_map", "ncsnv2", "mlp", "none")
          if (b, c) != ("drunet", "mlp")]
S = torch.tensor([0, 3, 250, 250, 700.5, 999], dtype=torch.float64)
Y = torch.tensor([0, 9, 3, 4, 10, 3])


def images(n=6, seed=0):
    return torch.randn(n, 1, 8, 8, generator=seeded(seed), dtype=torch.float64)


def moved(model, seed=0):
    "The model in double precision with every parameter somewhere, in eval mode."
    g = seeded(seed)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def built(backbone, conditioning, **kw):
    return moved(build_model(backbone, conditioning, classes=10, seed=0, **SMALL[backbone], **kw))


def small_net(channels=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 3, padding=1))


@pytest.mark.parametrize(("backbone", "conditioning"), MODELS)
def test_every_model_hears_each_sample_its_own_label(backbone, conditioning):
    model, x = built(backbone, conditioning), images()
    together = model(x, S, Y)
    for i in range(6):
        alone = model(x[i:i + 1], S[i], Y[i:i + 1])
        torch.testing.assert_close(together[i:i + 1], alone)
        torch.testing.assert_close(alone, model(x[i:i + 1], S[i], int(Y[i])))
    other = model(x, S, (Y + 1) % 11)
    assert ((other - together).abs().amax((1, 2, 3)) > 1e-4).all()
    torch.testing.assert_close(model(x, S, 7), model(x, S, torch.full((6,), 7)))
    torch.testing.assert_close(model(x, S, torch.tensor(7)), model(x, S, torch.full((6,), 7)))
    assert model(x[:0], S[:0], Y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("sets", ["full", "gains-4", "low-rank-2", "full+gains-2"])
@pytest.mark.parametrize("backbone", ["adm", "drunet"])
def test_dpi_is_exact_with_labels_for_all_sets(backbone, sets):
    model, x = built(backbone, "dpi", sets=sets), images()
    for y in (Y, 3, torch.tensor(10)):
        assert check_exact(model, x, S, y) < 1e-11
        assert torch.equal(model.freeze_at(250)(x, y), model(x, 250, y))


@pytest.mark.parametrize("way", ["layers", "vmap", "unique", "auto"])
@pytest.mark.parametrize("net", [lambda: LabelMap(small_net(), 10),
                                 lambda: ADM(**ADM_SMALL, out_channels=1, n_classes=10, null_label=True)],
                         ids=["LabelMap", "ADM"])
def test_gradients_reach_the_embedding_as_with_plain_networks(net, way):
    "Against the definition: each sample through a network with its own parameters mixed."
    model, x = moved(DPI(net(), init="fresh", granularity=way)), images()
    weights = torch.randn(6, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    (model(x, S, Y) * weights).sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theta0, theta1 = (dict(t.named_parameters()) for t in (model.net, model.theta1))
    lam, total = model.lam(S), 0
    for i in range(6):
        mixed = {n: torch.lerp(theta0[n], theta1[n], lam[i]) for n in theta0}
        bare = net().double().eval()
        y = torch.func.functional_call(bare, mixed, (x[i:i + 1], Y[i:i + 1]))
        total = total + (y * weights[i:i + 1]).sum()
    total.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, msg=n)
    table = next(n for n in got if n.startswith("net.") and n.endswith(("embedding.weight", "label_emb.weight")))
    heard = got[table].abs().sum(1) > 0
    assert heard.nonzero().flatten().tolist() == [0, 3, 4, 9, 10]


def test_a_label_map_inside_and_outside_of_a_conditioning():
    for model in (DPI(TMap(LabelMap(small_net(13), 10)), init="fresh"),
                  DPI(LabelMap(TMap(small_net(13)), 10), init="fresh")):
        assert check_exact(moved(model), images(), S, S, Y) < 1e-12
    outside = moved(LabelMap(DPI(small_net(), init="fresh"), 10))
    x = images()
    for i in range(6):
        torch.testing.assert_close(outside(x, S, Y)[i:i + 1], outside(x[i:i + 1], S[i], Y[i:i + 1]))


def test_one_hot_rows_make_a_label_map_planes_of_ones_and_zeros():
    model, x = LabelMap(nn.Identity(), 10), images()
    assert model.channels == label_channels(10) == 11
    with torch.no_grad(): model.embedding.weight.copy_(torch.eye(11))
    seen = model.double()(x, Y)
    assert torch.equal(seen[:, :1], x)
    planes = nn.functional.one_hot(Y, 11).double()[:, :, None, None].expand(-1, -1, 8, 8)
    assert torch.equal(seen[:, 1:], planes)
    assert label_channels(1000) == 16 and LabelMap(nn.Identity(), 10, 3).embedding.weight.shape == (11, 3)


def test_all_conditionings_hand_every_further_input_on():
    class Last(nn.Module):
        def forward(self, x, *inputs): return x + 2 * inputs[-2] + inputs[-1]

    x, table = images(), torch.linspace(0.1, 2, 1000)
    for model in (Unconditional(Last()), TMap(Last()), SigmaMap(Last(), table), TimestepMLP(Last())):
        assert torch.equal(model(x, 3, 4, 5)[:, :1], x + 8 + 5)
    ncsn = NCSNv2(Last(), table)
    assert torch.equal(ncsn(x, 3, 4, 5), -(x + 8 + 5))
    torch.testing.assert_close(ncsn.score(x, 3, 4, 5) * ncsn.std[3].double(), x + 8 + 5)


@pytest.mark.parametrize(("y", "error", "says"), [
    (None, ValueError, r"has 10 classes and wants a label: give y, \(B,\), last"),
    (torch.tensor([0, 1, 2, 3, 4, 11]), ValueError, r"in \[0, 10\], where 10 says no label; got values from 0 to 11"),
    (torch.tensor([0, 1, 2, 3, 4, -1]), ValueError, "got values from -1 to 4"),
    (11, ValueError, "got values from 11 to 11"),
    (torch.arange(5), ValueError, r"one per sample, shape \(6,\), or a single one for all; got shape \(5,\)"),
    (torch.zeros(6, 1).long(), ValueError, r"got shape \(6, 1\)"),
    (torch.zeros(1).long(), ValueError, r"got shape \(1,\)"),
    (torch.zeros(6), TypeError, "whole numbers, in a tensor .* got torch.float32"),
    (torch.zeros(6) > 0, TypeError, "got torch.bool"),
    (2.0, TypeError, "got float"), (True, TypeError, "got bool"), ("3", TypeError, "got str"),
    ([0] * 6, TypeError, "got list"), (np.zeros(6, int), TypeError, "got ndarray")])
def test_labels_that_do_not_fit_are_refused_with_the_reason(y, error, says):
    x = images().float()
    with pytest.raises(error, match=says): as_labels(y, x, 10)
    if y is None: return
    with pytest.raises(error, match=says): LabelMap(small_net(), 10)(x, y)
    with pytest.raises(error, match=says):
        ADM(**ADM_SMALL, out_channels=1, n_classes=10, null_label=True)(x, y)


@pytest.mark.parametrize("way", ["layers", "vmap", "unique", "auto"])
def test_dpi_refuses_labels_in_every_way_of_running(way):
    model, x = moved(DPI(LabelMap(small_net(), 10), granularity=way)), images()
    model(x, S, Y)    # checked already
    for s in (S, 250):
        with pytest.raises(ValueError, match="where 10 says no label; got values"): model(x, s, Y + 1)
        with pytest.raises(ValueError, match="wants a label"): model(x, s)
        with pytest.raises(TypeError, match="whole numbers"): model(x, s, Y / 2)
    with pytest.raises(ValueError, match=r"shape \(4,\)"): model(x, S, Y[:4])
    with pytest.raises(ValueError, match=r"shape \(4,\)"): model(x, 250, Y[:4])


def test_labels_on_another_device_or_of_a_small_type_are_taken():
    x = images()
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert as_labels(Y.to(dtype), x, 10).dtype == torch.int64
    assert as_labels(Y, x.to("meta"), 10).is_meta
    assert LabelMap(small_net(), 10).to("meta")(x.float().to("meta"), Y.to("meta")).shape == x.shape


def test_networks_that_take_no_label_say_so():
    x = images().float()
    for net in (DRUNet(1, 1, (8, 16), 1), OnesChannel(DRUNet(2, 1, (8, 16), 1)), DPI(DRUNet(1, 1, (8, 16), 1))):
        inputs = (x, 3, Y) if isinstance(net, DPI) else (x, Y)
        with pytest.raises(TypeError, match=r"LabelMap\(net, classes\) around a DRUNet"): net(*inputs)
    with pytest.raises(TypeError, match=r"net must take \(x, t\), and DRUNet does not"): TimestepMLP(DRUNet())
    bare = ADM(**ADM_SMALL, out_channels=1)
    for inputs in ((x, 3), (x, Y)):
        with pytest.raises(ValueError, match="nor does it take labels, which it would with n_classes"): bare(*inputs)
    with pytest.raises(ValueError, match=r"no classes \(n_classes=None\), so it takes no y"):
        ADM(**ADM_SMALL, out_channels=1, embedding=True)(x, 3, Y)
    with pytest.raises(ValueError, match="11 channels of the label are appended to the 1 channels of x, so net must take 12; it takes 2"):
        LabelMap(DRUNet(2, 1, (8, 16), 1), 10)(x, 3)


def test_adm_with_labels_alone():
    x = images().float()
    with_null, without = (ADM(**ADM_SMALL, out_channels=1, n_classes=10, null_label=n) for n in (True, False))
    assert with_null.label_emb.weight.shape == (11, 128) and without.label_emb.weight.shape == (10, 128)
    assert not hasattr(with_null, "time_embed")
    with pytest.raises(ValueError, match=r"in \[0, 9\]; got values from 0 to 10"): without(x, Y)
    for call, says in ((lambda: without(x), r"call it as net\(x, y\)"), (lambda: without(x, 3, Y), "takes no t"),
                       (lambda: ADM(null_label=True), "for one without classes"),
                       (lambda: ADM(n_classes=10, null_label=1), "got 1 for one")):
        with pytest.raises(ValueError, match=says): call()
    old = ADM(**ADM_SMALL, out_channels=1, embedding=True, n_classes=10)   # as guided diffusion stores it
    assert old.label_emb.weight.shape == (10, 128)
    with pytest.raises(ValueError, match=r"call it as net\(x, t, y\)"): old(x, 3)
    assert [len(adm_stages(n)) for n in (with_null, old)] == [len(adm_stages(ADM(**ADM_SMALL, out_channels=1)))] * 2


@pytest.mark.parametrize(("backbone", "conditioning"), MODELS)
def test_models_with_labels_are_saved_and_loaded_to_the_bit(tmp_path, backbone, conditioning):
    model, x = built(backbone, conditioning), images()
    save_model(tmp_path, model)
    back = load_model(tmp_path)
    assert repr(back) == repr(model)
    for s in (S, 250): assert torch.equal(back(x, s, Y), model(x, s, Y))


def test_an_adm_saved_before_there_was_a_null_label_is_loaded(tmp_path):
    model = moved(TimestepMLP(ADM(**ADM_SMALL, out_channels=1, embedding=True, n_classes=10)))
    save_model(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["net"]["null_label"]
    from dpi_nbdev.build import _hash
    from dpi_nbdev.core import sealed, unsealed
    state, note = unsealed(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(sealed(state, config_sha256=_hash(config)))
    x, y = images(), Y.clamp(max=9)
    assert torch.equal(load_model(tmp_path)(x, 250, y), model(x, 250, y))


@pytest.mark.parametrize(("kw", "says"), [
    (dict(classes=0), "at least 1; got 0"), (dict(classes="10"), "got '10'"), (dict(classes=True), "got True"),
    (dict(classes=10, n_classes=10), "leave n_classes out"), (dict(classes=10, null_label=True), "leave null_label out")])
@pytest.mark.parametrize("backbone", ["adm", "drunet"])
def test_build_model_refuses_what_is_no_number_of_classes(backbone, kw, says):
    with pytest.raises(ValueError, match=says): build_model(backbone, "dpi", **kw)


def test_film_and_one_scalar_of_the_range_work_with_labels():
    model, x = moved(film(LabelMap(small_net(), 10), 0, 1, knots=5)), images()
    s = torch.linspace(0, 1, 6).double()
    assert check_exact(model, x, s, Y) < 1e-12


def test_a_compiled_label_map_answers_and_refuses_as_the_plain_one_does():
    torch._dynamo.reset()
    model, x = LabelMap(small_net(), 10), images().float()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x, Y), model(x, Y))
    with pytest.raises(ValueError, match="got values from 1 to 11"): compiled(x, Y + 1)


# -- data ---------------------------------------------------------------------------


def write_idx(path, x):
    data = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + np.ascontiguousarray(x).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def idx_set(folder, name="", n=40, test="t10k", n_test=12, end="", classes=10, first=0, turned=False):
    "Images in which the first pixel is the image's number; its label is that number by classes."
    folder.mkdir(exist_ok=True)
    for part, count in (("train", n), (test, n_test)):
        if part is None: continue
        x = np.random.default_rng(count).integers(0, 256, (count, 7, 7), dtype=np.uint8)
        x[:, 0, 0] = np.arange(count)
        x[:, 0, 6] = 200        # the upper right corner
        x[:, 6, 0] = 100        # the lower left one
        x = x.transpose(0, 2, 1) if turned else x
        y = (np.arange(count) % classes + first).astype(np.uint8)
        write_idx(folder / f"{name}{part}-images-idx3-ubyte{end}", x)
        write_idx(folder / f"{name}{part}-labels-idx1-ubyte{end}", y)
    return folder / f"{name}train-images-idx3-ubyte{end}"


def byte(v):
    return ((v + 1) * 127.5).round().long()


def check_parts(split, classes):
    for part in ("train", "held_out", "validation"):
        x, y = getattr(split, part), getattr(split, f"{part}_labels")
        if x is None: continue
        assert (byte(x[:][:, 0, 0, 0]) % classes == y).all()
        assert (byte(x[:][:, 0, 0, 6]) == 200).all() and (byte(x[:][:, 0, 6, 0]) == 100).all()


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name, test, classes, first, turned", [
    ("", "t10k", 10, 0, False), ("fashion-", "test", 10, 0, False), ("", "test", 10, 0, False),
    ("emnist-letters-", "test", 26, 1, True), ("emnist-balanced-", "test", 47, 0, True)])
def test_idx_files_are_read_from_their_folder_or_by_the_file_of_images(tmp_path, end, name, test, classes, first, turned):
    n = 2 * classes
    file = idx_set(tmp_path, name, n, test, classes, end, classes, first, turned)
    for source in (tmp_path, file, str(file)):
        split = load_images(source, n_validation=5, seed=3)
        assert [len(v) for v in (split.train, split.validation, split.held_out)] == [n - 5, 5, classes]
        assert split.classes == classes and f"with labels, {classes} classes" in repr(split)
        check_parts(split, classes)
    few = load_images(file, n_held_out=4, seed=3)
    assert len(few.held_out) == 4 and (few.held_out[:] == split.held_out[:4]).all()
    # The test images by themselves are a set like any other.
    alone = load_images(file.with_name(file.name.replace("train", test)), n_held_out=2)
    assert (len(alone.train), len(alone.held_out)) == (classes - 2, 2)
    check_parts(alone, classes)


def test_a_set_without_test_images_is_split_at_random(tmp_path):
    file = idx_set(tmp_path, test=None, n=50)
    split = load_images(file, seed=1)
    assert (len(split.train), len(split.held_out)) == (45, 5)
    check_parts(load_images(tmp_path, n_validation=7), 10)
    seen = torch.cat([byte(p[:][:, 0, 0, 0]) for p in (split.train, split.held_out)])
    assert sorted(seen.tolist()) == list(range(50))


def test_a_folder_of_several_sets_must_be_told_which(tmp_path):
    one, other = idx_set(tmp_path, "kmnist-", 20), idx_set(tmp_path, "fashion-", 30, end=".gz")
    with pytest.raises(ValueError, match="several sets; give the images of one of them: 'fashion-train-images-idx3-ubyte.gz', 'kmnist-train"):
        load_images(tmp_path)
    assert (len(load_images(one).train), len(load_images(other).train)) == (20, 30)


def test_packed_and_unpacked_files_may_be_mixed_and_names_may_lie_about_it(tmp_path):
    file = idx_set(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    write_idx(tmp_path / (labels.name + ".gz"), np.arange(40, dtype=np.uint8) % 10)
    labels.unlink()
    check_parts(load_images(tmp_path), 10)
    file.with_name(file.name + ".gz").write_bytes(file.read_bytes())     # unpacked by a browser
    file.unlink()
    check_parts(load_images(tmp_path), 10)
    other = tmp_path / "my.images"      # a name of one's own
    write_idx(other, np.zeros((9, 7, 7), np.uint8))
    write_idx(tmp_path / "my.labels", np.arange(9, dtype=np.uint8))
    assert load_images(other, n_held_out=0).classes == 9


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_that_are_wrong_are_named(tmp_path, end):
    file = idx_set(tmp_path, end=end)
    labels = tmp_path / f"train-labels-idx1-ubyte{end}"
    kept, kept_labels = file.read_bytes(), labels.read_bytes()

    def refused(source, error, says):
        with pytest.raises(error, match=says): load_images(source)
        file.write_bytes(kept)
        labels.write_bytes(kept_labels)

    refused(labels, ValueError, f"train-labels-idx1-ubyte{end}': give the file of images")
    labels.unlink()
    refused(file, FileNotFoundError, f"labels of '.*train-images-idx3-ubyte{end}' are missing: there is no train-labels")
    write_idx(labels, np.zeros(39, np.uint8))
    refused(file, ValueError, f"train-images-idx3-ubyte{end}' holds 40 images, and '.*labels-idx1-ubyte{end}' holds 39 labels")
    file.write_bytes(kept_labels)
    refused(tmp_path, ValueError, rf"train-images-idx3-ubyte{end}' holds bytes of shape \(40,\), and images have 3 axes")
    labels.write_bytes(kept)
    refused(file, ValueError, rf"train-labels-idx1-ubyte{end}' holds bytes of shape \(40, 7, 7\), and labels have 1 axes")
    raw = gzip.decompress(kept) if end else kept
    pack = gzip.compress if end else bytes
    file.write_bytes(pack(b"\0\0\x0d" + raw[3:]))
    refused(file, ValueError, f"train-images-idx3-ubyte{end}' is not an idx file of bytes: it does not begin with 0, 0, 8")
    file.write_bytes(pack(raw[:-1]))
    refused(file, ValueError, f"train-images-idx3-ubyte{end}' is damaged")
    file.write_bytes(pack(raw + b"x"))
    refused(file, ValueError, f"train-images-idx3-ubyte{end}' is damaged")
    if end:
        file.write_bytes(kept[:-5])
        refused(file, ValueError, "train-images-idx3-ubyte.gz' cannot be unpacked")
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{end}", np.zeros((12, 8, 8), np.uint8))
    refused(file, ValueError, r"are of \(7, 7\) pixels, those to test with of \(8, 8\)")


def test_letters_that_count_from_zero_are_refused(tmp_path):
    file = idx_set(tmp_path, "emnist-letters-", 52, "test", 26, classes=26)
    with pytest.raises(ValueError, match="emnist-letters-train-labels-idx1-ubyte': the labels of EMNIST's letters are 1 to 26"):
        idx_images(file)


def test_a_folder_of_test_images_alone_says_what_is_missing(tmp_path):
    idx_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="there is no …train-images-idx3-ubyte"): load_images(tmp_path)


def paint(folder, names):
    "Pictures whose brightness says where they are in the list."
    for i, name in enumerate(names):
        f = folder / name
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(f)


PETS = ["dog/1.png", "dog/young/2.png", "cat/3.png", "ant/4.png", "cat/5.png"]
SPECIES = [2, 2, 1, 0, 1]


@pytest.mark.parametrize("top", ["", "pets/", "all/pets/"])
@pytest.mark.parametrize("packed", [False, True])
def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path, top, packed):
    paint(tmp_path / "x", [top + name for name in PETS])
    source = tmp_path / "x"
    if packed:
        source = tmp_path / "x.zip"
        with zipfile.ZipFile(source, "w") as z:
            for f in sorted((tmp_path / "x").rglob("*.png")): z.write(f, f.relative_to(tmp_path / "x"))
    split = load_images(source, n_held_out=1, n_validation=1, progress=False)
    assert split.classes == 3
    for part in ("train", "held_out", "validation"):
        x, y = getattr(split, part)[:], getattr(split, f"{part}_labels")
        assert [SPECIES[i] for i in byte(x[:, 0, 0, 0])] == y.tolist()
    assert class_folders([top + name for name in PETS]) == ["ant", "cat", "dog"]


def test_a_broken_image_does_not_shift_the_classes(tmp_path):
    paint(tmp_path, PETS)
    (tmp_path / "ant/4.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1 of 5"):
        split = load_images(tmp_path, n_held_out=0, skip_broken=True, progress=False)
    assert sorted(split.train_labels.tolist()) == [1, 1, 2, 2]


@pytest.mark.parametrize("names", [[*PETS, "6.png"], PETS[:2], ["train/1.png", "test/2.png"], ["1.png", "2.png"]])
def test_other_folders_have_no_classes(tmp_path, names):
    paint(tmp_path, names)
    split = load_images(tmp_path, n_held_out=0, progress=False)
    assert split.train_labels is None and split.classes is None


def test_dataset_json_alone_decides_where_there_is_one(tmp_path):
    paint(tmp_path, PETS)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[n, 7] for n in PETS]}))
    assert load_images(tmp_path, n_held_out=0, progress=False).train_labels.tolist() == [7] * 5
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert load_images(tmp_path, n_held_out=0, progress=False).classes is None


def test_arrays_have_labels_inside_or_beside_them(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    y = np.arange(12) % 5
    np.savez(tmp_path / "guided.npz", x, y)
    np.save(tmp_path / "plain.npy", x)
    (tmp_path / "plain.json").write_text(json.dumps({"labels": y.tolist()}))
    for name in ("guided.npz", "plain.npy"):
        split = load_images(tmp_path / name, n_held_out=3)
        assert split.classes == 5 and (split.train_labels == torch.from_numpy(y)[split.train.rows]).all()
    for wrong, says in (([0.5] * 12, "plain.json' must be a list of whole"), ([True] * 12, "whole numbers"),
                        ({"a": 1}, "list of whole"), ([1, 2], "there are 2 labels for the 12 images in .*plain.npy")):
        (tmp_path / "plain.json").write_text(json.dumps({"labels": wrong}))
        with pytest.raises(ValueError, match=says): load_images(tmp_path / "plain.npy")


def test_pairs_of_images_and_labels():
    split = digits(n_validation=50)
    for part in ("train", "held_out", "validation"):
        x, y = getattr(split.labelled(), part)
        assert x is getattr(split, part) and y is getattr(split, f"{part}_labels")
    assert digits().labelled().validation is None
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 5])
    empty = ImageSplit(x, x[:0], y, y[:0])
    assert empty.classes == 6 and len(empty.labelled().held_out[1]) == 0
    assert ImageSplit(x, x, y, y + 3).classes == 9           # of all parts
    lazy = ImageSplit(ImageArray(np.zeros((4, 2, 2, 1), np.uint8)), x, y, y)
    assert lazy.labelled().train[0] is lazy.train
    for bad, says in ((ImageSplit(x, x), "these images have no labels"), (ImageSplit(x, x, y - 1, y), "down to -1"),
                      (ImageSplit(x, x, y), "'held_out' has 4 images and 0 labels"),
                      (ImageSplit(x, x, y[:3], y), "'train' has 4 images and 3 labels"),
                      (ImageSplit(x, x, y, y, x[:2]), "'validation' has 2 images and 0 labels")):
        with pytest.raises(ValueError, match=says): bad.labelled()
    with pytest.raises(ValueError, match="negative ones, down to -1"): ImageSplit(x, x, y, y - 1).classes
    assert "no labels" in repr(ImageSplit(x, x))
