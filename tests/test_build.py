"""What a notebook cell cannot show about built and saved models: processes killed, other processes, the real schedules, every combination."""
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpi_nbdev.build import build_model, load_model, save_model
from dpi_nbdev.core import sealed, unsealed
from dpi_nbdev.conditioning import NCSNv2, TimestepMLP
from dpi_nbdev.adm import ADM
from dpi_nbdev.diffusion import VPDiffusion
from dpi_nbdev.dpi import DPI
from dpi_nbdev.drunet import DRUNet
from dpi_nbdev.flow import FlowMatching, Interpolant
from dpi_nbdev.monotone import LinearLambda, MonotoneLambda

SMALL = dict(drunet=dict(in_channels=1, widths=(8, 16), n_blocks=1),
             adm=dict(in_channels=1, width=32, multipliers=(1,), attention_at=(8,), head_channels=16, image_size=8))
CONDITIONINGS = ("dpi", "t_map", "sigma_map", "ncsnv2", "mlp", "none")
IMPOSSIBLE = {("drunet", "mlp", "vp"), ("drunet", "mlp", "flow"), *itertools.product(SMALL, ("sigma_map", "ncsnv2"), ("flow",))}
COMBINATIONS = [c for c in itertools.product(SMALL, CONDITIONINGS, ("vp", "flow")) if c not in IMPOSSIBLE]


def shaken(model):
    "A little noise on every parameter: nothing is zero, and the two sets of DPI differ."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += (0.1 * torch.randn(p.shape, generator=g)).to(p.dtype)
    return model.eval()


def built(backbone="drunet", conditioning="dpi", process="vp", **kwargs):
    return shaken(build_model(backbone, conditioning, process, seed=0, **SMALL[backbone], **kwargs))


def outputs(model, process="vp"):
    g, top = torch.Generator().manual_seed(1), 999 if process == "vp" else 1
    x = torch.randn(4, 1, 8, 8, generator=g).to(next(model.parameters()).dtype)
    with torch.no_grad():
        return [model(x, s) for s in (torch.tensor([0, 0.2, 0.7, 1]) * top, 0.4 * top, torch.tensor(0.9) * top)]


def assert_same(a, b):
    assert all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(a, b))


# -- building -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 7, 100, 1000])
def test_tables_are_those_of_the_process(T):
    process = VPDiffusion(T)
    for how in (process, *["vp"] * (T == 1000)):
        assert torch.equal(build_model("drunet", "sigma_map", how, **SMALL["drunet"]).sigma, process.sigma.float())
        assert torch.equal(build_model("drunet", "ncsnv2", how, **SMALL["drunet"]).std, (1 - process.alpha_bar).sqrt().float())
        dpi = build_model("drunet", "dpi", how, **SMALL["drunet"])
        assert (dpi.lam.n_knots, dpi.lam.s_min, dpi.lam.s_max) == (T, process.s_min, process.s_max)
        assert build_model("drunet", "t_map", how, **SMALL["drunet"]).T == T


def test_a_schedule_of_ones_own_is_taken_from_the_process():
    process = VPDiffusion.from_betas(torch.linspace(1e-3, 0.3, 40))
    model = build_model("drunet", "sigma_map", process, **SMALL["drunet"])
    torch.testing.assert_close(model.sigma, process.sigma.float(), rtol=1e-6, atol=0)
    assert not torch.allclose(model.sigma, VPDiffusion(40).sigma.float(), rtol=0.1)


def test_a_seed_is_refused_where_it_would_not_decide(monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    with pytest.raises(ValueError, match="the default device is cuda"):
        build_model("drunet", "none", seed=0, **SMALL["drunet"])


def test_a_schedule_that_ends_at_pure_noise_has_no_sigma_map():
    process = VPDiffusion().zero_terminal_snr()
    with pytest.raises(ValueError, match="sigma must be positive and finite at every step, got values from 0.01.* to inf"):
        build_model("drunet", "sigma_map", process, **SMALL["drunet"])


@pytest.mark.parametrize("process", [FlowMatching(), Interpolant("trigonometric")], ids=repr)
def test_a_flow_may_be_given_by_name_or_as_itself(process):
    for conditioning in ("dpi", "t_map", "mlp", "none"):
        a, b = (build_model("adm", conditioning, p, **SMALL["adm"]) for p in ("flow", process))
        assert repr(a) == repr(b)
    for conditioning in ("sigma_map", "ncsnv2"):
        with pytest.raises(ValueError, match="flow"):
            build_model("adm", conditioning, process)


def test_ncsnv2_s_score_is_what_the_process_makes_of_its_noise():
    process, model = VPDiffusion(), built(conditioning="ncsnv2")
    x, s = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 10, 300, 600, 999])
    with torch.no_grad():
        score = model.score(x, s)
        torch.testing.assert_close(score, process.convert(x, model(x, s), s, "eps", "score"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", sorted(IMPOSSIBLE))
def test_what_makes_no_sense_is_refused(combination):
    with pytest.raises(ValueError, match="DRUNet has no normalisation|predicts a velocity|infinite at t = 0"):
        build_model(*combination)


@pytest.mark.parametrize("conditioning", ["t_map", "sigma_map", "ncsnv2"])
def test_a_conditioned_model_compiled_still_refuses_a_bad_scalar(conditioning):
    model = built("drunet", conditioning)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, torch.tensor([3., 900.])), model(x, torch.tensor([3., 900.])))
    with pytest.raises(ValueError, match="s must be in"):
        compiled(x, torch.tensor([3., 1001.]))


# -- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_every_combination_comes_back_to_the_bit(combination, tmp_path):
    for kwargs in ([dict(lam="linear"), dict(init="fresh")] if combination[1] == "dpi" else [{}]):
        model = built(*combination, **kwargs)
        save_model(tmp_path, model)
        random = torch.get_rng_state()
        back = load_model(tmp_path)
        assert torch.equal(torch.get_rng_state(), random) and not back.training and repr(back) == repr(model)
        assert not any(t.is_meta for t in (*back.parameters(), *back.buffers()))
        assert all(p.requires_grad for p in back.parameters())
        assert_same(outputs(back, combination[2]), outputs(model, combination[2]))


def small_net():
    torch.manual_seed(0)
    return DRUNet(1, 1, (8, 16), 1)


@pytest.mark.parametrize("model", [
    DPI(small_net(), MonotoneLambda(5, 0, 999, "paper"), select="*.res.0.*", init="fresh", granularity="unique"),
    DPI(small_net(), LinearLambda(0, 999), select=lambda name, module, p: p.shape[-1] == 2),
    built(conditioning="dpi", ones_channel=True).to(memory_format=torch.channels_last),
    built("adm", "mlp").to(memory_format=torch.channels_last),
    built("adm", "dpi").to(torch.bfloat16), built("adm", "sigma_map").double(), built("drunet", "ncsnv2").to(torch.bfloat16),
], ids=["pattern", "predicate", "ones, channels last", "adm, channels last", "bfloat16", "float64", "bfloat16 ncsnv2"])
def test_odd_ones_come_back_to_the_bit(model, tmp_path):
    shaken(model)
    save_model(tmp_path, model)
    back = load_model(tmp_path)
    assert all(p.stride() == q.stride() for p, q in zip(model.parameters(), back.parameters()))
    assert_same(back.state_dict().values(), model.state_dict().values())
    assert_same(outputs(back), outputs(model))
    if isinstance(model, DPI):
        assert back.names == model.names


def test_class_labels_pass_through(tmp_path):
    model = shaken(TimestepMLP(ADM(**SMALL["adm"], out_channels=1, embedding=True, n_classes=10)))
    save_model(tmp_path, model)
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 9])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(x, 7, y), model(x, 7, y))


def test_the_same_model_makes_the_same_bytes(tmp_path):
    for d in "ab":
        save_model(tmp_path / d, built("adm", "dpi"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def test_another_process_loads_it_without_the_code_that_trains(tmp_path):
    model = built("adm", "dpi")
    save_model(tmp_path, model)
    code = f"""
import sys, torch, hashlib
from dpi_nbdev.build import load_model
x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
torch.set_num_threads({torch.get_num_threads()})
with torch.no_grad(): y = load_model({str(tmp_path)!r})(x, torch.tensor([3., 500.]))
trains = [m for m in ("training", "samplers", "data", "experiments") if "dpi_nbdev." + m in sys.modules]
print(hashlib.sha256(y.numpy().tobytes()).hexdigest(), *trains)
"""
    with torch.no_grad():
        y = model(torch.linspace(-1, 1, 128).view(2, 1, 8, 8), torch.tensor([3., 500.]))
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert got == [hashlib.sha256(y.numpy().tobytes()).hexdigest()]


def test_loading_does_not_touch_the_file_s_memory(tmp_path):
    save_model(tmp_path, built())
    back = load_model(tmp_path)
    before = outputs(back)
    save_model(tmp_path, built(conditioning="none"))  # the file is replaced under it
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_same(outputs(back), before)


# -- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", built())
    return tmp_path / "model"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_file_cut_short_anywhere_is_an_error(folder, file):
    whole = (folder / file).read_bytes()
    for n in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 3}:
        (folder / file).write_bytes(whole[:n])
        with pytest.raises(ValueError, match="not a whole safetensors file|is not JSON"):
            load_model(folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load_model(folder)


def test_a_model_whose_guards_are_armed_is_saved_all_the_same(tmp_path):
    model = built()
    model(torch.randn(2, 1, 8, 8), torch.tensor([1., 2.])).sum().backward()  # DPI's own hooks are on now
    save_model(tmp_path, model)
    assert_same(outputs(load_model(tmp_path)), outputs(model))


def test_any_edit_of_the_config_is_noticed(folder):
    config = json.loads((folder / "config.json").read_text())
    def leaves(node, path=()):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        yield from itertools.chain.from_iterable(leaves(v, (*path, k)) for k, v in items) if items else [path]
    paths = list(leaves(config))
    assert len(paths) > 15
    for path in paths:
        edited = json.loads(json.dumps(config))
        node = edited
        for k in path[:-1]:
            node = node[k]
        v = node[path[-1]]
        node[path[-1]] = not v if isinstance(v, bool) else v + 1 if isinstance(v, (int, float)) else v + "x"
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match="this version reads format 1" if path == ("format_version",) else "were not saved together"):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True))  # the same content, written otherwise
    load_model(folder)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("net.m_head.weight"), "1 difference: missing net.m_head.weight"),
    (lambda s: s.update({"__reduce__": torch.zeros(1)}), "1 difference: unknown __reduce__"),
    (lambda s: s.update({"net.m_head.weight": torch.zeros(8, 1, 1, 1)}), r"net.m_head.weight: \(8, 1, 1, 1\) instead of \(8, 1, 3, 3\)"),
    (lambda s: (s.pop("net.m_head.weight"), s.pop("lam.phi"), s.update(a=torch.zeros(1))), "3 differences: missing .*; missing .*; unknown a"),
    (lambda s: s.update({"lam._extra_state": torch.tensor([0., 1.], dtype=torch.float64)}), r"this λ is defined on \[0, 999\]"),
])
def test_tensors_that_do_not_fit_are_listed(folder, change, says):
    path = folder / "model.safetensors"
    state, note = unsealed(path)
    change(state)
    path.write_bytes(sealed(state, config_sha256=note["config_sha256"]))
    with pytest.raises(ValueError, match=says):
        load_model(folder)


@pytest.mark.parametrize("at", [-1, -1000, 0.5])
def test_one_flipped_bit_in_a_weight_is_noticed(folder, at):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(at * len(data)) if at == 0.5 else at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: .*Copy the file again") as e:
        load_model(folder)
    assert str(path) in str(e.value)


def test_a_folder_of_an_earlier_version_has_no_checksum_and_is_loaded(folder):
    before, path = outputs(load_model(folder)), folder / "model.safetensors"
    state, note = unsealed(path)
    save_file(state, path, {"config_sha256": note["config_sha256"]})
    assert_same(outputs(load_model(folder)), before)


def test_weights_saved_by_something_else_are_refused(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="were not saved together"):
        load_model(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved model"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no saved model"):
        load_model(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_model(tmp_path / "file", built())


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_saving(folder, renames):
    "The process dies after so many of the two renames: the old model, an error, or the new model, never a mixture."
    old = outputs(load_model(folder))
    code = f"""
import os
from dpi_nbdev.build import build_model, save_model
real, left = os.replace, [{renames}]
def replace(a, b):
    if not left[0]: os._exit(9)
    left[0] -= 1
    real(a, b)
os.replace = replace
save_model({str(folder)!r}, build_model("drunet", "t_map", seed=5, **{SMALL["drunet"]!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    if renames == 0:
        assert_same(outputs(load_model(folder)), old)
    elif renames == 1:
        with pytest.raises(ValueError, match="a save was interrupted between the two"):
            load_model(folder)
    else:
        assert type(load_model(folder)).__name__ == "TMap"
    save_model(folder, built(conditioning="none"))  # and saving again repairs it
    assert type(load_model(folder)).__name__ == "Unconditional"


# -- models that cannot be saved ----------------------------------------------------------------------------------


class MyNet(DRUNet):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass():
    return DPI(MyNet(1, 1, (8,), 1))


def added_layer():
    model = built(conditioning="none")
    model.net.m_body.append(torch.nn.Conv2d(16, 16, 1))
    return model


def own_forward():
    model = built(conditioning="none")
    model.net.m_body[0].forward = lambda x: x
    return model


def other_dropout():
    model = built("adm", "none")
    model.net.middle_block[0].out_layers[2].p = 0.5
    return model


def tied():
    model = built(conditioning="none")
    model.net.m_up1[1].res[0].weight = model.net.m_up1[1].res[2].weight
    return model


def compiled():
    return torch.compile(built(), backend="eager")


@pytest.mark.parametrize("make, says", [(subclass, "contains a MyNet: save its weights instead"), (added_layer, "2 differences: unknown net.m_body.1.weight; unknown net.m_body.1.bias"), (own_forward, "net.m_body.0 has hooks or a forward of its own"),
                                        (other_dropout, "p=0.5.* where its settings say .*p=0.1"), (tied, "share a parameter"), (compiled, "contains a OptimizedModule")],
                         ids=lambda v: getattr(v, "__name__", ""))
def test_what_could_not_be_loaded_is_not_saved(make, says, tmp_path):
    with pytest.raises((TypeError, ValueError), match=says):
        save_model(tmp_path / "model", make())
    assert not (tmp_path / "model").exists()


def test_a_full_disk_leaves_the_old_model(folder, monkeypatch):
    old = outputs(load_model(folder))
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)  # where a full disk shows itself
    with pytest.raises(OSError, match="the disk is full"):
        save_model(folder, built(conditioning="none"))
    assert_same(outputs(load_model(folder)), old)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_ncsnv2_is_what_the_paper_says_and_nothing_of_t():
    model = built(conditioning="ncsnv2")
    assert isinstance(model, NCSNv2)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert all(torch.equal(model(x, t), -model.net(x)) for t in (0, 1, 499.5, 999))


def test_a_model_saved_before_there_were_kinds_of_sets_is_rebuilt():
    from dpi_nbdev.build import _describe, _rebuild
    model = build_model("drunet", "dpi", in_channels=1, widths=(8, 16), n_blocks=1)
    note = _describe(model)
    old = {k: v for k, v in note.items() if k != "sets"} | dict(select=note["sets"][0]["names"])
    assert repr(_rebuild(old)) == repr(model) == repr(_rebuild(note))
