"""The command `dpi_demo` as a user meets it: a whole small run, the same seed twice, Ctrl-C, and a disk that refuses."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).parent / "dpi_demo"
FILES = {"report.html", "results.json", "samples.png", "lambda.png", "denoising.png", "dpi.safetensors", "t_map.safetensors"}


def demo(*args, **kwargs):
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two runs with the same settings, in folders of their own."
    folders = [tmp_path_factory.mktemp("demo") / "new" / "demo" for _ in range(2)]
    return [(demo("--steps", 6, "--seed", 3, "--out", folder), folder) for folder in folders]


def test_a_run_writes_everything_it_promises(runs):
    done, folder = runs[0]
    assert done.returncode == 0, done.stderr
    assert {p.name for p in folder.iterdir()} == FILES
    assert "ε-MSE" in done.stdout and "report.html" in done.stdout
    assert "loss=" in done.stderr  # the progress bars
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "src=\"http" not in page
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["steps"] == 6 and results["settings"]["seed"] == 3
    for model in results["models"].values():
        assert sum(model["samples"]["counts"]) == results["settings"]["n_samples"] == 256
        assert 0 < model["eps_mse"]["mean"] < 2 and model["eps_mse"]["std"] > 0


def test_the_same_seed_gives_the_same_results(runs):
    a, b = (json.loads((folder / "results.json").read_text(encoding="utf-8")) for _, folder in runs)
    assert a.pop("seconds") and b.pop("seconds")
    assert a == b
    weights = [(folder / "dpi.safetensors").read_bytes() for _, folder in runs]
    assert weights[0] == weights[1]


def test_seconds_choose_the_steps(tmp_path):
    done = demo("--seconds", 0.5, "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))["settings"]["steps"] >= 20


def test_ctrl_c_ends_with_a_sentence(tmp_path):
    # A test run in the background ignores SIGINT, and its children would inherit that.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([COMMAND, "--out", tmp_path / "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    process.stdout.readline()  # "Training two small networks …": it is under way
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and err.rstrip().endswith("dpi_demo: interrupted; no file is left half-written")
    assert not (tmp_path / "demo").exists()


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "results.json").write_text("old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))  # every larger file fails with EFBIG
    done = demo("--steps", 2, "--out", out, preexec_fn=limit, env=dict(os.environ, MPLCONFIGDIR=str(tmp_path)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dpi_demo: " in done.stderr
    assert (out / "results.json").read_text() == "old"
    assert [p.name for p in out.iterdir()] == ["results.json"]


@pytest.mark.parametrize("args, message", [
    (("--steps", "-1"), "steps must be a whole number, at least 1; got -1"),
    (("--seconds", "0"), "seconds must be a positive number"),
    (("--out", "taken"), "is a file"),
    (("--out", "taken/below"), "a part of its path is a file"),
])
def test_bad_input_gets_one_sentence(tmp_path, args, message):
    (tmp_path / "taken").write_text("a file")
    done = demo(*args, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = demo("--out", tmp_path / "locked")
    assert done.returncode == 1 and "cannot be written to" in done.stderr
