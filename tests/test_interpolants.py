"""Stochastic interpolants from end to end: the laws that solvers end in, on mixtures, and
what is refused. Fields are exact (`GaussianMixture`), so every error is a solver's."""
import numpy as np
import pytest
import torch

from dpi_nbdev.core import seeded
from dpi_nbdev.diffusion import Process, VPDiffusion
from dpi_nbdev.flow import (
    Brownian, FlowLoss, FlowMatching, Interpolant, MirrorInterpolant, Sigmoid,
    TwoSidedInterpolant, VarianceExploding)
from dpi_nbdev.known import GaussianMixture
from dpi_nbdev.likelihood import log_likelihood
from dpi_nbdev.samplers import ddim, ddpm, dpm_solver, random_walk
from dpi_nbdev.solvers import DIFFUSIONS, diffusion_choice, sample_ode, sample_sde

quiet = dict(progress=False)
ends = dict(means=[-1.2, 0.9], covs=[0.15, 0.1], weights=[0.4, 0.6])
start = ([-0.5, 0.8], [0.2, 0.3], [0.7, 0.3])


class Slanted(Process):
    "A user's own: data and noise in factors that no named path has."
    s_min, s_max, noise_at, data_at, predicts, data = 0., 2., 2., 0., "eps", "x1"

    def factors(self, s):
        return 1 - s / 2, (s / 2)**0.8 * (1 + 0.3 * (1 - s / 2))

    def __repr__(self):  # names a test, alike in every process
        return "Slanted()"


one_sided = [FlowMatching(), Interpolant("trigonometric"), VPDiffusion()]
two_sided = [TwoSidedInterpolant("linear", "parabola"),
             TwoSidedInterpolant("trigonometric", Sigmoid(12.)),
             TwoSidedInterpolant("linear", Brownian(0.3))]
mirrors = [MirrorInterpolant("parabola"), MirrorInterpolant("sine")]
SOME = [one_sided[0], one_sided[2], *two_sided[:2], mirrors[0]]


def known(process):
    return GaussianMixture(process, **ends, start=start if process.sides == 2 else None)


def distance(law, x, s):
    "Kolmogorov's distance of the draws x from p_s, in units of 1/√n."
    weights, means, covs = law.components(s)
    x = x.flatten().sort().values
    normal = torch.distributions.Normal(means[:, 0], covs[:, 0, 0].sqrt())
    cdf = (weights * normal.cdf(x[:, None])).sum(1)
    steps = (torch.arange(len(x)) + 0.5) / len(x)
    return (cdf - steps).abs().max().item() * len(x)**0.5


def draws(law, s, n, seed):
    "Draws of p_s, by the process itself."
    x = law.sample(n, seeded(seed))
    z = torch.randn(n, generator=seeded(seed + 1), dtype=torch.float64)
    return law.process.add_noise(x, z, s)


def run(law, n, steps, backward, **kw):
    "Draws at one end carried to the other, and Kolmogorov's distance there."
    p = law.process
    at, to = (p.data_at, p.noise_at) if backward else (p.noise_at, p.data_at)
    model = law.velocity if p.sides == 2 else law
    eta = law.eps if p.sides == 2 else None
    spacing = kw.pop("spacing", "trailing")
    if not isinstance(spacing, str):       # a list leaves out one end
        at, to = (at, spacing[0]) if backward else (spacing[0], to)
        steps = None
    x = draws(law, at, n, 3)
    end = sample_sde(model, p, x, steps, noise_model=eta, backward=backward, denoise=False,
                     generator=seeded(7), spacing=spacing, **kw, **quiet)
    return distance(law, end, to)


# The 99.9 % point of Kolmogorov's distance is 1.95; a solver's own error comes on top.
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("eps", [0., "variance", "hump", 2.5], ids=str)
@pytest.mark.parametrize("process", SOME, ids=repr)
def test_the_law_at_the_end_is_right_for_every_eps(process, eps, backward):
    strong = eps
    if eps == "hump":
        strong = diffusion_choice(process, "hump", 2.)
    if eps == 2.5:                         # constant, but for the very ends
        low, high = process.s_min, process.s_max
        strong = lambda s: 2.5 / (high - low) * (low < s < high)
    law = known(process)
    assert run(law, 800, 60, backward, method="heun", diffusion=strong) < 2.2


def test_a_wrong_sign_of_the_score_is_seen():
    law = known(two_sided[0])
    wrong = GaussianMixture(two_sided[0], **ends, start=start)
    wrong.eps = lambda x, s: -law.eps(x, s)
    assert run(law, 1000, 40, False, diffusion="hump") < 2.5
    assert run(wrong, 1000, 40, False, diffusion="hump") > 5


@pytest.mark.parametrize("process", mirrors, ids=repr)
def test_a_mirror_returns_by_its_flow_and_renews_by_its_sde(process):
    law = known(process)
    x = law.sample(1000, seeded(0))
    back = sample_ode(law, process, x, 40, method="rk4", **quiet)
    assert (back - x).abs().max() < 1e-3
    kw = dict(method="heun", generator=seeded(1), **quiet)
    strong = diffusion_choice(process, "hump", 9.)
    renewed = sample_sde(law, process, x, 100, diffusion=strong, **kw)
    assert distance(law, renewed, 1.) < 2.2
    correlation = np.corrcoef(x, renewed)[0, 1]
    assert abs(correlation) < 0.5


def test_a_mirror_s_velocity_tells_nothing_where_gamma_stands_still():
    law = known(mirrors[0])
    with pytest.raises(ValueError, match="stands still"):
        sample_sde(law.velocity, mirrors[0], law.sample(4), 4, predicts="velocity",
                   diffusion="hump", **quiet)


@pytest.mark.parametrize("process", mirrors + [VarianceExploding(20.), Slanted()], ids=repr)
def test_new_paths_keep_the_books_of_probability(process):
    law = known(process)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
    for share in (0.2, 0.45, 0.8):
        s = process.s_min + share * (process.s_max - process.s_min)
        v = law.velocity(x, s)
        (slope,) = torch.autograd.grad(v.sum(), x)
        h = 1e-5
        rise = (law.log_density(x, s + h) - law.log_density(x, s - h)) / (2 * h)
        flow = v * law.score(x, s) + slope
        assert (rise + flow).abs().max() < 1e-5 * (1 + flow.abs().max())


def test_variance_exploding_samples_from_its_own_start():
    process = VarianceExploding(30., curve="linear")
    law = known(process)
    z = torch.randn(2000, generator=seeded(0), dtype=torch.float64)
    near = [1 - 0.85**k for k in range(60)]          # dense where the noise is small
    ends = sample_ode(law, process, process.start(z), spacing=near, **quiet)
    assert distance(law, ends, 1.) < 2.5
    assert distance(law, sample_ode(law, process, z, spacing=near, **quiet), 1.) > 5
    with pytest.raises(ValueError, match="pure noise of size 1"):
        log_likelihood(law, process, law.sample(4), **quiet)


@pytest.mark.parametrize("sampler", [ddim, ddpm, dpm_solver, random_walk])
def test_samplers_that_begin_in_noise_refuse_paths_without_it(sampler):
    for process, message in ((two_sided[0], "joins two data sets"),
                             (mirrors[0], "has no noise at s = 0.0")):
        law = known(process)
        x = law.sample(4, seeded(0))
        x = x[0] if process.sides == 2 else x
        with pytest.raises(ValueError, match=message):
            sampler(law, process, x, 5, **quiet)
    with pytest.raises(ValueError, match="pure noise"):
        log_likelihood(known(mirrors[0]), mirrors[0], x, **quiet)


def test_a_mirror_is_trained_by_the_objective():
    process, law = mirrors[0], known(mirrors[0])
    x = law.sample(20_000, seeded(0))
    loss = FlowLoss(process)
    s = 0.02 + 0.96 * torch.rand(len(x), generator=seeded(1), dtype=torch.float64)
    assert loss.predicts == "eps"
    values = [loss(lambda x, s, c=c: c * law.eps(x, s), x, seeded(2), s)[0]
              for c in (0.8, 1., 1.2)]
    assert values[1] < values[0] and values[1] < values[2]


def test_steps_of_a_named_eps_are_those_of_its_function():
    law, x = known(FlowMatching()), torch.randn(50, generator=seeded(0), dtype=torch.float64)
    for name in DIFFUSIONS:
        kw = dict(generator=seeded(1), **quiet)
        function = diffusion_choice(law.process, name)
        given = sample_sde(law, law.process, x, 8, diffusion=name, **kw)
        kw["generator"] = seeded(1)
        same = sample_sde(law, law.process, x, 8, diffusion=function, **kw)
        assert torch.equal(given, same)
