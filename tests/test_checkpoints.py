"""Files that certify themselves: every cut, every flipped bit, every stranger is noticed, and a full disk harms nothing."""
import random
import subprocess
import sys
import warnings

import pytest
import torch

from dpi_nbdev.checkpoints import Checkpoints, load_weights, pack, read_state, save_weights, unpack


def state(step):
    return dict(step=step, network={"w": torch.full((7, 3), float(step))}, note=[1, (2.5, None)])


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path):
    path = Checkpoints(tmp_path).write(5, state(5))
    data = path.read_bytes()
    assert read_state(path)["step"] == 5
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="damaged"):
            read_state(path)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1:])
        with pytest.raises(ValueError, match="damaged"):
            read_state(path)


def test_unpack_refuses_what_is_no_state_of_ours():
    from safetensors.torch import save
    with pytest.raises(ValueError, match="not a state of this library"):
        unpack(save({"w": torch.zeros(3)}))
    with pytest.raises(ValueError, match="not a state of this library"):
        unpack(save({"w": torch.zeros(3)}, {"format": "pt"}))
    for data in (b"", b"\x80\x04]", random.Random(0).randbytes(500)):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            unpack(data)


def test_names_are_compatible_with_sha256sum(tmp_path):
    path = Checkpoints(tmp_path).write(123, state(123))
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout[:16]
    assert path.name == f"step-000000123-{digest}.safetensors"


def test_the_last_k_are_kept_and_the_same_step_twice_is_one(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        store.write(step, state(step))
    store.write(30, state(30) | dict(note="again"))
    assert [s for s, _ in store.files()] == [20, 30] and store.newest()[1]["note"] == "again"
    store.write(25, state(25))  # a run that went back: what lies ahead is not deleted by it
    assert [s for s, _ in store.files()] == [20, 25, 30]
    one = Checkpoints(tmp_path / "one", keep=1)
    for step in (1, 2):
        one.write(step, state(step))
    assert [s for s, _ in one.files()] == [2]


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.write(1, state(1))
    save_weights(torch.nn.Linear(2, 2), tmp_path / "w.safetensors")

    def never(*args, **kwargs):
        raise AssertionError("something was unpickled")
    import pickle
    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, never)
    assert store.newest()[0] == 1
    load_weights(torch.nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert b"pickle" not in pack(state(1))


FULL = """
import resource, signal, sys, torch
from dpi_nbdev.checkpoints import Checkpoints
store = Checkpoints(sys.argv[1], keep=2)
small = lambda step: dict(step=step, w=torch.zeros(10))
store.write(1, small(1)); store.write(2, small(2))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))   # the disk is full after 20 kB
try: store.write(3, dict(step=3, w=torch.zeros(100_000)))
except OSError as e: print(type(e).__name__, [s for s, _ in store.files()], store.newest()[0])
store.write(4, small(4)); print([s for s, _ in store.files()])
"""


def test_a_disk_that_refuses_while_writing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["OSError [1, 2] 2", "[2, 4]"], done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # and no half file


def test_a_reader_never_meets_half_a_file(tmp_path):
    "One process writes as fast as it can; this one reads, all the time."
    writer = "import sys, torch, itertools\nfrom dpi_nbdev.checkpoints import Checkpoints\nstore = Checkpoints(sys.argv[1], keep=3)\n" \
             "for step in itertools.count(1): store.write(step, dict(step=step, w=torch.full((100_000,), float(step))))"
    child = subprocess.Popen([sys.executable, "-c", writer, tmp_path])
    store, seen = Checkpoints(tmp_path), set()
    try:
        while len(seen) < 40 and child.poll() is None:
            for step, path in reversed(store.files()):
                try:
                    found = read_state(path)
                except FileNotFoundError:  # deleted as the oldest, while we looked at the newer ones
                    continue
                assert found["step"] == step and (found["w"] == step).all()
                seen.add(step)
    finally:
        child.kill()
        child.wait()
    assert len(seen) >= 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is set aside
        assert store.newest()[0] >= max(seen)
