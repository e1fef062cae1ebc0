import itertools
import math

import pytest
import torch

from closed_forms import PATHS, generator, halving_orders, tensor
from flowtilt.interpolants import (
    Columnwise,
    Cosine,
    Linear,
    MemorylessStep,
    VariancePreserving,
    add_scaled,
    broadcast_time,
    convert,
    memoryless_step,
    rates,
)

PREDICTIONS = ("velocity", "score", "noise", "endpoint")
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
WIDER = PATHS | {"cosine": Cosine(1.5), "cosine_2": Cosine(2.0)}
inner = pytest.mark.parametrize("path", WIDER.values(), ids=WIDER.keys())
data_variances = pytest.mark.parametrize("data_variance", [0.0, 0.4, 1.0])


@paths
def test_paths_run_from_noise_to_data(path):
    start, end = tensor(0.0), tensor(1.0)
    assert path.alpha(end) == 1
    assert path.beta(end) == 0
    # exp(-(0.1 + 12) / 4) = 0.0486: the memory that the variance-preserving path keeps.
    assert path.alpha(start) == pytest.approx(0.0 if isinstance(path, Linear) else 0.0486, abs=5e-5)
    assert path.beta(start) ** 2 == pytest.approx(1.0 - path.alpha(start).item() ** 2, abs=1e-15)


@inner
def test_rates_are_derivatives_and_kappa_eta_sigma_follow_from_them(path):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    alpha, beta = path.alpha(t), path.beta(t)
    (alpha_rate,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
    (beta_rate,) = torch.autograd.grad(beta.sum(), t)
    t, alpha, beta = t.detach(), alpha.detach(), beta.detach()
    exact = {"rtol": 1e-12, "atol": 1e-13}  # float64 rounding, times a condition of at most 1e2
    torch.testing.assert_close(path.alpha_rate(t), alpha_rate, **exact)
    torch.testing.assert_close(path.beta_rate(t), beta_rate, **exact)
    torch.testing.assert_close(path.kappa(t), alpha_rate / alpha, **exact)
    torch.testing.assert_close(path.eta(t), beta * (alpha_rate / alpha * beta - beta_rate), **exact)


def test_variance_preserving_keeps_the_variance_and_small_noise_exact():
    path = VariancePreserving(0.1, 12.0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.beta(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)
    # Near the data beta^2 = rate_min h + O(h^2): 1 - alpha^2 would have lost all but three digits.
    h = 2.0**-40
    assert path.beta(tensor(1 - h)) ** 2 == pytest.approx(0.1 * h, rel=1e-6, abs=0)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (-0.1, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_noise_rates_out_of_order_are_refused(rates):
    with pytest.raises(ValueError, match="rate_min"):
        VariancePreserving(*rates)


def predictions(path, t, shape=(64, 2), seed=0):
    """States, and all four predictions of a known pair of noise and endpoint."""
    rng = generator(seed)
    noise, endpoint = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    at = t.reshape(t.shape + (1,) * (len(shape) - t.ndim)) if t.ndim else t
    x = path.alpha(at) * endpoint + path.beta(at) * noise
    velocity = path.alpha_rate(at) * endpoint + path.beta_rate(at) * noise
    truth = {"velocity": velocity, "score": -noise / path.beta(at), "noise": noise, "endpoint": endpoint}
    return x, truth


@inner
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_conversions_agree_with_the_pair_they_come_from(path, source, target):
    """Each pair of predictions is the same fact, so every conversion is also inverted by its reverse."""
    # A conversion divides by alpha, beta or both once, so rounding grows by at most 1e4 at 1e-2 from an end;
    # cosine paths are of higher order there.
    edge = 0.01 if path in PATHS.values() else 0.1
    for times in (tensor(0.37), torch.linspace(edge, 1 - edge, 64, dtype=torch.float64)):
        x, truth = predictions(path, times)
        got = convert(truth[source], x, times, path, source, target)
        torch.testing.assert_close(got, truth[target], rtol=1e-11, atol=1e-11)


@paths
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
def test_conversions_invert_each_other_close_to_both_ends(path, source, target):
    for t in (1e-3, 0.5, 1 - 1e-3):
        x, truth = predictions(path, tensor(t), seed=1)
        there = convert(truth[source], x, tensor(t), path, source, target)
        back = convert(there, x, tensor(t), path, target, source)
        torch.testing.assert_close(back, truth[source], rtol=1e-8, atol=1e-8)


def test_conversions_of_the_linear_path_that_need_no_division_hold_at_the_start():
    """At t = 0 the state is the noise: velocity and endpoint still give each other, ``v = y - x``."""
    path, t = Linear(), tensor(0.0)
    x, truth = predictions(path, t)
    for source, target in (("endpoint", "velocity"), ("velocity", "endpoint"), ("velocity", "noise")):
        torch.testing.assert_close(convert(truth[source], x, t, path, source, target), truth[target])


@paths
def test_conversions_broadcast_times_over_all_axes_of_the_state(path):
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, truth = predictions(path, t, shape=(5, 3, 2))
    for i, time in enumerate(t):
        alone = convert(truth["noise"][i : i + 1], x[i : i + 1], time, path, "noise", "velocity")
        torch.testing.assert_close(alone[0], truth["velocity"][i])
    torch.testing.assert_close(convert(truth["noise"], x, t, path, "noise", "velocity"), truth["velocity"])


@inner
@data_variances
@pytest.mark.parametrize("t", [0.2, 0.5, 0.85])
def test_a_memoryless_step_is_an_euler_maruyama_step_to_first_order(path, data_variance, t):
    kappa, eta = float(path.kappa(tensor(t))), float(path.eta(tensor(t)))
    errors = []
    for h in (1e-2, 5e-3, 2.5e-3, 1.25e-3):
        step = memoryless_step(path, t, t + h, data_variance)
        errors.append(
            (
                abs(step.state - (1 - kappa * h)),
                abs(step.velocity - 2 * h),
                abs(step.noise**2 - 2 * eta * h),
            )
        )
    for error in zip(*errors, strict=True):
        # What is left is of second order; at the coarsest pair the third is still felt.
        assert min(halving_orders(error)) > 1.75
        assert halving_orders(error)[-1] == pytest.approx(2, abs=0.1)


def test_the_widest_step_is_exact_for_standard_normal_data_on_the_variance_preserving_path():
    """There the velocity is zero and ``x_s | x_t`` is ``N(rho x_t, 1 - rho^2)``, rho = alpha_t / alpha_s."""
    path = VariancePreserving()
    for t, s in ((0.0, 0.4), (0.3, 0.35), (0.5, 0.99)):
        rho = float(path.alpha(tensor(t)) / path.alpha(tensor(s)))
        step = memoryless_step(path, t, s, data_variance=1.0)
        assert step.state == pytest.approx(rho, abs=1e-13)
        assert step.noise**2 == pytest.approx(1 - rho**2, abs=1e-13)


def exact_posterior(path, t, s):
    """Mean coefficients of (state, endpoint) and variance of x_s given both, by conditioning Gaussians.

    Given the endpoint, noising leads from ``x_s ~ N(alpha_s y, beta_s^2)`` to
    ``x_t = (alpha_t / alpha_s) x_s + N(0, beta_t^2 - (alpha_t / alpha_s)^2 beta_s^2)``.
    """
    alpha_t, beta_t, alpha_s, beta_s = (
        float(c) for u in (t, s) for c in (path.alpha(tensor(u)), path.beta(tensor(u)))
    )
    covariance = alpha_t / alpha_s * beta_s**2
    gain = covariance / beta_t**2
    return gain, alpha_s - gain * alpha_t, beta_s**2 - gain * covariance


@paths
@pytest.mark.parametrize(("t", "s"), [(0.0, 0.1), (0.3, 0.5), (0.9, 0.95), (0.2, 0.98)])
def test_the_narrowest_step_draws_from_the_posterior_at_the_predicted_endpoint(path, t, s):
    on_state, on_endpoint, variance = exact_posterior(path, t, s)
    step = memoryless_step(path, t, s, data_variance=0.0)
    assert step.noise**2 == pytest.approx(variance, abs=1e-13)
    x, truth = predictions(path, tensor(t))
    moved = step.state * x + step.velocity * truth["velocity"]
    torch.testing.assert_close(moved, on_state * x + on_endpoint * truth["endpoint"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("t", "s"), [(0.0, 0.1), (0.3, 0.5), (0.9, 0.95)])
def test_the_narrowest_step_is_ddpm_and_ddim_with_eta_one(t, s):
    """In the notation of both papers: abar = alpha^2, and the step runs from abar_t to abar_s."""
    path = VariancePreserving()
    abar_t, abar_s = (float(path.alpha(tensor(u))) ** 2 for u in (t, s))
    x, truth = predictions(path, tensor(t))
    step = memoryless_step(path, t, s)
    moved = step.state * x + step.velocity * truth["velocity"]

    rate = 1 - abar_t / abar_s
    ddpm = (
        abar_s**0.5 * rate / (1 - abar_t) * truth["endpoint"]
        + (1 - rate) ** 0.5 * (1 - abar_s) / (1 - abar_t) * x
    )
    deviation = ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)) ** 0.5
    ddim = abar_s**0.5 * truth["endpoint"] + (1 - abar_s - deviation**2) ** 0.5 * truth["noise"]
    torch.testing.assert_close(moved, ddpm, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved, ddim, rtol=0, atol=1e-12)
    assert step.noise == pytest.approx(deviation, abs=1e-13)


@paths
@data_variances
@pytest.mark.parametrize("t", [0.0, 0.5, 0.975])
def test_the_last_step_is_the_predicted_endpoint_without_noise(path, data_variance, t):
    step = memoryless_step(path, t, 1.0, data_variance)
    x, truth = predictions(path, tensor(t))
    moved = step.state * x + step.velocity * truth["velocity"]
    torch.testing.assert_close(moved, truth["endpoint"], rtol=0, atol=1e-12)
    assert step.noise == 0


@paths
@pytest.mark.parametrize(("t", "s"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_a_step_that_does_not_move_forward_within_the_unit_interval_is_refused(path, t, s):
    with pytest.raises(ValueError, match="0 <= t < s <= 1"):
        memoryless_step(path, t, s)


# --- Cosine paths ------------------------------------------------------------------------------------

cosines = pytest.mark.parametrize("nu", [1.0, 1.5, 2.0])


@cosines
def test_a_cosine_path_is_the_published_one_in_the_time_of_the_straight_path(nu):
    own = torch.linspace(0, 1, 101, dtype=torch.float64)  # FlowMol's time
    t = 1 - torch.cos(math.pi / 2 * own) ** 2
    path, published = Cosine(nu), 1 - torch.cos(math.pi / 2 * own**nu) ** 2
    torch.testing.assert_close(path.alpha(t), published, rtol=0, atol=1e-14)
    torch.testing.assert_close(path.alpha(t) + path.beta(t), torch.ones_like(t), rtol=0, atol=1e-14)
    ends = tensor([0.0, 1.0])
    assert path.alpha(ends).tolist() == pytest.approx([0, 1], abs=1e-15)
    assert path.beta(ends).tolist() == [1, 0]
    # Near the data beta is nu^2 times that of the straight path, in single precision as well.
    h = 2.0**-20
    for kind, accuracy in ((torch.float64, 1e-3), (torch.float32, 1e-3)):
        assert float(path.beta(torch.tensor(1 - h, dtype=kind))) == pytest.approx(nu**2 * h, rel=accuracy)


def test_the_cosine_path_of_nu_one_is_the_straight_one():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for name in ("alpha", "beta", "alpha_rate", "beta_rate", "kappa", "eta"):
        torch.testing.assert_close(getattr(Cosine(1.0), name)(t), getattr(Linear(), name)(t))


@cosines
def test_a_cosine_path_begins_where_its_distribution_is_still_the_noise(nu):
    path = Cosine(nu)
    assert 0 < float(path.alpha(tensor(path.start))) < 1e-6
    with pytest.raises(ValueError, match="says nothing of the endpoint"):
        memoryless_step(path, 0.0, 0.5)


@pytest.mark.parametrize("nu", [0.5, 0.0, -1.0, float("nan")])
def test_a_cosine_path_that_runs_ahead_is_refused(nu):
    with pytest.raises(ValueError, match="nu of at least 1"):
        Cosine(nu)


@cosines
@pytest.mark.parametrize("last", [False, True])
def test_steps_of_a_cosine_path_are_finite_and_exact_in_single_precision(nu, last):
    """At the start the coefficient of the velocity is large and the velocity small; their product is not."""
    path = Cosine(nu)
    t, s = (1 - 2.0**-12, 1.0) if last else (path.start, 0.04)
    step, at = memoryless_step(path, t, s), tensor(t)
    x, truth = predictions(path, at)
    on_state, on_endpoint, _ = exact_posterior(path, t, s)
    single = x.float() * step.state + step.velocity * truth["velocity"].float()
    expected = on_state * x + on_endpoint * truth["endpoint"]
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=4e-6)


# --- Paths side by side ------------------------------------------------------------------------------

PARTS = ((Linear(), 2), (Cosine(1.5), 3), (VariancePreserving(), 1))
SIDE_BY_SIDE = Columnwise(PARTS)
RUNS = {Linear(): slice(0, 2), Cosine(1.5): slice(2, 5), VariancePreserving(): slice(5, 6)}
COEFFICIENTS = ("alpha", "beta", "alpha_rate", "beta_rate", "kappa", "eta")


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_column_has_the_coefficients_of_its_path(name):
    times = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    for t, shape in ((times[1], (6,)), (times[:, None], (4, 6)), (times[:, None, None], (4, 1, 6))):
        got = getattr(SIDE_BY_SIDE, name)(t)
        assert got.shape == shape
        for path, run in RUNS.items():
            own = getattr(path, name)(t)
            assert torch.equal(got[..., run], own.expand(*shape[:-1], got[..., run].shape[-1]))


def test_times_that_would_be_taken_for_columns_are_refused():
    with pytest.raises(ValueError, match="use broadcast_time"):
        SIDE_BY_SIDE.alpha(torch.linspace(0.1, 0.9, 6))
    with pytest.raises(ValueError, match="at least one column"):
        Columnwise(((Linear(), 0),))


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PREDICTIONS, 2)))
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_conversions_side_by_side_are_those_of_each_path(source, target, kind):
    """Bit for bit, at one time and at a time for each sample; and of the type of the state."""
    rng = generator(0)
    x, value = (torch.randn(4, 5, 6, generator=rng, dtype=kind) for _ in range(2))
    for t in (torch.tensor(0.4, dtype=kind), torch.linspace(0.1, 0.9, 4, dtype=kind)):
        got = convert(value, x, t, SIDE_BY_SIDE, source, target)
        assert got.dtype == kind
        for path, run in RUNS.items():
            own = convert(value[..., run], x[..., run], t, path, source, target)
            if kind == torch.float64:
                assert torch.equal(got[..., run], own)
            else:  # a number keeps its double precision where a vector is rounded to the state's type
                torch.testing.assert_close(got[..., run], own)


def test_rates_side_by_side_are_vectors_of_the_type_of_the_time():
    kappa, eta = rates(SIDE_BY_SIDE, torch.tensor(0.4))
    assert kappa.dtype == eta.dtype == torch.float32
    for path, run in RUNS.items():
        assert kappa[run].tolist() == pytest.approx([rates(path, tensor(0.4))[0]] * len(kappa[run]))


@data_variances
@pytest.mark.parametrize(("t", "s"), [(0.1, 0.2), (0.9, 1.0)])
def test_steps_side_by_side_are_those_of_each_path(data_variance, t, s):
    step = memoryless_step(SIDE_BY_SIDE, t, s, data_variance)
    for path, run in RUNS.items():
        own = memoryless_step(path, t, s, data_variance)
        for name in ("state", "velocity", "noise"):
            assert set(getattr(step, name)[run].tolist()) == {getattr(own, name)}
    assert step.noisy == (s < 1)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_a_step_by_vectors_is_the_step_by_numbers(kind):
    """Of columns that share one path; rounding aside, since one of the two fuses its products and sums."""
    path, t, s = Linear(), 0.3, 0.35
    alone, together = memoryless_step(path, t, s), memoryless_step(Columnwise(((path, 2), (path, 4))), t, s)
    x, v = (torch.randn(64, 6, generator=generator(seed), dtype=kind) for seed in (0, 1))
    together = together.like(x)
    assert together.state.dtype == kind
    by_number = add_scaled(alone.state * x, v, alone.velocity)
    by_vector = add_scaled(together.state * x, v, together.velocity)
    torch.testing.assert_close(
        by_vector, by_number, rtol=4 * torch.finfo(kind).eps, atol=torch.finfo(kind).eps
    )
    assert isinstance(alone.like(x), MemorylessStep)
    assert alone.like(x) == alone


def test_broadcast_times_reach_columns():
    x, t = torch.zeros(4, 5, 6), torch.linspace(0.1, 0.9, 4)
    assert SIDE_BY_SIDE.alpha(broadcast_time(t, x)).shape == (4, 1, 6)
