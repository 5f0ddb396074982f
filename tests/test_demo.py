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
import torch

COMMAND = Path(sys.executable).parent / "dpi_demo"
MODELS = {"t_map", "film", "gains", "dpi", "photo_map", "photo_gains"}
PICTURES = {"photos", "denoising", "samples", "lambda"}
FILES = ({"report.html", "results.json"} | {f"{name}.png" for name in PICTURES}
         | {f"{name}.safetensors" for name in MODELS})


def demo(*args, **kwargs):
    "Runs the command to its end."
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True,
                          timeout=600, **kwargs)


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A whole run of the command, as short as it gets."
    folder = tmp_path_factory.mktemp("demo") / "new" / "demo"
    return demo("--steps", 6, "--seed", 3, "--out", folder), folder


def test_a_run_writes_everything_it_promises(run):
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert {p.name for p in folder.iterdir()} == FILES
    assert "ε-MSE" in done.stdout and "report.html" in done.stdout
    assert "training time" in done.stdout   # the sentences
    assert "step/s" in done.stderr          # the progress bar
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4 and "src=\"http" not in page


def test_the_numbers_are_whole(run):
    results = results_of(run[1])
    assert results["settings"]["steps"] == 6 and results["settings"]["seed"] == 3
    assert {*results["models"], *results["photos"]["models"]} == MODELS
    for model in results["models"].values():
        assert sum(model["samples"]["counts"]) == results["settings"]["n_samples"] >= 512
        assert 0 < model["eps_mse"]["mean"] < 2 and model["eps_mse"]["se"] > 0
    for name in MODELS:
        assert results["seconds"][name]["training"] > 0


def test_the_first_sentence_is_about_time(run):
    results = results_of(run[1])
    page = (run[1] / "report.html").read_text(encoding="utf-8")
    first = page.partition("</h1>")[2].partition("</p>")[0]
    assert "training time" in first
    assert first.endswith(results["sentences"][0])


def test_workers_do_not_change_the_results():
    "One process or two, and the same seed twice: the same bits."
    from dpi_nbdev.demo import DemoSettings, run_demo
    settings = DemoSettings(steps=5, seed=3, widths=(8, 16), photo_widths=(8, 16),
                            n_samples=64, sampler_steps=4, levels=3, noise_seeds=2)
    a, b = (run_demo(settings, progress=False, workers=n) for n in (1, 2))
    for run in (a, b):
        assert run.results.pop("seconds") and run.results.pop("sentences")
    assert json.dumps(a.results) == json.dumps(b.results)
    for name, model in a.models.items():
        other = b.models[name].state_dict()
        assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


def test_what_goes_wrong_in_a_worker_is_raised():
    "Raised here, and no process is left behind."
    from multiprocessing import active_children

    from dpi_nbdev.demo import DemoSettings, run_demo
    settings = DemoSettings(steps=2, widths=(8, 16), photo_widths=(8, 16), levels=5000)
    with pytest.raises(ValueError, match="n must be a whole number, from 1 to 1000"):
        run_demo(settings, progress=False, workers=2)
    assert not active_children()


def test_seconds_choose_the_steps(tmp_path):
    from dpi_nbdev.demo import DemoSettings, within
    few = within(0.1, DemoSettings())
    assert few.steps == 20
    assert within(600., DemoSettings(), workers=2).steps > 100
    done = demo("--seconds", "-2", "--out", tmp_path / "demo")
    assert done.returncode == 1 and "seconds must be a positive number" in done.stderr


def test_ctrl_c_ends_with_a_sentence(tmp_path):
    # A test run in the background ignores SIGINT, and its children would inherit that.
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([COMMAND, "--out", tmp_path / "demo"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=listen)
    process.stdout.readline()  # "Training six small networks …": it is under way
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)   # the workers hold stderr until they end
    assert process.returncode == 130
    last = "dpi_demo: interrupted; no file is left half-written"
    assert "Traceback" not in err and err.rstrip().endswith(last)
    assert not (tmp_path / "demo").exists()


SMALL = """
import sys
import dpi_nbdev.demo as demo
from dpi_nbdev.cli import dpi_demo
class Small(demo.DemoSettings):
    def __init__(self, steps, seed):
        super().__init__(steps, seed, widths=(8, 16), photo_widths=(8, 16), n_samples=16,
                         sampler_steps=2, levels=2, noise_seeds=2)
demo.DemoSettings = Small
if __name__ == "__main__": dpi_demo()
"""


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "results.json").write_text("old")
    (tmp_path / "dpi_demo").write_text(SMALL)
    # Every larger file fails with EFBIG.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
    command = [sys.executable, tmp_path / "dpi_demo", "--steps", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600,
                          preexec_fn=limit, env=dict(os.environ, MPLCONFIGDIR=str(tmp_path)))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
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
