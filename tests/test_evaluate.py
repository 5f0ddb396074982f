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

import dpi_nbdev.cli as cli
from dpi_nbdev.data import digits, photos
from dpi_nbdev.evaluate import EXTRACTORS, INCEPTION, make_reference, read_images
from dpi_nbdev.features import PhotoFeatures, PixelFeatures
from dpi_nbdev.generate import to_bytes
from dpi_nbdev.metrics import feature_statistics

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
        found = PhotoFeatures()(__import__("torch").from_numpy(f["arr_0"]).permute(0, 3, 1, 2))
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
import resource, sys
import torch
from dpi_nbdev.evaluate import image_features, make_reference, read_images
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(cli.Path(cli.__file__).parent.parent))
    files = [tmp_path / f for f in ("few.npz", "many.npz", "packed.npz", "ref.npz")]
    done = subprocess.run([sys.executable, "-c", GROWTH, *map(str, files)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ref.npz").stat().st_size > x.nbytes > 79e6
    assert float(done.stdout) < 20


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
