"""dpi_evaluate as a user meets it: files of the field in both directions, ranks, memory, and everything that can be wrong with two files."""
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import dpi_nbdev.cli as cli
from dpi_nbdev.data import digits, photos
from dpi_nbdev import files
from dpi_nbdev.evaluate import (EXTRACTORS, INCEPTION, LabelledImages, evaluate_samples, evaluation_table, judge_classes,
                                make_reference, open_images, read_images)
from dpi_nbdev.features import DigitFeatures, Features, PhotoFeatures, PixelFeatures
from dpi_nbdev.generate import to_bytes
from dpi_nbdev.metrics import feature_statistics, frechet_distance, precision_recall

PIXELS = ("--reference", "ref.npz", "--features", "pixels")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Files of digits: 60 samples, a reference of 200 for pixels and one of photographs, and bad ones."
    d = tmp_path_factory.mktemp("files")
    x = digits()
    samples, real = to_bytes(x.held_out[:60]), to_bytes(x.train[:200])
    np.savez(d / "samples.npz", samples)
    make_reference(real, d / "ref.npz", PixelFeatures(), progress=False)
    patches = photos(16, n_train=90, n_held_out=50)
    np.savez(d / "patches.npz", to_bytes(patches.held_out))
    make_reference(to_bytes(patches.train), d / "patches-ref.npz", PhotoFeatures(), progress=False)
    good = dict(arr_0=samples, mu=np.zeros(64), sigma=np.eye(64))
    bad = {"keys": dict(images=samples), "floats": dict(arr_0=samples / 255), "signed": dict(arr_0=samples.astype(np.int64)), "one": dict(arr_0=samples[:1]), "three": dict(arr_0=samples[:3]),
           "chw": dict(arr_0=samples.reshape(60, 1, 8, 8)), "flat": dict(arr_0=samples[..., 0]), "large": dict(arr_0=samples.repeat(2, 1).repeat(2, 2)), "rgb": dict(arr_0=samples.repeat(3, 3)),
           "nan": good | dict(mu=np.full(64, np.nan)), "half": dict(mu=np.zeros(64)), "shapes": good | dict(sigma=np.eye(63)), "foreign": good,
           "labels": dict(arr_0=samples, arr_1=np.arange(59)), "labels2": dict(arr_0=samples, arr_1=np.arange(61)),
           "narrow": dict(mu=np.zeros(9), sigma=np.eye(9), extractor="pixels"), "other": good | dict(extractor="photo wavelets"), "objects": dict(arr_0=np.array([samples, None], dtype=object))}
    for name, arrays in bad.items():
        np.savez(d / f"{name}.npz", **arrays)
    whole = (d / "samples.npz").read_bytes()
    (d / "cut.npz").write_bytes(whole[:-100])
    (d / "bit.npz").write_bytes(whole[:999] + bytes([whole[999] ^ 1]) + whole[1000:])
    (d / "text.npz").write_text("not a zip")
    (d / "folder").mkdir()
    with np.load(d / "ref.npz") as f:
        np.savez(d / "statistics.npz", **{k: f[k] for k in f.files if k != "arr_0"})
    return d


@pytest.fixture
def call(made, monkeypatch, capsys):
    "Runs the command line `dpi_evaluate …` in this process; gives exit status, stdout, stderr."
    def run(*args, name="dpi_evaluate"):
        monkeypatch.chdir(made)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            getattr(cli, name)()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        said = capsys.readouterr()
        return status, said.out, said.err
    return run


# -- files -----------------------------------------------------------------------------------------------------


def test_a_reference_is_what_the_original_evaluator_reads(made):
    "Its way: keys of np.load, float64 statistics, and arr_0 as a C-ordered .npy of header version 1.0 inside the zip."
    with np.load(made / "patches-ref.npz") as f:
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(f.files)
        assert f["arr_0"].shape == (90, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        found = PhotoFeatures()(torch.from_numpy(f["arr_0"]).permute(0, 3, 1, 2))
        for mu, sigma, features in (("mu", "sigma", found.pool), ("mu_s", "sigma_s", found.spatial)):
            assert f[mu].dtype == f[sigma].dtype == np.float64
            for stored, computed in zip((f[mu], f[sigma]), feature_statistics(features)):
                np.testing.assert_allclose(stored, computed, rtol=1e-4, atol=1e-5)
        assert f["extractor"] == "photo wavelets" and f["n"] == 90
    with zipfile.ZipFile(made / "patches-ref.npz") as z, z.open("arr_0.npy") as f:
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((90, 16, 16, 3), False, np.uint8)


def test_statistics_in_a_file_are_used_and_not_computed(made, call):
    "With the mean moved by 3 in one direction, the distance to the same images is 9 more."
    with np.load(made / "ref.npz") as f:
        arrays = dict(f)
    plain, moved = made / "plain.npz", made / "moved.npz"
    np.savez(plain, arrays["arr_0"])
    arrays["mu"][0] += 3
    np.savez(moved, **arrays)
    status, out, err = call("plain.npz", "--reference", "moved.npz", "--features", "pixels", "--out", "moved.json")
    assert status == 0, err
    numbers = json.loads((made / "moved.json").read_text(encoding="utf-8"))["numbers"]
    assert numbers["frechet"] == pytest.approx(9, abs=1e-4) and numbers["precision"] == numbers["recall"] == 1


def test_a_reference_of_statistics_alone_gives_distances_alone(made, call):
    status, out, err = call("samples.npz", "--reference", "statistics.npz", "--features", "pixels", "--out", "alone.json")
    assert status == 0, err
    assert re.search(r"Fréchet distance +\d+\.\d{4}", out) and re.search(r"precision +–  \(statistics.npz holds no images, only statistics\)", out)
    full = call("samples.npz", *PIXELS)
    assert re.search(r"Fréchet distance .*", out)[0] == re.search(r"Fréchet distance .*", full[1])[0]
    assert "precision" in json.loads((made / "alone.json").read_text(encoding="utf-8"))["missing"]


def test_references_of_every_source_agree(made, call):
    from PIL import Image
    x = read_images(made / "patches.npz").images[range(50)]
    np.save(made / "images.npy", x)
    for i, image in enumerate(x):
        Image.fromarray(image).save(made / "folder" / f"{i:03d}.png")
    with zipfile.ZipFile(made / "images.zip", "w") as z:
        for f in sorted((made / "folder").glob("*.png")):
            z.write(f, f.name)
    for k, source in enumerate(("patches.npz", "images.npy", "images.zip", "folder")):
        status, out, err = call(source, "--make-reference", f"from{k}.npz", "--features", "photos", "--n-images", 20)
        assert status == 0 and "20 images of 16×16×3, statistics of 50 images" in out, err
        assert (made / f"from{k}.npz").read_bytes() == (made / "from0.npz").read_bytes()
    assert call("photos", "--make-reference", "embedded.npz", "--features", "photos", "--size", 24, "--n-images", 5)[0] == 0
    assert read_images(made / "embedded.npz").images.shape == (5, 24, 24, 3)


# -- labels ----------------------------------------------------------------------------------------------------


QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    "Held-out digits with their labels, with shuffled ones, and a reference that the digit network made."
    d = tmp_path_factory.mktemp("labelled")
    split = digits()
    x, y = to_bytes(split.held_out), split.held_out_labels.numpy()
    np.savez(d / "right.npz", x, y)
    np.savez(d / "shuffled.npz", x, np.random.default_rng(0).permutation(y))
    np.savez(d / "none.npz", x)
    make_reference(open_images("digits"), d / "ref.npz", DigitFeatures(), **QUIET)
    return d


def test_labels_tell_right_digits_from_the_same_digits_with_shuffled_labels(labelled):
    "The set is the same; each class is nearer to its real images under its own label, and only then recognised."
    look, names = DigitFeatures(), ("right", "shuffled", "none")
    found = {k: evaluate_samples(labelled / f"{k}.npz", labelled / "ref.npz", look, **QUIET) for k in names}
    assert found["right"]["numbers"] == found["shuffled"]["numbers"] == found["none"]["numbers"]
    assert "classes" not in found["none"] and "by class" not in evaluation_table(found["none"])
    right, shuffled = (found[k]["classes"] for k in ("right", "shuffled"))
    for r, s in zip(right["rows"], shuffled["rows"], strict=True):
        assert r["label"] == s["label"] and r["missing"] == s["missing"] == {}
        assert 5 * r["numbers"]["frechet"] < s["numbers"]["frechet"]
        assert r["numbers"]["accuracy"] > 0.85 and s["numbers"]["accuracy"] < 0.4
    assert right["mean"]["numbers"]["accuracy"] > 0.95 and right["mean"]["numbers"]["accuracy_real"] > 0.98


def test_numbers_of_a_class_are_those_of_a_file_of_that_class(labelled, tmp_path):
    look = DigitFeatures()
    rows = evaluate_samples(labelled / "right.npz", labelled / "ref.npz", look, **QUIET)["classes"]["rows"]
    assert [r["label"] for r in rows] == list(range(10))
    for name in ("right", "ref"):
        with np.load(labelled / f"{name}.npz") as f:
            np.savez(tmp_path / f"{name}.npz", f["arr_0"][f["arr_1"] == 4])
    alone = evaluate_samples(tmp_path / "right.npz", tmp_path / "ref.npz", look, **QUIET)
    assert rows[4]["samples"] == alone["samples"]["images"][0] and rows[4]["real"] == alone["reference"]["images"][0]
    for key in ("frechet", "precision", "recall"):
        assert rows[4]["numbers"][key] == pytest.approx(alone["numbers"][key], rel=1e-4)


def test_the_table_has_a_row_for_each_class_and_json_all_numbers(labelled, monkeypatch, capsys):
    monkeypatch.chdir(labelled)
    monkeypatch.setattr(sys, "argv", ["dpi_evaluate", "right.npz", "--reference", "ref.npz", "--features", "digits"])
    cli.dpi_evaluate()
    out = capsys.readouterr().out
    stored = json.loads((labelled / "right.evaluation.json").read_text(encoding="utf-8"))
    lines = out.split("by class")[1].splitlines()
    assert lines[0].split() == ["samples", "real", "Fréchet", "precision", "recall", "accuracy", "of", "real"]
    for line, row in zip(lines[1:11], stored["classes"]["rows"], strict=True):
        numbers = [f"{row['numbers'][k]:.4f}" for k in ("frechet", "precision", "recall", "accuracy", "accuracy_real")]
        assert line.split() == [str(row["label"]), str(row["samples"]), str(row["real"]), *numbers]
    assert lines[11].split()[0] == "mean" and len({len(line) for line in lines[1:12]}) == 1
    assert "297 images of 8×8×1 in 10 classes" in out and stored["samples"]["classes"] == 10
    assert "a covariance of the 32 features is singular" in out


def test_too_few_images_of_a_class_are_a_reason_and_not_a_number(labelled, tmp_path):
    with np.load(labelled / "right.npz") as f:
        x, y = f["arr_0"], f["arr_1"]
    one, three = np.flatnonzero(y == 1)[:1], np.flatnonzero(y == 3)[:3]
    keep = np.concatenate([one, three, np.flatnonzero(y > 3)])
    y = np.where(y == 5, 77, y)
    np.savez(tmp_path / "few.npz", x[keep], y[keep])
    r = evaluate_samples(tmp_path / "few.npz", labelled / "ref.npz", DigitFeatures(), **QUIET)
    rows = {row["label"]: row for row in r["classes"]["rows"]}
    assert list(rows) == [*range(10), 77] and (rows[0]["samples"], rows[77]["real"]) == (0, 0)
    assert rows[0]["missing"]["frechet"] == "samples: 0, needed: 2" and rows[0]["missing"]["accuracy"] == "no images"
    assert rows[1]["missing"]["frechet"] == "samples: 1, needed: 2" and "accuracy" in rows[1]["numbers"]
    assert rows[3]["missing"] == dict.fromkeys(("precision", "recall"), "samples: 3, needed: 4")
    assert rows[77]["missing"]["recall"] == "real images: 0, needed: 4"
    assert rows[77]["missing"]["accuracy"] == "the classifier does not know this label"
    assert r["classes"]["mean"] == dict(numbers={}, missing=dict(
        frechet="5 of 11 classes have none", precision="6 of 11 classes have none", recall="6 of 11 classes have none",
        accuracy="4 of 11 classes have none", accuracy_real="1 of 11 classes have none"))
    table = evaluation_table(r)
    assert re.search(r"^  3 +3 +156 +\d+\.\d{4} +– +– +1\.0000 +0\.\d{4}$", table, re.M)
    assert "precision, recall of label 3: samples: 3, needed: 4" in table
    json.dumps(r)


def test_features_without_a_classifier_of_labels_give_no_accuracy(labelled, tmp_path):
    make_reference(open_images("digits"), tmp_path / "ref.npz", PixelFeatures(), **QUIET)
    r = evaluate_samples(labelled / "right.npz", tmp_path / "ref.npz", PixelFeatures(), **QUIET)
    assert r["classes"]["rows"][0]["missing"] == dict.fromkeys(("accuracy", "accuracy_real"), "these features come with no classifier of labels")
    table = evaluation_table(r)
    assert "accuracy, of real of all labels: these features come with no classifier" in table
    assert table.split("by class")[1].splitlines()[0].split() == ["samples", "real", "Fréchet", "precision", "recall"]


def test_samples_with_labels_and_a_reference_without_say_so(labelled, tmp_path):
    r = evaluate_samples(labelled / "right.npz", labelled / "none.npz", DigitFeatures(), **QUIET)
    assert "classes" not in r and r["notes"][-1] == "right.npz has labels and none.npz has none: nothing is said by class"
    r = evaluate_samples(labelled / "none.npz", labelled / "right.npz", DigitFeatures(), **QUIET)
    assert "classes" not in r and not any("labels" in n for n in r["notes"])
    with np.load(labelled / "ref.npz") as f:
        np.savez(tmp_path / "statistics.npz", **{k: f[k] for k in f.files if k != "arr_0"})
    assert read_images(tmp_path / "statistics.npz").labels is None


def test_what_is_no_row_of_whole_numbers_is_no_label(tmp_path):
    x = np.zeros((5, 4, 4, 1), np.uint8)
    for arr_1, labels in ((np.arange(5, dtype=np.uint16), range(5)), (np.ones(5), None), (np.ones((5, 1), int), None), (np.ones(5, bool), None)):
        np.savez_compressed(tmp_path / "a.npz", x, arr_1)
        found = read_images(tmp_path / "a.npz").labels
        assert found is None if labels is None else (found == labels).all() and found.dtype == np.int64


def test_many_classes_are_a_short_table(labelled):
    "The twenty furthest are shown; the mean is over all."
    g = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 4)
    fake, real = (Features(torch.from_numpy(g.normal(size=(120, 3)))) for _ in range(2))
    fake.pool[labels >= 15] += 9
    found = judge_classes(fake, labels, real, labels)
    base = dict(numbers={}, missing=dict.fromkeys(("frechet", "frechet_spatial", "inception_score", "precision", "recall"), "-"), intervals={},
                notes=[], extractor="x", settings={}, classes=found, **{k: dict(file=k, images=None, statistics=[]) for k in ("samples", "reference")})
    shown = [int(m) for m in re.findall(r"^  (\d+) +4 +4 ", evaluation_table(base), re.M)]
    assert len(shown) == 20 and shown == sorted(shown) and set(range(15, 30)) < set(shown)
    assert "the 20 of the largest distances, of 30 classes; the mean is over all" in evaluation_table(base)
    assert len(found["rows"]) == 30 and found["mean"]["numbers"]["frechet"] == pytest.approx(np.mean([r["numbers"]["frechet"] for r in found["rows"]]))


@pytest.mark.filterwarnings("ignore:the covariance")
@pytest.mark.parametrize("n, m", [(5, 9), (9, 60), (60, 9), (60, 70)])
def test_the_distance_of_few_images_is_the_fréchet_distance(n, m):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(n, 12, generator=g) + 1, torch.randn(m, 12, generator=g) * torch.linspace(0.1, 3, 12)
    row = judge_classes(Features(a), [3] * n, Features(b), [3] * m)["rows"][0]
    assert row["numbers"]["frechet"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert [row["numbers"][k] for k in ("precision", "recall")] == list(precision_recall(b, a))


def test_a_classifier_must_name_as_many_classes_as_it_has_logits():
    f = Features(torch.randn(8, 2), logits=torch.randn(8, 3))
    with pytest.raises(ValueError, match=r"names 4 classes, and its logits are \(8, 3\)"):
        judge_classes(f, [0] * 8, f, [0] * 8, range(4))
    with pytest.raises(ValueError, match="names 4 classes, and its logits are none"):
        judge_classes(f._replace(logits=None), [0] * 8, f, [0] * 8, range(4))


def test_a_reference_keeps_to_each_image_its_label(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), dtype=np.uint8)
    y = np.arange(40) * 7 % 11
    make_reference(LabelledImages(x, y), tmp_path / "ref.npz", PixelFeatures(), n_images=15, **QUIET)
    make_reference(x, tmp_path / "plain.npz", PixelFeatures(), n_images=15, **QUIET)
    with np.load(tmp_path / "ref.npz") as f, np.load(tmp_path / "plain.npz") as plain:
        of = {image.tobytes(): label for image, label in zip(x, y)}
        assert [of[image.tobytes()] for image in f["arr_0"]] == f["arr_1"].tolist() and len(f["arr_1"]) == 15
        assert set(f.files) - set(plain.files) == {"arr_1"}
        assert all((f[k] == plain[k]).all() for k in plain.files)
    for labels in (y[:-1], y / 2, y[None]):
        with pytest.raises(ValueError, match="labels must be whole numbers, one for each of the 40 images"):
            LabelledImages(x, labels)


def test_labels_come_along_from_every_source_that_has_them(tmp_path):
    from PIL import Image
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    y = [2, 0, 1, 1, 0, 2]
    np.savez(tmp_path / "a.npz", x, y)
    np.save(tmp_path / "b.npy", x)
    (tmp_path / "b.json").write_text(json.dumps(dict(labels=y)))
    names = [f"{i}.png" for i in range(6)]
    (tmp_path / "c").mkdir()
    for name, image in zip(names, x):
        Image.fromarray(image).save(tmp_path / "c" / name)
    (tmp_path / "c" / "dataset.json").write_text(json.dumps(dict(labels=list(zip(names, y)))))
    for source in ("a.npz", "b.npy", "c"):
        images = open_images(tmp_path / source, **QUIET)
        assert images.labels.tolist() == y and (images[range(1, 4)] == x[1:4]).all() and images.shape == x.shape
    assert open_images("digits").labels.tolist() == digits().train_labels.tolist()
    assert not hasattr(open_images("photos", 16), "labels")


def test_labels_of_one_sub_folder_a_class(tmp_path):
    from PIL import Image
    for k, name in enumerate(("cats", "dogs")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 90 * k + i, np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    images = open_images(tmp_path / "pets", **QUIET)
    assert [int(images[range(i, i + 1)][0, 0, 0, 0] >= 90) for i in range(6)] == images.labels.tolist() == [0, 0, 0, 1, 1, 1]


# -- the same digits -------------------------------------------------------------------------------------------


def without_date(path):
    return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "date"}


def test_two_runs_print_the_same_digits_and_keep_them(made, call):
    status, first, err = call("samples.npz", *PIXELS, "--resamples", 10, "--level", 0.9)
    assert status == 0, err
    stored = without_date(made / "samples.evaluation.json")
    assert call("samples.npz", *PIXELS, "--resamples", 10, "--level", 0.9)[1] == first
    assert without_date(made / "samples.evaluation.json") == stored
    assert (made / "samples.evaluation.txt").read_text(encoding="utf-8").strip() in first
    assert f"{stored['numbers']['frechet']:.4f}" in first and "with 90 % confidence" in first
    assert stored["samples"]["images"] == [60, 8, 8, 1] and len(stored["samples"]["sha256"]) == 64 and stored["extractor"] == "pixels"


def test_two_ranks_find_the_numbers_of_one(made, call):
    "Under torchrun, two processes that share the extraction: one result, to rounding."
    script = made / "dpi_evaluate.py"
    script.write_text("from dpi_nbdev.cli import dpi_evaluate\ndpi_evaluate()\n")
    args = ("patches.npz", "--reference", "patches-ref.npz", "--features", "photos", "--batch-size", "8")
    status, out, err = call(*args, "--out", "one.json")
    assert status == 0, err
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(cli.Path(cli.__file__).parent.parent))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, script.name, *args, "--out", "two.json"], cwd=made, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [[line[:18] for line in text.split("stored in")[0].splitlines()]
             for text in (out, done.stdout)]
    assert lines[0] == lines[1]
    one, two = without_date(made / "one.json"), without_date(made / "two.json")
    assert two["settings"].pop("ranks") == 2 and one["settings"].pop("ranks") == 1
    a, b = one.pop("numbers"), two.pop("numbers")
    assert b == pytest.approx(a, rel=1e-5, abs=1e-5)  # float32 features, other kernels
    assert one == two


class Faulty:
    name = "pixels"

    def __call__(self, x):
        f = PixelFeatures()(x).pool
        f[(x.flatten(1).long().sum(1) == Faulty.bad)] = float("nan")
        return f


def a_rank(rank, port, folder, args, queue):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    sys.stderr = open(f"said-{rank}.txt", "w")
    sys.argv = ["dpi_evaluate", *args]
    try:
        cli.dpi_evaluate()
    except SystemExit as e:
        sys.stderr.close()
        queue.put((rank, e.code))


def test_a_fault_on_one_rank_ends_both_with_the_sentence(made, monkeypatch):
    "Image 50 of 60 lies in the second rank's share; the first must not wait for ever, and the number must be that in the file."
    Faulty.bad = int(read_images(made / "samples.npz").images[range(60)][50].sum())
    monkeypatch.setitem(EXTRACTORS, "pixels", Faulty)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [fork.Process(target=a_rank, args=(r, port, made, ("samples.npz", *PIXELS, "--batch-size", "8", "--device", "cpu"), queue)) for r in range(2)]
    for p in ranks:
        p.start()
    try:
        assert sorted(queue.get(timeout=60) for _ in ranks) == [(0, 1), (1, 1)]
    finally:
        for p in ranks:
            p.join(10)
            p.kill()
    for r in range(2):
        assert "samples.npz: the extractor's pool of image 50 contains NaN" in (made / f"said-{r}.txt").read_text()


# -- memory ----------------------------------------------------------------------------------------------------

GROWTH = '''
import re, resource, sys
from pathlib import Path
import torch
from dpi_nbdev.evaluate import image_features, make_reference, read_images
def peak():
    "MB; where there is /proc, of this process alone: ru_maxrss begins with the parent's."
    status = Path("/proc/self/status")
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024
def means(x): return x.float().mean((2, 3))
few = read_images(sys.argv[1]).images
image_features(few, means, progress=False)
before = peak()
for path in sys.argv[2:4]:
    assert image_features(read_images(path).images, means, progress=False).pool.shape == (820, 3)
make_reference(read_images(sys.argv[2]).images, sys.argv[4], means, progress=False)
print(peak() - before)
'''


def test_a_large_file_is_never_in_memory_whole(tmp_path):
    "80 MB of images, stored and compressed, are read, and written to a reference; the process grows by less than a quarter of that."
    x = np.zeros((820, 180, 180, 3), np.uint8)
    x[:] = np.arange(820).reshape(-1, 1, 1, 1) % 256
    np.savez(tmp_path / "few.npz", x[:100])
    np.savez(tmp_path / "many.npz", x)
    np.savez_compressed(tmp_path / "packed.npz", x)
    # With a fixed threshold glibc gives blocks of a batch back at once; else it keeps them.
    env = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="1000000",
               PYTHONPATH=str(cli.Path(cli.__file__).parent.parent))
    files = [tmp_path / f for f in ("few.npz", "many.npz", "packed.npz", "ref.npz")]
    done = subprocess.run([sys.executable, "-c", GROWTH, *map(str, files)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ref.npz").stat().st_size > x.nbytes > 79e6
    assert float(done.stdout) < 20, done.stdout


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, message", [
    (("keys.npz", *PIXELS), "has neither images (arr_0) nor statistics (mu, sigma); it has images"),
    (("floats.npz", *PIXELS), "must hold uint8 pixels from 0 to 255, got float64"),
    (("signed.npz", *PIXELS), "must hold uint8 pixels from 0 to 255, got int64"),
    (("objects.npz", *PIXELS), "must hold uint8"),
    (("chw.npz", *PIXELS), "1 or 3 channels last, got (60, 1, 8, 8)"),
    (("flat.npz", *PIXELS), "1 or 3 channels last, got (60, 8, 8)"),
    (("large.npz", *PIXELS), "holds images of 16×16×1 (rows, columns, channels), 'ref.npz' of 8×8×1"),
    (("rgb.npz", *PIXELS), "holds images of 8×8×3"),
    (("one.npz", *PIXELS), "at least 2 images on each side, 'one.npz' holds 1"),
    (("samples.npz", "--reference", "one.npz", "--features", "pixels"), "at least 2 images on each side"),
    (("nan.npz", *PIXELS), "mu or sigma in 'nan.npz' contains NaN"),
    (("half.npz", *PIXELS), "must be of shapes (D,) and (D, D)"),
    (("shapes.npz", *PIXELS), "got (64,) and (63, 63)"),
    (("samples.npz", "--reference", "narrow.npz", "--features", "pixels"), "are 64 numbers an image and those of 'narrow.npz' 9"),
    (("samples.npz", "--reference", "foreign.npz", "--features", "pixels"), f"are of {INCEPTION!r} features and cannot be compared with 'pixels'"),
    (("samples.npz", "--reference", "other.npz", "--features", "pixels"), "are of 'photo wavelets' features"),
    (("samples.npz", "--reference", "ref.npz", "--features", "photos"), "are of 'pixels' features"),
    (("labels.npz", *PIXELS), "arr_1 in 'labels.npz' holds 59 labels for 60 images"),
    (("samples.npz", "--reference", "labels2.npz", "--features", "pixels"), "arr_1 in 'labels2.npz' holds 61 labels for 60 images"),
    (("labels.npz", "--make-reference", "new.npz", "--features", "pixels"), "holds 59 labels for 60 images"),
    (("cut.npz", *PIXELS), "'cut.npz' cannot be read"),
    (("bit.npz", *PIXELS), "Bad CRC"),
    (("text.npz", *PIXELS), "'text.npz' cannot be read: File is not a zip file"),
    (("nowhere.npz", *PIXELS), "there is no file 'nowhere.npz'"),
    (("samples.npz", "--reference", "nowhere.npz", "--features", "pixels"), "there is no file 'nowhere.npz'"),
    (("folder", *PIXELS), "'folder' is no .npz file"),
    (("samples.npz", "--reference", "ref.npz"), "there is no weights file 'pt_inception-2015-12-05-6726825d.pth'"),
    (("samples.npz", "--reference", "ref.npz", "--weights", "my.pth"), "there is no weights file 'my.pth'"),
    (("samples.npz", *PIXELS, "--weights", "my.pth"), "weights are for the inception features"),
    (("samples.npz", "--reference", "ref.npz", "--features", "dino"), "features must be one of inception, digits, photos, pixels"),
    (("samples.npz", "--reference", "samples.npz", "--features", "photos"), "PhotoFeatures takes colour images"),
    (("samples.npz",), "give either --reference"),
    (("samples.npz", *PIXELS, "--make-reference", "new.npz"), "give either --reference"),
    (("samples.npz", *PIXELS, "--k", 0), "k must be"),
    (("samples.npz", *PIXELS, "--batch-size", 0), "batch_size must be"),
    (("samples.npz", *PIXELS, "--resamples", 1), "at least 2 resamples"),
    (("samples.npz", *PIXELS, "--resamples", 5, "--level", 95), "a level in (0, 1)"),
    (("samples.npz", *PIXELS, "--out", "results.txt"), "results are stored as .json"),
    (("samples.npz", *PIXELS, "--out", "text.npz/results.json"), "the output folder 'text.npz' is a file"),
    (("samples.npz", "--make-reference", "ref.npz", "--features", "pixels"), "'ref.npz' exists already"),
    (("samples.npz", "--make-reference", "new.npy", "--features", "pixels"), "is an .npz file"),
    (("samples.npz", "--make-reference", "new.npz", "--features", "pixels", "--n-images", 1), "n_images must be a whole number, at least 2; got 1"),
    (("samples.npz", "--make-reference", "new.npz", "--features", "pixels", "--size", 16), "holds images of 8×8, not of 16×16"),
    (("statistics.npz", "--make-reference", "new.npz", "--features", "pixels"), "holds statistics but no images"),
    (("nowhere", "--make-reference", "new.npz", "--features", "pixels"), "there are no images at 'nowhere'"),
])
def test_bad_input_gets_one_sentence_and_exit_status_1(made, call, args, message):
    before = sorted(p.name for p in made.iterdir())
    status, out, err = call(*args)
    assert status == 1 and message in err, err
    said = err.split("\r")[-1].strip().splitlines()
    assert said[-1].startswith("dpi_evaluate: ") and "Traceback" not in err and out.strip() == ""
    assert sorted(p.name for p in made.iterdir()) == before


def test_nan_features_name_the_image(made, call, monkeypatch):
    Faulty.bad = int(read_images(made / "samples.npz").images[range(60)][7].sum())
    monkeypatch.setitem(EXTRACTORS, "pixels", Faulty)
    status, _, err = call("samples.npz", *PIXELS)
    assert status == 1 and "dpi_evaluate: samples.npz: the extractor's pool of image 7 contains NaN or infinity" in err


def test_too_few_images_are_said_in_the_table(call):
    "No precision without neighbours; and the warning of a singular covariance is a note of the table, not noise on stderr."
    status, out, err = call("three.npz", *PIXELS, "--out", "three.json")
    assert status == 0 and "precision         –  (three.npz holds only 3 images; k = 3 needs more)" in out, err
    assert "note              the covariance of the samples is singular, rank 2" in out and "Warning" not in err
