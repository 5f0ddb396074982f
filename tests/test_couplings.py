"""Couplings: pairs are permutations or fair draws, independent of how a batch is cut; two sets have orders of their own."""
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpi_nbdev.core import seeded
from dpi_nbdev.couplings import (Blur, Coarse, Corrupted, Coupled, Mask, Transport, check_plan, draw_pairs,
                                 pair_costs, reflow_pairs)
from dpi_nbdev.data import Batches, Unpaired
from dpi_nbdev.diffusion import Part
from dpi_nbdev.flow import FlowLoss, FlowMatching, TwoSidedInterpolant
from dpi_nbdev.guidance import DropLabels
from dpi_nbdev.known import GaussianMixture
from dpi_nbdev.training import _length, describe

BRIDGE = TwoSidedInterpolant()


def points(n, d=2, seed=0):
    return torch.randn(n, d, generator=seeded(seed))


def zero(x, s, *cond):
    return 0 * x


# -- transport ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_exact_transport_is_the_best_of_all_permutations(seed):
    x0, x1 = points(6, seed=seed), points(6, seed=seed + 100)
    best = min((x0[list(p)] - x1).square().sum().item() for p in itertools.permutations(range(6)))
    y0, y1 = Transport()((x0, x1))
    assert torch.equal(y1, x1)
    assert math.isclose((y0 - y1).square().sum().item(), best, rel_tol=1e-5)


def test_costs_are_mean_squares_and_do_not_cancel():
    x0, x1 = points(4, 3), points(4, 3, 1)
    by_hand = [[((a - b)**2).mean().item() for b in x1.double()] for a in x0.double()]
    np.testing.assert_allclose(pair_costs(x0, x1), by_hand, rtol=1e-12)
    far = 1e4 + 1e-3 * points(4, 3).double()
    assert (np.diag(pair_costs(far, far)) == 0).all()


def test_transport_of_equal_sets_pairs_each_with_itself_whatever_the_order():
    x = points(30, 5)
    order = torch.randperm(30, generator=seeded(1))
    y0, y1 = Transport()((x[order], x))
    assert torch.equal(y0, y1)


def test_no_swap_over_labels_and_starts_of_each_class_stay_its_own():
    x0, x1 = points(60), points(60, seed=1)
    y = torch.arange(60) % 3
    y0, y1, told = Transport()((x0, x1, y))
    assert torch.equal(y1, x1) and torch.equal(told, y)
    for k in range(3):
        assert torch.equal(y0[y == k].sort(0).values, x0[y == k].sort(0).values)
        alone = Transport()((x0[y == k], x1[y == k]))[0]
        assert torch.equal(alone, y0[y == k])


def test_two_conditions_are_both_kept():
    a, b = torch.arange(40) % 2, torch.arange(40) % 5
    x0 = torch.stack([a, b], 1).double() + 0.01 * points(40).double()
    y0, _, *_ = Transport()((x0, points(40, seed=2).double(), a, b))
    assert torch.equal(y0.round().long(), torch.stack([a, b], 1))


def test_a_plan_of_ones_own_may_be_any_coupling_and_labels_stay_with_their_x1():
    x0, x1, y = torch.arange(50.)[:, None], 100 + torch.arange(50.)[:, None], torch.arange(50)
    even = Transport(lambda costs: np.ones_like(costs), label_cost=0)
    first, second = even((x0, x1, y), seeded(0)), even((x0, x1, y), seeded(0))
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[1], x1) and torch.equal(first[2], y)  # each column once
    assert len(first[0].unique()) > 20  # rows by chance
    assert not torch.equal(even((x0, x1, y), seeded(1))[0], first[0])
    thrice = np.zeros((50, 50))
    thrice[:, :25] = 1  # unbalanced on purpose: drawn by draw_pairs alone
    i, j = draw_pairs(torch.from_numpy(thrice), 50, seeded(0))
    assert j.bincount().tolist() == [2] * 25


def test_draws_follow_their_shares():
    plan = torch.rand(4, 3, generator=seeded(0))
    i, j = draw_pairs(plan, 60_000, seeded(1))
    found = torch.zeros(4, 3).index_put((i, j), torch.ones(60_000), accumulate=True) / 60_000
    torch.testing.assert_close(found, plan / plan.sum(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("plan", "message"), [
    (torch.ones(3), "a plan is a matrix"), (torch.ones(3, 2), "shape 3×3; got shape"),
    (-torch.eye(3), "least -1"), (torch.zeros(3, 3), "sum 0"), (torch.eye(3) * math.nan, "least nan"),
    (torch.eye(3) * math.inf, "shares of a plan"), (torch.tensor([[2., 0, 0], [0, 1, 0], [0, 0, 1]]), "its rows differ"),
    (torch.tensor([[1., 0, 0], [1, 0, 0], [0, 1, 0]]), "its columns differ")])
def test_what_is_no_coupling_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(plan, 3)


@pytest.mark.parametrize("plan", ["entropic", "unbalanced"])
def test_missing_pot_is_named(plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match="pip install pot"):
        Transport(plan)((points(4), points(4)))


def test_what_is_asked_of_pot(monkeypatch):
    "A stand-in that records: even weights, costs in units of their mean, the settings."
    asked = []

    def sinkhorn(a, b, costs, reg, **kw):
        asked.append((a, b, costs, reg))
        return np.ones_like(costs)

    def unbalanced(a, b, costs, reg, reg_m):
        asked.append((a, b, costs, reg, reg_m))
        return np.diag([1., 1, 1, 0])

    fake = SimpleNamespace(sinkhorn=sinkhorn, unbalanced=SimpleNamespace(sinkhorn_unbalanced=unbalanced))
    monkeypatch.setitem(sys.modules, "ot", fake)
    x0, x1 = 100 * points(4), 100 * points(4, seed=1)
    Transport("entropic", reg=0.3)((x0, x1), seeded(0))
    y0, y1 = Transport("unbalanced", reg=0.2, reg_m=3)((x0, x1), seeded(0))
    assert asked[0][0].tolist() == [0.25] * 4 and math.isclose(asked[0][2].mean(), 1)
    assert asked[0][3] == 0.3 and asked[1][3:] == (0.2, 3)
    assert not (y0 == x0[3]).all(1).any() and len(y0) == 4  # what has no share is not drawn


def test_entropic_plans_are_between_exact_and_independent():
    pytest.importorskip("ot")
    x0, x1 = points(64), points(64, seed=1)
    way = lambda pair: (pair[0] - pair[1]).square().mean().item()
    exact, chance = way(Transport()((x0, x1))), pair_costs(x0, x1).mean()
    ways = [way(Transport("entropic", reg=reg)((x0, x1), seeded(0))) for reg in (0.01, 0.3, 100)]
    assert exact <= ways[0] < ways[1] < ways[2]
    assert abs(ways[0] / exact - 1) < 0.2 and abs(ways[2] / chance - 1) < 0.25
    y = torch.arange(64) % 2
    y0, _, told = Transport("entropic")((torch.stack([y, y], 1) * 1., x1, y), seeded(0))
    assert torch.equal(y0[:, 0].long(), told)  # never over labels


# -- in training ----------------------------------------------------------------------


@pytest.mark.parametrize("how", [Transport(), Transport(lambda c: np.ones_like(c)), Corrupted(lambda x, g: 2 * x, noise=0.2)])
def test_parts_of_a_batch_see_the_pairs_of_the_whole(how):
    x0, x1 = points(32), points(32, seed=1)
    batch = x1 if isinstance(how, Corrupted) else (x0, x1)
    objective = Coupled(FlowLoss(BRIDGE, draw="importance"), how)
    whole = objective(zero, batch, seeded(3))[1]
    parts = [objective(Part(zero, slice(k, k + 8)), batch, seeded(3))[1][k:k + 8] for k in range(0, 32, 8)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert objective.memory is objective.objective.draw
    assert objective.held_out.coupling is how and objective.held_out.memory is None


def test_mixing_is_told_from_outside_and_inside():
    loss = FlowLoss(BRIDGE)
    assert Coupled(loss, Transport()).mixes and not Coupled(loss, Corrupted(Blur(1.))).mixes
    assert Coupled(loss, lambda batch, generator: batch).mixes  # unknown: to be safe
    assert DropLabels(Coupled(loss, Transport()), 3, at=2).mixes and not DropLabels(loss, 3).mixes


def test_descriptions_tell_couplings_apart_and_hold_no_address():
    loss = FlowLoss(BRIDGE)
    told = [describe(Coupled(loss, how)) for how in (
        Transport(), Transport(label_cost=0), Transport("entropic", reg=1.), Corrupted(Blur(1.)), Corrupted(Blur(2.)),
        Corrupted(Blur(1.), noise=0.1), Corrupted(Mask(0.5)), Corrupted(Coarse(2)))]
    assert len(set(told)) == len(told) and not any("0x" in t for t in told)


def test_unpaired_data_have_an_order_of_their_own():
    a, b = torch.arange(6), torch.arange(1000, 1015)
    batches = Batches((Unpaired(a), b, b), 30, seed=4)
    seen = [batches.batch(k) for k in range(40)]
    for x, y, z in seen:
        assert torch.equal(y, z)
        assert x.bincount().tolist() == [5] * 6 and len(y.unique()) == 15
    shared = [torch.cat([batches.batch(7, r, 3)[k] for r in range(3)]) for k in range(3)]
    assert all(map(torch.equal, shared, seen[7]))
    assert all(map(torch.equal, Batches((Unpaired(a), b, b), 30, seed=4).batch(39), seen[39]))
    pairs = {(u, v) for x, y, _ in seen for u, v in zip(x.tolist(), y.tolist())}
    assert len(pairs) == 90  # every pair was met
    alone = Batches(b, 30, seed=4)
    assert all(torch.equal(alone.batch(k), seen[k][1]) for k in range(5))  # the other order is as without
    both = Batches((Unpaired(a), Unpaired(a)), 6, seed=4).batch(0)
    assert not torch.equal(*both)
    assert _length((Unpaired(a), b)) == 15 and Unpaired(a)[torch.tensor([7])].item() == 1


# -- x0 from x1, reflow ---------------------------------------------------------------


def test_blur_is_a_gaussian():
    x = torch.zeros(1, 2, 31, 31)
    x[0, 0, 15, 15] = 1
    y = Blur(2.)(x)
    at = torch.arange(31) - 15.
    assert y[0, 1].abs().max() == 0  # channels do not mix
    assert abs(y.sum().item() - 1) < 1e-5
    spread = (y[0, 0].sum(0) * at**2).sum().item()
    assert abs(spread - 4) < 0.15  # cut at three standard deviations
    assert Blur(3.)(torch.ones(1, 1, 2, 2)).shape == (1, 1, 2, 2)  # wider than the image


def test_mask_and_coarse():
    x = torch.rand(50, 3, 8, 8, generator=seeded(0))
    y = Mask(0.25, cell=2)(x, seeded(1))
    hidden = (y != x)
    assert torch.equal(hidden.any(1), hidden.all(1))
    assert 0.2 < hidden.double().mean() < 0.3 and 0.9 < y[hidden].std() < 1.1
    assert torch.equal(y, Mask(0.25, cell=2)(x, seeded(1)))
    z = Coarse(4)(x)
    assert torch.equal(z[:, :, :4, :4], z[:, :, :1, :1].expand(-1, -1, 4, 4))
    torch.testing.assert_close(z[:, :, 5, 1], x[:, :, 4:, :4].mean((2, 3)))


def test_reflow_pairs_of_gaussians_are_the_known_map():
    mixture = GaussianMixture(FlowMatching(), torch.tensor([2.]), torch.tensor([0.25]))
    x0 = points(50, 1).double()[:, 0]
    start, end = reflow_pairs(mixture, FlowMatching(), x0, 100, progress=False)
    assert torch.equal(start, x0) and not end.requires_grad
    torch.testing.assert_close(end, 2 + 0.5 * x0, rtol=0, atol=1e-3)
