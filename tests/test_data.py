"""What a notebook cell cannot show about data: processes killed for good, memory that is really limited, and files damaged at random."""
import errno
import gzip
import io
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpi_nbdev import convert
from dpi_nbdev.convert import convert_images
from dpi_nbdev.data import (Batches, ImageArray, digits, load_images, open_array, photos,
                            read_idx)
from dpi_nbdev.files import ImageError, ImageFiles, ImageSource, decode_image, read_labels

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
BROKEN = {7: b"", 100: None}  # number 7 shows it in its header, number 100 is cut off


def png(i, side=24):
    "Picture number i: noise, so that no two are alike."
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side + i % 3, 3), dtype=np.uint8)).save(f, "PNG")
    return f.getvalue()


def make_folder(path, n=160, broken=BROKEN):
    "n pictures in nested folders, two of them broken."
    for i in range(n):
        f = path / f"{i // 50:02d}" / f"{i:04d}.png"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes((broken[i] if broken[i] is not None else png(i)[:-300]) if i in broken else png(i))
    return path


def run_convert(source, out):
    convert_images(source, out, size=16, workers=1, skip_broken=True, progress=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(convert, "CHUNK", 8)


def left_over(folder):
    return sorted(f.name for f in folder.iterdir() if not f.name.startswith("."))


# -- conversion, killed --------------------------------------------------------------------------------------------


@linux
def test_a_conversion_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    make_folder(tmp_path / "src")
    run_convert(tmp_path / "src", tmp_path / "reference.npy")
    out, journal, rng, kills = tmp_path / "out" / "x.npy", tmp_path / "out" / "x.npy.journal", random.Random(0), 0
    lines = lambda: journal.read_text().count("\n") if journal.exists() else 0
    while True:
        child = mp.get_context("fork").Process(target=run_convert, args=(tmp_path / "src", out))
        child.start()
        start = lines()
        while child.is_alive() and lines() <= start:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.01)
        child.kill()  # SIGKILL
        child.join()
        if child.exitcode == 0:
            break
        kills += 1
        assert not out.exists() or np.load(out).shape == (158, 16, 16, 3)  # never half a file under that name
        assert kills < 100
    assert kills >= 3, "the conversion was too quick to be killed"
    run_convert(tmp_path / "src", out)
    assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()
    assert left_over(out.parent) == ["x.json", "x.npy"]
    print(f"killed {kills} times")


@pytest.mark.parametrize("broken", [BROKEN, {}], ids=["with gaps", "complete"])
def test_a_kill_before_or_after_any_renaming_or_removal_loses_nothing(tmp_path, broken):
    make_folder(tmp_path / "src", 40, {k % 40: v for k, v in broken.items()})
    run_convert(tmp_path / "src", tmp_path / "reference.npy")
    out, survived = tmp_path / "out" / "x.npy", False

    def dies_at(n, when):
        "A conversion that kills itself before or after its n-th renaming or removal of a file."
        count = [0]
        def deadly(f):
            def call(*args, **kwargs):
                count[0] += 1
                if (count[0], when) == (n, "before"): os.kill(os.getpid(), signal.SIGKILL)
                result = f(*args, **kwargs)
                if (count[0], when) == (n, "after"): os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call
        os.replace, Path.unlink = deadly(os.replace), deadly(Path.unlink)
        run_convert(tmp_path / "src", out)

    n = 0
    while not survived:
        n += 1
        for when in ("before", "after"):
            for f in out.parent.glob("*") if out.parent.exists() else ():
                f.unlink()
            child = mp.get_context("fork").Process(target=dies_at, args=(n, when))
            child.start()
            child.join()
            survived = child.exitcode == 0
            run_convert(tmp_path / "src", out)  # once more, undisturbed
            assert out.read_bytes() == (tmp_path / "reference.npy").read_bytes()
            assert left_over(out.parent) == ["x.json", "x.npy"]
    assert n >= 5


@linux
def test_workers_do_not_outlive_a_killed_parent_and_the_rest_is_done_later(tmp_path):
    make_folder(tmp_path / "src", 3000, {})
    script = ("from dpi_nbdev.convert import convert_images\n"
              "if __name__ == '__main__': convert_images(%r, %r, size=16, workers=2, progress=False)" % (str(tmp_path / "src"), str(tmp_path / "x.npy")))
    (tmp_path / "run.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stderr=subprocess.DEVNULL)
    def children(pid):
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try: fields = (p / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError: continue
            if int(fields[1]) == pid and fields[0] != "Z": found.append(int(p.name))
        return found
    journal = tmp_path / "x.npy.journal"
    while parent.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    workers = children(parent.pid)
    parent.kill()
    parent.wait()
    assert len(workers) >= 2 and not (tmp_path / "x.npy").exists()
    deadline = time.time() + 20
    while any(Path(f"/proc/{w}").exists() and "Z" not in Path(f"/proc/{w}/stat").read_text().rsplit(")", 1)[1].split()[0] for w in workers):
        assert time.time() < deadline, "a worker still lives"
        time.sleep(0.05)
    done = len(journal.read_text().splitlines())
    run_convert(tmp_path / "src", tmp_path / "x.npy")
    assert 0 < done < 3000 / 8
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    files = ImageFiles(tmp_path / "src", 16, progress=False)
    assert whole.shape == (3000, 16, 16, 3) and (whole[::100] == files[range(0, 3000, 100)]).all()


# -- conversion, otherwise disturbed ---------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_what_is_done_is_kept(tmp_path, monkeypatch):
    make_folder(tmp_path / "src", broken={})
    real, calls = os.fsync, [0]
    def full(fd):
        calls[0] += 1
        if calls[0] > 4: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="make room and run it again") as e:
        run_convert(tmp_path / "src", tmp_path / "x.npy")
    assert e.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fsync", real)
    made = []
    monkeypatch.setattr(convert, "make_chunk", lambda plan, k, f=convert.make_chunk: made.append(k) or f(plan, k))
    run_convert(tmp_path / "src", tmp_path / "x.npy")
    assert 0 < len(made) < 20 and np.load(tmp_path / "x.npy").shape[0] == 160


def test_no_room_for_the_array_is_said(tmp_path, monkeypatch):
    make_folder(tmp_path / "src", 20, {})
    def full(*_): raise OSError(errno.EFBIG, "File too large")
    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(OSError, match=r"x.npy.partial' of 15,360 bytes cannot be made \(File too large\)"):
        convert_images(tmp_path / "src", tmp_path / "x.npy", size=16, workers=1, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_file_repaired_between_two_runs_is_converted_again_and_nothing_else(tmp_path, monkeypatch):
    make_folder(tmp_path / "src", broken={100: None})
    with pytest.raises(ImageError, match="1 of 160 images .* '02/0100.png' cannot be decoded"):
        convert_images(tmp_path / "src", tmp_path / "x.npy", size=16, workers=1, progress=False)
    assert not (tmp_path / "x.npy").exists()
    (tmp_path / "src" / "02" / "0100.png").write_bytes(png(100))
    made = []
    monkeypatch.setattr(convert, "make_chunk", lambda plan, k, f=convert.make_chunk: made.append(k) or f(plan, k))
    convert_images(tmp_path / "src", tmp_path / "x.npy", size=16, workers=1, progress=False)
    assert made == [100 // 8]
    assert (np.load(tmp_path / "x.npy")[100] == decode_image(png(100), 16)).all()


def test_sources_that_make_no_array_are_refused_before_anything_is_written(tmp_path):
    make_folder(tmp_path / "src", 20, {})
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "src" / "grey.png")
    for kw, why in [(dict(size=16), "1 grey and 20 colour"), (dict(size=None, channels=3), "differ in size"), (dict(size=25), "smaller than 25×25"),
                    (dict(size=0), "size must be"), (dict(channels=4), "channels must be"), (dict(size=16, channels=2), "channels must be")]:
        with pytest.raises(ValueError, match=why):
            convert_images(tmp_path / "src", tmp_path / "new" / "x.npy", progress=False, **kw)
    with pytest.raises(ValueError, match="ends in .npy"):
        convert_images(tmp_path / "src", tmp_path / "x.npz")
    assert not (tmp_path / "new").exists()
    for channels in (1, 3):
        record = convert_images(tmp_path / "src", tmp_path / f"{channels}.npy", size=16, channels=channels, workers=1, progress=False)
        assert load_images(tmp_path / f"{channels}.npy", n_held_out=1).train.shape == (20, channels, 16, 16) and record["images"] == 21
    for f in (tmp_path / "src").rglob("*.png"):
        f.write_bytes(b"x")
    with pytest.raises(ImageError, match="21 of 21 images"):
        convert_images(tmp_path / "src", tmp_path / "none.npy", size=16, skip_broken=True, workers=1, progress=False)


def test_an_array_of_somebody_else_is_not_overwritten(tmp_path):
    make_folder(tmp_path / "src", 20, {})
    np.save(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(FileExistsError, match="remove it or choose another name"):
        run_convert(tmp_path / "src", tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]


# -- reading -------------------------------------------------------------------------------------------------------


@linux
def test_seventy_thousand_images_fit_where_their_pixels_do_not(tmp_path):
    "The array is 860 MB, its floats 3.4 GB; the process may allocate 700 MB in all."
    np.lib.format.open_memmap(tmp_path / "ffhq.npy", "w+", np.uint8, (70_000, 64, 64, 3))  # sparse
    script = """if True:
        import resource, sys
        import torch
        from dpi_nbdev.data import Batches, load_images
        resource.setrlimit(resource.RLIMIT_DATA, (700 * 2**20,) * 2)
        split = load_images(sys.argv[1], n_train=69_000, n_held_out=500)
        b = Batches(split.train, 256, seed=3, flip=True)
        for k in range(100): assert b.batch(k, k % 2, 2).shape == (128, 3, 64, 64)
        assert split.held_out[:].shape == (500, 3, 64, 64)
        print(*b.indices(1234)[:5].tolist())
        try: split.train[:]; print("no limit")
        except RuntimeError: print("limited")
        except MemoryError: print("limited")
    """
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "ffhq.npy")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    here = Batches(torch.empty(69_000), 256, seed=3).indices(1234)[:5]
    assert result.stdout.split() == [*map(str, here.tolist()), "limited"]  # and the order is the same in every process


def test_only_the_images_that_are_touched_are_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path / "src", 60, {})
    split = load_images(tmp_path / "src", 16, n_held_out=10, progress=False)
    import dpi_nbdev.files as files
    read = []
    monkeypatch.setattr(files, "read_image", lambda s, name, *a, f=files.read_image: read.append(name) or f(s, name, *a))
    x = Batches(split.train, 8, seed=1).batch(2)
    assert x.shape == (8, 3, 16, 16) and len(read) == 8
    assert (split.held_out[3] == ImageArray(split.held_out.pixels)[split.held_out.rows[3]]).all() and len(read) == 10


def test_links_are_followed_and_links_to_nothing_are_broken_images(tmp_path):
    make_folder(tmp_path / "real", 5, {})
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "there").symlink_to(tmp_path / "real")
    assert len(ImageFiles(tmp_path / "src", 16).names) == 5
    (tmp_path / "src" / "self.png").symlink_to("self.png")
    (tmp_path / "src" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ImageError, match="2 of 7 images"):
        ImageFiles(tmp_path / "src", 16)
    assert sorted(ImageFiles(tmp_path / "src", 16, skip_broken=True).broken) == ["gone.png", "self.png"]
    (tmp_path / "real" / "up").symlink_to(tmp_path / "src")
    with pytest.raises(ValueError, match="'there/up' leads back"):
        ImageFiles(tmp_path / "src", 16)


def test_encrypted_and_dishonest_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("a.png", png(0))
    data = bytearray((tmp_path / "x.zip").read_bytes())
    central = data.rindex(b"PK\x01\x02")
    for at, value, why in [(8, b"\x01\x00", "encrypted"), (24, (2**31).to_bytes(4, "little"), "claims to unpack")]:
        changed = bytearray(data)
        changed[central + at:central + at + len(value)] = value
        (tmp_path / "y.zip").write_bytes(changed)
        with pytest.raises(ValueError, match=why):
            ImageSource(tmp_path / "y.zip")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "zip", "npy", "npz"])
def test_random_damage_is_an_error_with_a_reason_or_an_image(tmp_path, kind):
    "Bits flipped, pieces cut out, ends cut off: nothing but a ValueError may come of it."
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    if kind == "npy": np.save(path, x)
    elif kind == "npz": np.savez(path, x, np.arange(6))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for i in range(3): z.writestr(f"{i}.png", png(i, 8))
            z.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i] for i in range(3)]}))
    else: Image.fromarray(x[0]).save(path)
    def read():
        if kind in ("npy", "npz"): return open_array(path)[0][:1]
        if kind != "zip": return decode_image(path)
        files = ImageFiles(path, 8, skip_broken=True, progress=False)
        read_labels(files.source, files.names)
        return files[[0]]
    whole, rng, failed = path.read_bytes(), random.Random(0), 0
    assert read() is not None
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3: del data[rng.randrange(len(data)):]
        if rng.random() < 0.1: del data[(i := rng.randrange(len(data) + 1)):i + 9]
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: assert read().dtype == np.uint8
            except ValueError as e: failed += bool(str(e))
    assert failed > 10


# -- three parts, idx files, photographs ---------------------------------------------


def test_parts_are_disjoint_and_what_is_held_out_does_not_depend_on_validation():
    with_it, without = digits(n_validation=100), digits()
    assert (with_it.held_out == without.held_out).all()
    assert (with_it.train == without.train[:1400]).all()
    assert (with_it.validation == without.train[1400:]).all()
    assert (with_it.validation_labels == without.train_labels[1400:]).all()
    assert without.validation is None and without.validation_labels is None
    assert "validation=(100, 1, 8, 8)" in repr(with_it) and "validation" not in repr(without)


def test_patches_of_the_two_photographs_share_no_row_between_parts(monkeypatch):
    "Photographs in which a pixel says the row that it is in."
    row = (np.arange(427) // 2).astype(np.uint8)
    photo = np.broadcast_to(row[:, None, None], (427, 640, 3))
    two = type("Two", (), dict(images=[photo, photo]))
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: two)
    split = photos(32, n_train=1500, n_held_out=1500, n_validation=1500)
    rows = {k: ((getattr(split, k) + 1) * 127.5).round().unique().tolist()
            for k in ("train", "validation", "held_out")}
    assert rows["train"] == list(range(118))           # rows 0 to 234; row 235 is shared
    assert rows["validation"] == list(range(117, 150))
    assert rows["held_out"] == list(range(149, 214))
    with pytest.raises(ValueError, match="size must be from 1 to 64, got 65"):
        photos(65, n_validation=1)
    assert len(photos(65, n_train=1, n_held_out=1).train) == 1


def write_idx(path, x):
    data = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def mnist_folder(path, packed):
    rng, end = np.random.default_rng(0), ".gz" if packed else ""
    path.mkdir()
    for part, n in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(path / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(path / f"{part}-labels-idx1-ubyte{end}", images[:, 0, 0] % 10)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_in_the_layout_of_mnist_is_read_as_such(tmp_path, monkeypatch, packed):
    folder = mnist_folder(tmp_path / "clothes", packed)
    split = load_images(folder, 28, n_held_out=10, n_validation=20, seed=3)
    assert [len(x) for x in (split.train, split.validation, split.held_out)] == [40, 20, 10]
    for part in ("train", "validation", "held_out"):
        x, labels = getattr(split, part)[:], getattr(split, f"{part}_labels")
        assert (((x[:, 0, 0, 0] + 1) * 127.5).round() % 10 == labels).all()
    monkeypatch.setattr("dpi_nbdev.data.FASHION_FOLDER", folder)
    again = load_images("fashion", n_held_out=10, n_validation=20, seed=3)
    assert (again.train[:] == split.train[:]).all()
    with pytest.raises(ValueError, match="1×28×28"):
        load_images("fashion", 32, n_held_out=10)
    monkeypatch.setattr("dpi_nbdev.data.FASHION_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_images("fashion")


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_idx_file_is_an_error_with_a_reason(tmp_path, packed):
    path = tmp_path / ("x.gz" if packed else "x")
    write_idx(path, np.arange(24, dtype=np.uint8).reshape(4, 3, 2))
    assert (read_idx(path) == np.arange(24).reshape(4, 3, 2)).all()
    whole, rng, failed = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3: del data[rng.randrange(len(data)):]
        path.write_bytes(data)
        try: assert read_idx(path).dtype == np.uint8
        except ValueError as e: failed += bool(str(e))
    assert failed > 50


def test_berkeley_patches_come_from_the_photographs_that_they_should(tmp_path, monkeypatch):
    for name in ("bsds432.zip", "cbsd68.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for i in range(12):
                z.writestr(f"{i:02}.png", png(100 * len(name) + i, 48))
    monkeypatch.setenv("DPI_BERKELEY", str(tmp_path))
    first = load_images("berkeley", 32, n_train=40, n_held_out=20, n_validation=8)
    again = load_images("berkeley", 32, n_train=40, n_held_out=20, n_validation=8)
    other = load_images("berkeley", 32, n_train=40, n_held_out=20, n_validation=8, seed=1)
    for part in ("train", "validation", "held_out"):
        assert (getattr(first, part) == getattr(again, part)).all()
        assert not (getattr(first, part) == getattr(other, part)).all()
    grey = load_images("berkeley", 16, n_train=4, n_held_out=2, channels=1)
    assert grey.train.shape == (4, 1, 16, 16) and grey.validation is None
    monkeypatch.setenv("DPI_BERKELEY", str(tmp_path / "no"))
    with pytest.raises(FileNotFoundError, match="no bsds432.zip .* DPI_BERKELEY=FOLDER"):
        load_images("berkeley")
