"""What a notebook cell cannot show about costs: how much the process really grows, and odd networks and inputs."""
import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from dpi_nbdev import DPI, Full, Gains, LinearLambda, LowRank
from dpi_nbdev.cost import Cost, LiveBytes, benchmark, cost_table, cost_text, load_costs, model_cost, paper_flops, paper_rows, sets_costs, torch_flops

GROWTH = """
import os, resource, torch
from torch import nn
from dpi_nbdev.cost import model_cost, training_step
net, x = nn.Sequential(nn.Linear(1000, 1000), *[nn.Tanh() for _ in range(40)]), torch.randn(4000, 1000)
for half in training_step(net, x[:10]): half()          # whatever PyTorch sets up once
def peak():  # ru_maxrss on Linux starts with what the parent process had in use
    if not os.path.exists("/proc/self/status"): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
expected = model_cost(net, x, rounds=0).peak             # on the meta device: takes no memory worth mentioning
before = peak()
for half in training_step(net, x): half()
print(peak() - before, expected)
"""


def test_the_process_grows_by_about_what_is_counted():
    out = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True).stdout
    grown, expected = map(int, out.split())
    there_before = 4000 * 1000 * 4 + 3 * 1000 * 1001 * 4  # x; the parameters with AdamW's two averages
    expected -= there_before
    assert expected > 600e6
    assert abs(grown / expected - 1) < 0.1, f"the process grew by {grown:,} bytes, {expected:,} were counted"


def test_memory_is_counted_until_it_is_freed_and_views_and_in_place_operations_are_free():
    with LiveBytes() as live:
        a = torch.zeros(100)
        a.add_(1)
        b = a[::2].expand(7, 50)
        assert live.now == 400
        a = None
        assert live.now == 400
        c = b.clone()
        assert live.now == 400 + 1400
        b = None
        assert live.now == 1400 == c.untyped_storage().nbytes()
    assert live.peak == 1800 and live.history[-1] <= live.peak


def test_tied_weights_and_frozen_parameters_count_once_and_train_not():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x):
            return self.c(self.b(self.a(x)))
    cost = model_cost(Tied(), torch.zeros(2, 8), rounds=1)
    assert cost.parameters == 64 + 72 and cost.flops == cost.flops_paper == 3 * 2 * 2 * 64


def test_the_model_is_left_as_it_was_and_so_is_the_random_state():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()).train()
    model, x = DPI(net, LinearLambda(0, 1)), torch.randn(6, 1, 8, 8)
    before, hooks, random = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()], torch.get_rng_state()
    for s in (0.3, torch.rand(6)):
        random = torch.get_rng_state()
        model_cost(model, x, s, rounds=1)
        assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


def test_hooks_go_even_when_the_network_fails():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        paper_flops(net, torch.zeros(1, 3))
    assert not any(m._forward_hooks for m in net.modules())


def test_equal_scalars_are_measured_as_they_run():
    net, x = nn.Conv2d(1, 2, 3), torch.zeros(64, 1, 8, 8)
    plain = torch_flops(net, x)
    cost = lambda s: model_cost(DPI(copy.deepcopy(net)), x, s, rounds=0).flops
    assert cost(torch.full((64,), 5)) == cost(5) == plain           # shared
    assert cost(torch.arange(64) // 32) == plain                     # two groups
    assert cost(torch.arange(64)) == 2 * plain                       # every operation twice


def test_outputs_of_any_kind():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            y = self.fc(x)
            return {"a": y, "b": (y.argmax(1), [y * 2]), "name": "a string"}
    assert model_cost(Several(), torch.zeros(2, 3), rounds=1).flops == 2 * 2 * 9


def test_thop_rules_for_normalisation_pooling_and_upsampling():
    x = torch.zeros(2, 4, 8, 8)
    n = x.numel()
    for layer, macs in [(nn.BatchNorm2d(4), 4 * n), (nn.BatchNorm2d(4, affine=False), 2 * n), (nn.LayerNorm(8), 4 * n), (nn.InstanceNorm2d(4), 2 * n),
                        (nn.Softmax(1), 3 * n - n // 4), (nn.PReLU(4), n), (nn.AvgPool2d(2), n // 4), (nn.AdaptiveAvgPool2d(2), 2 * 4 * 4 * (16 + 1)),
                        (nn.Upsample(scale_factor=2), 4 * n), (nn.Upsample(scale_factor=2, mode="bilinear"), 11 * 4 * n),
                        (nn.GroupNorm(2, 4), 0), (nn.SiLU(), 0), (nn.MaxPool2d(2), 0), (nn.Conv2d(4, 4, 3, bias=True), 2 * 4 * 36 * 36)]:
        assert paper_flops(layer.eval(), x) == 2 * macs, layer
    assert paper_flops(nn.LSTM(8, 4), x[0]) is None


def test_rows_and_text(tmp_path):
    with pytest.raises(ValueError, match='"drunet" or "adm", got \'unet\''):
        paper_rows("unet")
    rows = paper_rows("drunet", 4, 8, "meta", widths=(4, 8), n_blocks=1)
    table = cost_table(rows)
    assert list(table) == ["no scalar", "t map", "DPI", "DPI, s per sample", "DPI, frozen"]
    assert all(c.forward == c.update == [] for c in table.values()) and math.isnan(table["DPI"].ratio(table["t map"], "step"))
    lines = cost_text(table).splitlines()
    assert len(lines) == 6 and "step" not in lines[0] and "–" in lines[4] and len({len(line) for line in lines[1:]}) == 1
    assert isinstance(table["DPI"], Cost)
    made = benchmark(tmp_path / "c.json", batch=2, size=8, rounds=1, backbones=("drunet",), names=("no scalar", "DPI"), widths=(4, 8), n_blocks=1)
    facts, tables = load_costs(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == made and list(tables["drunet, float32"]) == ["no scalar", "DPI"]
    assert set(facts) == {"date", "machine", "threads", "torch", "batch", "size", "rounds", "command", "allocator"}


def two_layers():
    "Two 3x3 convolutions from 4 to 4 channels, the first of which is hidden."
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("sets, more", [
    # The kernels have 144 numbers; a matrix product counts 2 for each multiply-add.
    (Full(2), 2 * 4 * (144 + 4)),
    (Full(3), 2 * 8 * (144 + 4)),
    (Gains(1), (2 * 4 + 4 + 144) + (2 * 4 + 4)),      # the hidden kernel, its bias
    (Gains(4), (8 * 4 + 4 + 144) + (8 * 4 + 4)),
    (LowRank(2), 2 * ((2 * 2 + 1) * 144 + 2 * 4) + 2 * 3 * 4),
    (LowRank(2, curves=3), 2 * ((2 * 6 + 1) * 144 + 6 * 4) + 2 * 7 * 4),
])
def test_mixing_lean_sets_counts_as_worked_out_by_hand(sets, more):
    net, x = two_layers(), torch.zeros(2, 4, 8, 8)
    plain = paper_flops(net, x)
    assert plain == 2 * (2 * 4 * 36 * 36 + 2 * 4 * 16 * 36)
    assert paper_flops(DPI(net, sets=sets), x, 300) - plain == more
    assert paper_flops(DPI(two_layers(), sets=sets), x, torch.arange(2)) is None


def test_a_scalar_for_each_sample_counts_what_runs():
    x, s = torch.zeros(2, 4, 8, 8), torch.arange(2)
    plain = torch_flops(two_layers(), x)
    more = lambda sets, device: torch_flops(
        DPI(two_layers(), sets=sets).to(device), x.to(device), s) - plain
    # Gains follow the outputs: lambda times gains and lambda times shifts.
    for device in ("cpu", "meta"): assert more(Gains(3), device) == 2 * 2 * (2 * 3 * 4)
    # Shapes alone: A, B beside the layers' 36 and 16 pixels; and the biases.
    bias = 2 * (2 * 2 * 4)
    beside = 2 * 2 * (36 + 16) * (2 * 36 + 4 * 2)
    assert more(LowRank(2), "meta") == beside + bias
    # On a CPU kernels this small are made for each sample instead: B A, twice.
    assert more(LowRank(2), "cpu") == 2 * 2 * (2 * 2 * 144) + bias


def test_lean_sets_in_a_table():
    x, s = torch.zeros(8, 4, 8, 8), torch.arange(8)
    kinds = {"full": Full(2), "low rank": LowRank(2), "gains": Gains(4)}
    rows = {"plain": (two_layers(), x, None)}
    rows |= {k: (DPI(two_layers(), sets=kind), x, s) for k, kind in kinds.items()}
    table = cost_table(rows, rounds=1)
    lam = 4 * 999
    assert table["gains"].parameters == table["plain"].parameters + 4 * (4 + 4) + lam
    assert all(len(c.update) == 1 and c.peak > 0 for c in table.values())
    assert table["plain"].peak < table["gains"].peak


def test_group_norms_gains_keep_nothing_more():
    "A gain and a shift for each sample, in the norm's own pass."
    net = lambda: nn.Sequential(*[m for _ in range(6)
                                  for m in (nn.Conv2d(32, 32, 1), nn.GroupNorm(8, 32), nn.SiLU())])
    x, s = torch.zeros(16, 32, 16, 16), torch.arange(16)
    plain = model_cost(net(), x, rounds=0).peak
    gains = model_cost(DPI(net(), sets=Gains(1)), x, s, rounds=0).peak
    one_map = 4 * x.numel()
    assert gains - plain < one_map


def test_gains_on_large_maps_keep_nothing_more():
    "Kernels for each sample are made on a CPU, and outputs are not kept."
    net = lambda: nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                                                nn.Conv2d(8, 8, 3, padding=1)) for _ in range(5)])
    found = sets_costs(lambda more=0: nn.Sequential(nn.Conv2d(8 + more, 8, 1), net()),
                       torch.zeros(16, 8, 32, 32), 0)
    assert found["gains, 4 curves"]["memory"] < 1.1 < found["gains, 4 curves"]["memory on shapes"]
