"""The commands as a user meets them: a run trained, stopped, killed, continued, sampled by one rank and by two."""
import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpi_nbdev.generate import generate_samples

BIN = Path(sys.executable).parent
TINY = ("drunet-dpi-vp-small", "--batch-size", 16, "--watch-every", 40, "--save-every", 10)


def call(*args, **kwargs):
    return subprocess.run([BIN / args[0], *map(str, args[1:])], capture_output=True, text=True, timeout=300, **kwargs)


def start(*args, **kwargs):
    # A test run in the background ignores SIGINT, and its children would inherit that.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([BIN / args[0], *map(str, args[1:])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen, **kwargs)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of 40 steps that nobody disturbed."
    run = tmp_path_factory.mktemp("train") / "run"
    done = call("dpi_train", *TINY, "--steps", 40, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_writes_everything_it_promises(trained):
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    assert {"experiment.yaml", "environment.json", "results.json", "log.jsonl", "lambda.jsonl", "model/model.safetensors", "model/config.json",
            "samples/step-000000040.png"} <= files
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    assert results["shape"] == [1, 8, 8] and results["experiment"]["training"]["steps"] == 40
    assert results["held_out"][-1][0] == 40 and 0 < results["held_out"][-1][1] < 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_that_was_stopped_ends_at_the_same_bits(trained, tmp_path, number, code):
    command = ("dpi_train", *TINY, "--steps", 40, "--out", tmp_path / "run")
    process = start(*command)
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/step-*.safetensors")) or process.poll() is not None)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert number == signal.SIGKILL or "training was stopped by" in err
    assert not (tmp_path / "run" / "model").exists(), "it was stopped too late to test anything"
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(trained)


def test_a_second_run_in_a_folder_gets_one_sentence(tmp_path):
    command = ("dpi_train", *TINY, "--steps", 4000, "--out", tmp_path / "run")
    first = start(*command)
    note = tmp_path / "run" / "running.json"
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: note.exists() and log.exists() or first.poll() is not None)
    facts = tmp_path / "run" / "environment.json"
    written = facts.stat().st_mtime_ns
    second = call(*command)
    said = f"is in use by process {first.pid} on {platform.node()}, since 20"
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert said in second.stderr.splitlines()[-1], second.stderr
    assert facts.stat().st_mtime_ns == written   # it changed nothing
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "the same call continues it" in err
    assert not note.exists()


def test_a_flipped_bit_in_the_weights_is_noticed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    done = call("dpi_sample", tmp_path / "run", "--n", 4)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{str(path)!r} is damaged" in done.stderr
    assert "give the command again that made it" in done.stderr


def test_a_full_disk_while_sampling_is_named(trained, tmp_path, monkeypatch):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))
    sample = ("dpi_sample", trained, "--n", 96, "--steps", 2, "--out")
    done = call(*sample, tmp_path / "a.npz", preexec_fn=limit)
    array = tmp_path / "a.npz.parts" / "images.npy"
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{str(array)!r}: File too large" in done.stderr

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    zeros, array = lambda x, streams: 0 * x, tmp_path / "b.npz.parts" / "images.npy"
    job = (zeros, 8, (1, 8, 8), tmp_path / "b.npz")
    generate_samples(*job, batch_size=4, progress=False)
    (array.parent / "done-000001").unlink()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="make room and start the same job again") as e:
        generate_samples(*job, batch_size=4, progress=False)
    assert e.value.errno == errno.ENOSPC
    assert f"{str(array)!r} was not written: No space left" in e.value.strerror


def test_a_run_makes_larger_images(trained, tmp_path):
    sample = ("dpi_sample", trained, "--n", 4, "--steps", 3, "--scale", 2, "--layers", "*m_body*", "--out")
    for name, more in (("a", ()), ("b", ("--slide", "linear")), ("c", ("--slide", "switch-0.5"))):
        done = call(*sample, tmp_path / f"{name}.npz", *more)
        assert done.returncode == 0 and "4 images of 16×16" in done.stdout, done.stderr
        assert np.load(tmp_path / f"{name}.npz")["arr_0"].shape == (4, 16, 16, 1)
    a, b, c = (np.load(tmp_path / f"{n}.npz")["arr_0"] for n in "abc")
    assert (a != b).any() and (b != c).any()
    for args, message in ((("--scale", "nan"), "scale must be above 0"), (("--scale", 1.3), "whole numbers"),
                          (("--mode", "hat"), "give a scale as well"), (("--scale", 1.125), "H and W must divide by"),
                          (("--scale", 2, "--slide", "fast"), "slide must be linear")):
        done = call("dpi_sample", trained, "--out", tmp_path / "never.npz", *args)
        assert done.returncode == 1 and "Traceback" not in done.stderr and message in done.stderr, done.stderr
    assert not list(tmp_path.glob("never*"))


def test_sampling_is_the_same_when_killed_and_on_two_ranks(trained, tmp_path):
    sample = ("dpi_sample", trained, "--n", 96, "--steps", 40, "--sampler", "ddim-eta1", "--batch-size", 8, "--out")
    whole = call(*sample, tmp_path / "whole.npz", "--png", tmp_path / "png", "--grid", tmp_path / "grid.png")
    assert whole.returncode == 0, whole.stderr
    images = np.load(tmp_path / "whole.npz")["arr_0"]
    assert images.shape == (96, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 0
    assert len(list((tmp_path / "png").iterdir())) == 96 and (tmp_path / "grid.png").exists()

    parts = tmp_path / "cut.npz.parts"
    process = start(*sample, tmp_path / "cut.npz")
    wait_for(lambda: (parts / "done-000001").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("done-*")}
    assert 0 < len(before) < 12 and not (tmp_path / "cut.npz").exists()
    process = start(*sample, tmp_path / "cut.npz")
    assert process.wait(120) == 0
    assert (np.load(tmp_path / "cut.npz")["arr_0"] == images).all() and not parts.exists()

    ranks = [start(*sample, tmp_path / "two.npz", env=dict(os.environ, RANK=str(r), WORLD_SIZE="2")) for r in range(2)]
    assert [p.wait(120) for p in ranks] == [0, 0]
    two = np.load(tmp_path / "two.npz")["arr_0"]
    assert np.abs(two.astype(int) - images).max() <= 1  # to rounding: one grey level


def test_an_experiment_in_a_file_and_a_dry_run(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: digits\nsize: 8\nn_held_out: 97\nnet: {widths: [8, 16], n_blocks: 1}\ntraining: {steps: 5, batch_size: 8, lr: 1e-3}\n")
    said = call("dpi_train", "mine.yaml", "--dry-run", "--groups", 1, cwd=tmp_path)
    assert said.returncode == 0 and "5 steps of 8 images" in said.stdout and "GiB" in said.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
    done = call("dpi_train", "mine.yaml", "--lam", "linear", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lam: linear" in (tmp_path / "runs" / "mine" / "experiment.yaml").read_text()


@pytest.mark.parametrize("args, message", [
    (("dpi_train", "drunet-mlp-vp"), "there is no experiment 'drunet-mlp-vp'"),
    (("dpi_train", "drunet-dpi-vp"), "names no data"),
    (("dpi_train", "drunet-dpi-vp", "--data", "nowhere"), "there are no images at 'nowhere'"),
    (("dpi_train", "drunet-dpi-vp-small", "--size", "16"), "not of 1×16×16"),
    (("dpi_train", "drunet-dpi-vp-small", "--precision", "int8"), "precision must be one of"),
    (("dpi_train", "drunet-dpi-flow-small", "--sampler", "ddim"), "is for vp, not for flow"),
    (("dpi_train", "bad.yaml"), "has no field netto"),
    (("dpi_sample", "empty"), "is not the folder of a run"),
    (("dpi_train", "twice.yaml"), "'twice.yaml': size is given twice"),
    (("dpi_train", "binary.yaml"), "'binary.yaml': "),
    (("dpi_train", "drunet-dpi-vp", "--size", "0"), "size must be a whole number, at least 1"),
    (("dpi_train", "drunet-dpi-vp", "--data", "pictures", "--size", "16", "--n-held-out", "2"), "n_held_out must be from 0 to 0"),
    (("dpi_train", "drunet-dpi-vp", "--data", "pictures", "--size", "16", "--n-held-out", "0", "--out", "pictures/run"), "lies among the images"),
    (("dpi_cost", "vgg"), "must be"),
    (("dpi_cost", "drunet", "--batch", "0"), "at least 1"),
    (("dpi_data", "pictures", "bad.yaml/x.npy", "--size", "16"), "bad.yaml' is a file"),
    (("dpi_data", "pictures", "x.npy", "--size", "16", "--workers", "0"), "workers must be"),
    (("dpi_data", "nowhere", "x.npy"), "nowhere"),
])
def test_bad_input_gets_one_sentence(tmp_path, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("netto: 1\n")
    (tmp_path / "twice.yaml").write_text("size: 8\nsize: 16\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\0")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "pictures" / "only.png")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    done = call(*args, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "something was left behind"


def test_a_disk_that_refuses_ends_with_a_sentence_and_can_be_mended(trained, tmp_path):
    command = ("dpi_train", *TINY, "--steps", 40, "--out", tmp_path / "run")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # every larger file fails with EFBIG
    done = call(*command, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    folder = str(tmp_path / "run" / "checkpoints")
    assert f"no checkpoint at step 40: File too large: '{folder}" in done.stderr
    assert "the trained model was not written" in done.stderr
    assert call(*command).returncode == 0 and weights(tmp_path / "run") == weights(trained)


def test_a_constant_rate_lets_a_run_be_made_longer(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: digits\nsize: 8\nn_held_out: 0\nnet: {widths: [4, 8], n_blocks: 1}\ntraining: {steps: 4, batch_size: 8, schedule: constant, warmup: 0}\n")
    for steps, status, said in ((4, 0, "no held-out images"), (6, 0, "6 steps"), (5, 1, "steps was 6 and is 5")):
        done = call("dpi_train", "mine.yaml", "--steps", steps, cwd=tmp_path)
        assert done.returncode == status and said in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize("name", ["dpi_demo", "dpi_data", "dpi_train", "dpi_sample", "dpi_evaluate", "dpi_tables", "dpi_cost"])
def test_help_needs_no_torch(name):
    script = f"import sys; sys.argv = ['{name}', '--help']\nfrom dpi_nbdev.cli import {name}\ntry: {name}()\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
