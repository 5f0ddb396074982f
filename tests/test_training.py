"""Runs that are killed, stopped, starved of disk and resumed, by real signals in real processes."""
import errno
import json
import multiprocessing
import os
import platform
import random
import resource
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dpi_nbdev.checkpoints import Checkpoints, read_state
from dpi_nbdev.data import digits
from dpi_nbdev.diffusion import DiffusionLoss, VPDiffusion
from dpi_nbdev.dpi import DPI
from dpi_nbdev.training import (Run, TrainingStopped, TrainSettings, every, lambda_log,
                                sample_grid, train)

SETTINGS = TrainSettings(steps=240, batch_size=8, ema=0.99)
FORK = multiprocessing.get_context("forkserver")  # a server that has imported everything forks each child in milliseconds
FORK.set_forkserver_preload(["accelerate", "dpi_nbdev.training", "dpi_nbdev.data", "dpi_nbdev.diffusion", "sklearn.datasets", "torch._dynamo", "pytest"])


def model():
    "Convolutions, batch norm, dropout: parameters, buffers and the global generator all matter."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1),
                        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    return DPI(net, init="fresh")


def run(out, settings=SETTINGS, **kwargs):
    data = digits()
    options = dict(held_out=data.held_out[:64], check_every=60, save_every=3, log_every=20, progress=False) | kwargs
    return train(model(), DiffusionLoss(VPDiffusion()), data.train, settings, out, **options)


def child(out, deadly=None, limit=None, settings=SETTINGS, slow=0.):
    "What a child process does: train, and die at its `deadly`-th request to the operating system while saving."
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if deadly:
        kill_at(deadly)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(out, settings, watch=[lambda step, model: time.sleep(slow)])
    except TrainingStopped as e:
        Path(f"{out}.said").write_text(str(e))
        sys.exit(e.exit_code)


def kill_at(n):
    import tempfile
    left = [n]

    def watched(f, name):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                if name == "write_bytes":
                    f(args[0], args[1][:len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return call
    for owner, name in [(tempfile, "mkstemp"), (Path, "write_bytes"), (os, "fsync"), (os, "chmod"), (os, "replace"), (Path, "unlink")]:
        setattr(owner, name, watched(getattr(owner, name), name))


def start(*args, **kwargs):
    process = FORK.Process(target=child, args=args, kwargs=kwargs)
    process.start()
    return process


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def checkpoints(out):
    return sorted((Path(out) / "checkpoints").glob("step-*"))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run that nobody disturbed."
    out = tmp_path_factory.mktemp("straight") / "run"
    return run(out), out


def test_killed_at_many_instants_and_resumed_to_the_same_bits(straight, tmp_path):
    rng, kills, steps = random.Random(0), 0, []
    for i in range(18):
        if i % 2:  # in the middle of saving: at the i-th request to the operating system
            process = start(tmp_path / "run", deadly=3 + i)
        else:      # at any instant after it has saved something new
            before = checkpoints(tmp_path / "run")[-1:]
            process = start(tmp_path / "run", slow=0.01)
            until(lambda: checkpoints(tmp_path / "run")[-1:] != before or not process.is_alive())
            time.sleep(rng.uniform(0, 0.06))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        found = checkpoints(tmp_path / "run")
        for path in found:
            read_state(path)  # whole, every one of them
        steps.append(int(found[-1].name[5:14]) if found else 0)
    assert kills >= 14 and steps == sorted(steps) and 0 < steps[5] < 240, (kills, steps)
    process = start(tmp_path / "run")
    process.join(60)
    assert process.exitcode == 0
    a, b = (read_state(checkpoints(out)[-1]) for out in (straight[1], tmp_path / "run"))
    assert a["step"] == 240 and equal(a, b), (steps, [k for k in a if k != "seconds" and not equal(a[k], b[k])])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [l["step"] for l in log if "loss" in l] == list(range(20, 241, 20))
    assert [l["step"] for l in log if "held_out" in l] == [60, 120, 180, 240]
    end = run(tmp_path / "run")  # a finished run is returned, not trained on
    assert torch.equal(end.losses, straight[0].losses) and end.held_out == straight[0].held_out


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(straight, tmp_path):
    out = tmp_path / "run"
    process = start(out, slow=0.01)
    until(lambda: checkpoints(out))
    before = json.loads((out / "running.json").read_text())
    with pytest.raises(BlockingIOError, match="is in use by process") as e:
        run(out)
    said, holder = str(e.value), f"process {process.pid} on {platform.node()}"
    assert str(out) in said and holder in said and before["since"] in said
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert json.loads((out / "running.json").read_text()) == before  # the dead one's
    end = run(out)  # takes over
    assert torch.equal(end.losses, straight[0].losses)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [l["step"] for l in log if "loss" in l] == list(range(20, 241, 20))
    assert not (out / "running.json").exists()


def test_a_run_in_the_same_process_is_refused_too_and_the_first_goes_on(tmp_path):
    few, said = replace(SETTINGS, steps=4), []

    def again(step, average):
        with pytest.raises(BlockingIOError) as e:
            run(tmp_path / "run", few)
        said.append(str(e.value))
    assert len(run(tmp_path / "run", few, watch=[again]).losses) == 4
    assert len(said) == 4 and all(f"process {os.getpid()} on" in s for s in said)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_stop(straight, tmp_path, number, code):
    process = start(tmp_path / "run", slow=0.01)
    until(lambda: checkpoints(tmp_path / "run"))
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    said = (tmp_path / "run.said").read_text()
    assert f"training was stopped by {number.name} at step " in said and "the same call continues it" in said
    step = int(said.split("at step ")[1].split()[0])
    assert not (tmp_path / "run" / "running.json").exists()
    assert checkpoints(tmp_path / "run")[-1].name.startswith(f"step-{step:09d}-")
    end = run(tmp_path / "run")
    assert torch.equal(end.losses, straight[0].losses)


def test_a_second_ctrl_c_is_obeyed_at_once(tmp_path):
    process = start(tmp_path / "run", slow=20.)  # a step that does not end
    until(lambda: (tmp_path / "run" / "log.jsonl").exists())
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 1


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(straight, tmp_path):
    few = replace(SETTINGS, steps=9, schedule="constant", warmup=0.)
    want = run(tmp_path / "straight", few)
    run(tmp_path / "run", replace(few, steps=6))
    for path, damage in zip(checkpoints(tmp_path / "run")[1:], (lambda d: d[:-9] + b"\0" + d[-8:],)):
        path.write_bytes(damage(path.read_bytes()))
    (tmp_path / "run" / "checkpoints" / "step-000000007.safetensors").write_bytes(b"from elsewhere")
    with pytest.warns(UserWarning, match="set aside") as caught:
        end = run(tmp_path / "run", few)
    assert len(caught) == 2 and all("going on from step 3" in str(w.message) for w in caught)
    assert torch.equal(end.losses, want.losses)
    for path in checkpoints(tmp_path / "run"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="can be used; choose another folder"):
        run(tmp_path / "run", few)


@pytest.mark.parametrize("settings", [dict(precision="bf16", accumulate=2), dict(precision="fp16"), dict(flip=True, ema=0.5)])
def test_resumed_in_every_mode(tmp_path, settings):
    few = replace(SETTINGS, schedule="constant", warmup=0., **settings)
    want = run(tmp_path / "straight", replace(few, steps=8), check_every=4)
    run(tmp_path / "run", replace(few, steps=4), check_every=4)
    end = run(tmp_path / "run", replace(few, steps=8), check_every=4)  # the rates so far are the same: the run is made longer
    assert torch.equal(end.losses, want.losses)
    a, b = (read_state(checkpoints(tmp_path / name)[-1]) for name in ("straight", "run"))
    assert a["step"] == 8 and equal(a, b)
    assert ("scale" in a["scaler"]) == (few.precision == "fp16")


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch):
    few = replace(SETTINGS, schedule="constant", warmup=0.)
    run(tmp_path / "run", replace(few, steps=4))
    before, real = {p: p.read_bytes() for p in checkpoints(tmp_path / "run")}, Path.write_bytes

    def full(path, data):
        if "step-" in path.name and not path.name.startswith("step-000000004"):
            real(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="no checkpoint at step .*the disk is full.*training goes on .the last one is .*step-000000004") as caught:
        end = run(tmp_path / "run", replace(few, steps=10))
    assert len(caught) == 3 and len(end.losses) == 10 and end.losses.isfinite().all()
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()} == before
    monkeypatch.undo()
    assert torch.equal(run(tmp_path / "run", replace(few, steps=10)).losses, end.losses)  # and from there once more, with room


def test_a_full_disk_is_named_by_whatever_is_written_on_the_way(tmp_path):
    "/dev/full takes nothing: what a log or a curve would write there is a warning."
    few = replace(SETTINGS, steps=3)
    log, curve = tmp_path / "log.jsonl", tmp_path / "lambda.jsonl"
    curve.symlink_to("/dev/full")

    def fill(step, average):
        log.unlink()
        log.symlink_to("/dev/full")
    watch = [every(3, lambda_log(tmp_path)), every(2, fill)]
    with pytest.warns(UserWarning, match="training goes on") as caught:
        run(tmp_path, few, watch=watch, log_every=1)
    said = [str(w.message) for w in caught if "training goes on" in str(w.message)]
    assert any(s.startswith(f"no log of step 3: {str(log)!r} was not") for s in said)
    assert any(s.startswith(f"{str(curve)!r} was not written: No space") for s in said)


def test_a_picture_that_finds_no_room_is_a_warning(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    monkeypatch.setattr(os, "fsync", full)
    picture = sample_grid(tmp_path, lambda model: torch.zeros(4, 1, 8, 8))
    path = tmp_path / "step-000000007.png"
    with pytest.warns(UserWarning) as caught:
        picture(7, None)
    (said,) = [str(w.message) for w in caught]
    why = "was not written (an older file of that name is untouched)"
    assert said == f"the disk is full: {str(path)!r} {why}; training goes on"
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_does_not_stop_a_run(tmp_path):
    process = start(tmp_path / "run", limit=4_000, settings=replace(SETTINGS, steps=12))
    process.join(60)
    assert process.exitcode == 0 and checkpoints(tmp_path / "run") == []


def test_without_a_folder_nothing_is_written_and_signals_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    handlers = []
    run(None, replace(SETTINGS, steps=3), watch=[lambda step, model: handlers.append(signal.getsignal(signal.SIGINT))])
    assert list(tmp_path.iterdir()) == [] and handlers == [before] * 3
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    state, data, net = torch.random.get_rng_state(), digits(), model()
    torch.random.set_rng_state(state)
    train(net, DiffusionLoss(VPDiffusion()), data.train, replace(SETTINGS, steps=2), progress=False)
    assert torch.equal(torch.rand(3), want)  # the caller's random numbers go on as if nothing had happened


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def poison(step, average):
        if step == 5:
            with torch.no_grad():
                next(broken.parameters()).fill_(float("inf"))
    broken = model()
    with pytest.raises(FloatingPointError, match="a parameter stopped being finite at step 5 of 240; the last good checkpoint is .*step-000000004"):
        train(broken, DiffusionLoss(VPDiffusion()), digits().train, SETTINGS, tmp_path, save_every=1, watch=[poison], progress=False)
    assert len(checkpoints(tmp_path)) == 3
    assert not (tmp_path / "running.json").exists()


def test_compiled(tmp_path):
    few = replace(SETTINGS, steps=3)
    import torch._dynamo
    with pytest.MonkeyPatch.context() as m:
        # A dropout mask is drawn in the order of memory, which a compiler may change.
        m.setattr(nn.Dropout, "forward", lambda self, x: x)
        plain = run(None, few)
        # The path, not the code generator.
        eager = partial(torch.compile, backend="eager")
        m.setattr(torch, "compile", eager)
        compiled = run(tmp_path / "run", replace(few, compile=True))
    assert torch.allclose(compiled.losses, plain.losses, rtol=1e-3)
    assert all("_orig_mod" not in k for k in compiled.model.state_dict())
    torch._dynamo.reset()


def test_the_loop_adds_little():
    "Everything but forward, backward and optimizer, for this tiny network, in microseconds a step: the loop itself must be cheap."
    run = Run(DPI(nn.Conv2d(1, 1, 1)), DiffusionLoss(VPDiffusion()), digits().train, replace(SETTINGS, steps=400))
    times = []
    for _ in range(200):
        x = run.batch()
        run.gradients(x)
        start = time.perf_counter()
        run.clip()
        middle = time.perf_counter()
        run.update()
        again = time.perf_counter()
        run.follow()
        run.look()
        times.append(middle - start + time.perf_counter() - again)
    assert sorted(times)[100] < 2e-3, sorted(times)[100]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", replace(SETTINGS, steps=20))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
