"""What a notebook cell does not show about metrics: the answers of another implementation, invariances over many random cases, files on disk, fresh processes, and memory that is really limited."""
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from independent import ANSWERS, clouds
from scipy.linalg import sqrtm

from dpi_nbdev.core import randn_like, seeded
from dpi_nbdev.diffusion import VPDiffusion
from dpi_nbdev.flow import FlowMatching, Interpolant
from dpi_nbdev.metrics import (bootstrap, eps_mse, feature_statistics, fid_by_n, frechet_distance, inception_score, midpoints,
                               noise_scaled, precision_recall, velocity_mse)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux does")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def random_cov(D, rank, seed):
    A = randn(D, rank, seed=seed)
    return A @ A.T / rank


@pytest.mark.parametrize("seed", range(5))
def test_frechet_against_sqrtm(seed):
    D = 3 + 7 * seed
    (m, A), (n, B) = [(randn(D, seed=10 * seed + i), random_cov(D, 3 * D, 10 * seed + i)) for i in range(2)]
    want = (m - n).square().sum() + A.trace() + B.trace() - 2 * np.trace(sqrtm((A @ B).numpy())).real
    assert frechet_distance((m, A), (n, B)) == pytest.approx(want.item(), rel=1e-8)


def test_the_answers_of_torch_fidelity():
    "On features made by a formula; its answers are stored. Its precision and recall are means in float32."
    want, (samples, real) = json.loads(ANSWERS.read_text(encoding="utf-8"))["metrics"], clouds()
    assert frechet_distance(samples, real) == pytest.approx(want["frechet"], rel=1e-9)
    assert precision_recall(real, samples) == pytest.approx(want["precision_recall"], abs=1e-6)
    assert inception_score(10 * samples, 100) == pytest.approx(want["inception_score"], rel=1e-9)


def test_frechet_is_a_squared_distance():
    sets = [randn(80, 6, seed=i) @ randn(6, 6, seed=50 + i) + randn(6, seed=100 + i) for i in range(4)]
    d = np.array([[frechet_distance(a, b) for b in sets] for a in sets])
    assert d.diagonal().max() < 1e-9 and np.allclose(d, d.T, rtol=1e-9)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                assert d[i, k]**0.5 <= d[i, j]**0.5 + d[j, k]**0.5 + 1e-4
    Q = torch.linalg.qr(randn(6, 6, seed=7)).Q  # turned, moved and scaled
    assert frechet_distance(3 * sets[0] @ Q + 5, 3 * sets[1] @ Q + 5) == pytest.approx(9 * d[0, 1], rel=1e-8)


def test_commuting_and_singular_closed_form():
    "Diagonal covariances: a sum over axes; zeros among them are no trouble."
    a, b = torch.tensor([4., 1., 0., 2.25]), torch.tensor([1., 0., 0., 4.])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # axes that never vary are no reason to warn
        got = frechet_distance((torch.zeros(4), a.diag()), (torch.ones(4), b.diag()))
    assert got == pytest.approx(4 + (a.sqrt() - b.sqrt()).square().sum().item(), abs=1e-9)


@pytest.mark.parametrize("N", [2, 5, 31, 32])
def test_rank_warning(N):
    "Rank N - 1 is singular in 32 dimensions for N up to 32."
    with pytest.warns(UserWarning, match=rf"covariance of b is singular, rank {N - 1} for 32"):
        frechet_distance(randn(100, 32), randn(N, 32, seed=1))


def test_enough_images_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(randn(100, 32), randn(34, 32, seed=1))


def test_dtypes_and_containers_agree(tmp_path):
    x, y = randn(70, 5).float(), randn(50, 5, seed=1).float()
    numbers = lambda x: (frechet_distance(x, y), *precision_recall(x, y), *inception_score(x))
    want = numbers(x)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    swapped, fortran = x.numpy().astype(">f4"), np.asfortranarray(x.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a read-only array is no reason to warn
        for other in (mapped, swapped, fortran, x.double(), x.double().numpy(), x.clone().requires_grad_()):
            assert numbers(other) == pytest.approx(want, abs=1e-10)
    whole = (10 * x).round()
    for ints in (whole.long(), whole.numpy().astype(np.int16), (whole.numpy() + 100).astype(np.uint8).astype(np.uint16)):
        off = 100 if isinstance(ints, np.ndarray) and ints.dtype == np.uint16 else 0
        assert frechet_distance(ints, whole + off) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad, error", [(np.zeros((3, 2), complex), TypeError), (np.array([["a"]]), TypeError), (torch.zeros(3, 2, dtype=torch.bool), TypeError), ("x", TypeError), (None, TypeError),
                                        (torch.zeros(3, 2, 2), ValueError), (torch.zeros(1, 2), ValueError), (torch.zeros(0, 2), ValueError), (torch.full((3, 2), float("nan")), ValueError),
                                        (torch.tensor([[1., float("inf")], [0., 0.]]), ValueError)])
def test_bad_features(bad, error):
    good = randn(10, 2)
    for call in (lambda: feature_statistics(bad), lambda: frechet_distance(bad, good), lambda: frechet_distance(good, bad), lambda: precision_recall(good, bad),
                 lambda: precision_recall(bad, good), lambda: inception_score(bad), lambda: fid_by_n(bad, good, progress=False)):
        with pytest.raises(error): call()


def test_precision_recall_invariances():
    real, fake = randn(90, 4), 0.5 + 1.2 * randn(75, 4, seed=1)
    want = precision_recall(real, fake)
    Q = torch.linalg.qr(randn(4, 4, seed=7)).Q
    assert precision_recall(2 * real @ Q - 3, 2 * fake @ Q - 3) == want
    assert precision_recall(real[torch.randperm(90, generator=seeded(0))], fake.flip(0)) == want
    assert {precision_recall(real, fake, block=b) for b in (2, 13, 89, 90, 5000)} == {want}
    wider = [precision_recall(real, fake, k) for k in (1, 2, 4, 8, 74)]
    assert wider == sorted(wider) and [r for _, r in wider] == sorted(r for _, r in wider)  # larger balls hold more


def test_duplicates_and_copies():
    "A model that has learnt the training set by heart is all precision; its recall counts what it remembers."
    real = randn(60, 5)
    assert precision_recall(real, real[:30].repeat(4, 1))[0] == 1
    p, r = precision_recall(real, real[:30].repeat(4, 1), distance_dtype=torch.float64)
    assert r < 0.75  # four copies of each: every ball has radius (nearly) zero


def test_float16_falls_back_where_it_overflows():
    real, fake = 1e3 * randn(50, 30), 1e3 * 1.1 * randn(50, 30, seed=1)  # squared norms of 3e7, far above float16's 65504
    assert precision_recall(real, fake, distance_dtype=torch.float16) == precision_recall(real, fake, distance_dtype=torch.float32)


def test_noise_is_what_it_was():
    "The noise of whole steps is part of stored results: pinned."
    x0 = randn(3, 1, 4, 4).float()
    zero = lambda x, s: torch.zeros_like(x)
    for seed, t in ((0, 0), (3, 500), (19, 999)):
        want = randn_like(x0, seeded(seed * 1_000_003 + t)).double().square().mean().item()
        assert eps_mse(zero, VPDiffusion(), x0, [t], [seed], progress=False).item() == pytest.approx(want, rel=1e-12)


def test_no_two_noises_alike():
    seen = []
    def model(x, s):
        seen.append(x.clone())
        return torch.zeros_like(x)
    x = torch.zeros(1, 1, 2, 2)
    eps_mse(model, FlowMatching(), x, [0., 1 / 3, 0.5, np.nextafter(0.5, 1), 0.75], range(4), progress=False)
    ratios = {tuple((v.double().flatten() / v.double().flatten()[0]).round(decimals=4).tolist()) for v in seen}
    assert len(ratios) == 20


@pytest.mark.parametrize("process", [FlowMatching(), Interpolant("trigonometric"), VPDiffusion(50)])
def test_a_velocity_from_the_noise(process):
    "A point mass at 0.3: the perfect velocity has no error; a constant added to it shows as its square."
    data = torch.full((4, 1, 3, 3), 0.3, dtype=torch.float64)
    def perfect(x, s):
        (a, b), (da, db) = process.coefs(s, x), process.coef_rates(s, x)
        return da * 0.3 + db * (x - a * 0.3) / b
    s = [s for s in midpoints(process, 5)]
    assert velocity_mse(perfect, process, data, s, range(2), progress=False).max() < 1e-20
    off = velocity_mse(lambda x, s: perfect(x, s) + 0.2, process, data, s, range(2), progress=False)
    assert off.shape == (2, 5) and torch.allclose(off, torch.full_like(off, 0.04), atol=1e-12)


def test_noise_scaled_shapes():
    process = VPDiffusion()
    errors = torch.rand(3, 4, generator=seeded(0))
    t = [0, 10.5, 500, 999]
    out = noise_scaled(errors, process, t)
    assert out.shape == (3, 4) and out.dtype == torch.float64
    assert torch.allclose(out[:, [0, 2, 3]] / errors[:, [0, 2, 3]].double(), process.sigma[[0, 500, 999]]**2)
    assert torch.equal(noise_scaled(errors.numpy(), process, torch.tensor(t)), out)
    with pytest.raises(ValueError, match="leave it out"): noise_scaled([1.], process.zero_terminal_snr(), [999])


def test_bootstrap_of_tuples_and_sizes():
    a, b = randn(41, 3), randn(60, 3, seed=1)
    p, r = bootstrap(precision_recall, a, b, n=5, progress=False)
    assert (p.value, r.value) == precision_recall(a, b) and p.low <= p.value <= p.high
    assert bootstrap(precision_recall, a, b, n=5, progress=False) == (p, r) != bootstrap(precision_recall, a, b, n=5, seed=1, progress=False)
    wide, narrow = (bootstrap(frechet_distance, a, b, n=5, level=level, progress=False) for level in (0.99, 0.5))
    assert wide.std_error == narrow.std_error and wide.high > narrow.high


def test_another_process_prints_the_same_digits():
    x, y = randn(300, 40), randn(200, 40, seed=1)
    program = ("import torch; from dpi_nbdev.metrics import *; from dpi_nbdev.core import seeded; torch.set_num_threads(%d); "
               "x, y = (torch.randn(n, 40, generator=seeded(i), dtype=torch.float64) for i, n in enumerate((300, 200))); "
               "print(repr((frechet_distance(x, y), precision_recall(x, y), inception_score(x, 70), bootstrap(frechet_distance, x, y, n=3, progress=False), fid_by_n(x, y, [90, 300], progress=False).infinity)))") % torch.get_num_threads()
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    here = (frechet_distance(x, y), precision_recall(x, y), inception_score(x, 70), bootstrap(frechet_distance, x, y, n=3, progress=False), fid_by_n(x, y, [90, 300], progress=False).infinity)
    assert there == repr(here) + "\n" and "Estimate" in there


@linux
def test_memory_does_not_grow_with_the_pairs():
    "9,000 × 9,000 distances would take 324 MB at once; statistics of 60,000 × 256 in float64 another 123 MB."
    program = ("import resource, torch; from dpi_nbdev.metrics import *; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; torch.set_num_threads(1); "
               "x, y = torch.randn(9000, 4), torch.randn(1000, 4); warm = precision_recall(x[:100], y[:100]); before = peak(); "
               "precision_recall(x, y, block=1000, distance_dtype=torch.float32); print(peak() - before); "
               "z = torch.randn(60_000, 256); before = peak(); feature_statistics(z); print(peak() - before)")
    grown = [float(v) for v in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()]
    assert grown[0] < 100 and grown[1] < 80, grown
