"""The path of a discrete diffusion, against the scheduler of diffusers that it is taken from."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from closed_forms import tensor
from flowtilt.domains.images.pipeline import schedule_of
from flowtilt.domains.images.schedule import DiscreteSchedule, levels_of
from flowtilt.interpolants import memoryless_step

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "stable diffusion": STABLE_DIFFUSION,
    "ending in noise": STABLE_DIFFUSION | {"set_alpha_to_one": False},
    "zero terminal SNR": STABLE_DIFFUSION | {"rescale_betas_zero_snr": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 40, "beta_start": 0.005, "beta_end": 0.3},
}

schedulers = pytest.mark.parametrize("known", SCHEDULERS.values(), ids=SCHEDULERS.keys())


def scheduler_and_path(known, **changes):
    scheduler = DDIMScheduler(**known, **changes)
    return scheduler, schedule_of(scheduler)


def nodes(path):
    """Times of the timesteps -1, 0, ..., T - 1."""
    return tensor([path.time_of(tau) for tau in range(-1, path.timesteps)])


@schedulers
def test_at_the_timesteps_it_is_the_diffusion(known):
    scheduler, path = scheduler_and_path(known)
    end, t = scheduler.final_alpha_cumprod.double().reshape(1), nodes(path)
    levels = torch.cat([end, scheduler.alphas_cumprod.double()])
    torch.testing.assert_close(path.alpha(t) ** 2, levels, rtol=0, atol=1e-12)
    torch.testing.assert_close(path.beta(t) ** 2, 1 - levels, rtol=0, atol=1e-12)
    assert path.alpha(t[:1]) == end.sqrt()
    # What single precision tells of the times does not move them off the timesteps.
    torch.testing.assert_close(path.alpha(t.float()), levels.sqrt().float(), rtol=1e-7, atol=0)


@schedulers
def test_the_variance_is_preserved_and_signal_rises_with_time(known):
    path = scheduler_and_path(known)[1]
    t = torch.linspace(0, 1, 12_345, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.beta(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)
    last = t <= path.time_of(0)  # after it, a path that ends in noise stands still
    assert bool((path.alpha(t)[last].diff() > 0).all())
    assert bool((path.alpha(t).diff() >= 0).all())


@schedulers
def test_rates_are_central_differences(known):
    path = scheduler_and_path(known)[1]
    gap = 1 / path.timesteps
    middle = nodes(path)[1:] + gap / 2
    for inside in (-0.3, 0.0, 0.3):
        t, h = middle + inside * gap, 1e-3 * gap
        for name in ("alpha", "beta"):
            value, rate = getattr(path, name), getattr(path, f"{name}_rate")
            difference = (value(t + h) - value(t - h)) / (2 * h)
            # Rounding is 1e-16 over a step of at least 1e-6. The rest is a third derivative: next to the data
            # beta is the square root of the distance d there, d >= 200 h, and misses h^2 / (8 d^2) = 3e-6.
            torch.testing.assert_close(rate(t), difference, rtol=1e-5, atol=1e-9)


@schedulers
def test_kappa_and_eta_are_what_they_are_defined_as_and_equal(known):
    path = scheduler_and_path(known)[1]
    t = torch.linspace(0.0005, 0.9995, 2_000, dtype=torch.float64)
    alpha, beta = path.alpha(t), path.beta(t)
    kappa = path.alpha_rate(t) / alpha
    torch.testing.assert_close(path.kappa(t), kappa, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.eta(t), beta * (kappa * beta - path.beta_rate(t)), rtol=1e-12, atol=1e-14)
    assert torch.equal(path.eta(t), path.kappa(t))


def test_at_a_timestep_the_rate_is_that_of_the_interval_towards_the_noise():
    """And of the only interval it has, for the noisiest."""
    path = DiscreteSchedule((0.81, 0.49, 0.09))
    rates = path.alpha_rate(tensor([path.time_of(tau) for tau in range(3)]))
    torch.testing.assert_close(rates, 3 * tensor([0.9 - 0.7, 0.7 - 0.3, 0.7 - 0.3]))


def test_rates_are_finite_where_no_signal_is_left():
    path = scheduler_and_path(SCHEDULERS["zero terminal SNR"])[1]
    start = tensor(0.0)
    assert path.levels[-1] == 0 == path.alpha(start)
    assert path.beta(start) == 1
    rise = math.sqrt(path.levels[-2])
    assert path.alpha_rate(start) == pytest.approx(1000 * rise, rel=1e-12)
    assert path.beta_rate(start) == 0
    # From pure noise a step leads to noise about the endpoint, v / alpha': nothing of the state is left.
    at = path.time_of(959)
    step = memoryless_step(path, 0.0, at)
    assert step.state == 0
    assert step.velocity * path.alpha_rate(start) == pytest.approx(float(path.alpha(tensor(at))), rel=1e-12)
    assert step.noise == pytest.approx(float(path.beta(tensor(at))), rel=1e-12)


@schedulers
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_timesteps_and_times_invert_each_other(known, precision):
    path = scheduler_and_path(known)[1]
    taus = torch.arange(-1, path.timesteps)
    times = nodes(path).to(precision)
    assert torch.equal(path.timestep_of(times), taus.double())
    assert torch.equal(path.timestep_of(times[:6].view(2, 3)), taus[:6].view(2, 3).double())
    assert torch.equal(path.timestep_of(times[3]), taus[3].double())


def test_times_between_the_timesteps_have_no_whole_timestep():
    path = scheduler_and_path(STABLE_DIFFUSION)[1]
    for tau in (0.002, 17.25, 998.5):
        assert float(path.timestep_of(tensor(path.time_of(tau)))) == pytest.approx(tau, abs=1e-9)


@pytest.mark.parametrize(
    ("spacing", "offset"),
    [("leading", 0), ("leading", 1), ("trailing", 0)],
    ids=["leading", "by one", "trailing"],
)
@pytest.mark.parametrize("steps", [1, 10, 20, 25, 50, 100, 7, 30])
def test_grids_are_those_of_diffusers(spacing, offset, steps):
    scheduler, path = scheduler_and_path(STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    grid = path.grid(steps, spacing, offset)
    assert len(grid) == steps + 1
    assert grid[-1] == 1
    assert torch.equal(path.timestep_of(tensor(grid[:-1])), scheduler.timesteps.double())
    assert all(t < s for t, s in itertools.pairwise(grid))


def test_trailing_begins_at_the_noisiest_and_all_timesteps_are_a_grid():
    path = scheduler_and_path(STABLE_DIFFUSION)[1]
    assert path.grid(25, "trailing", 1)[0] == 0 == path.grid(25, "trailing")[0]
    assert path.grid(25, "leading", 1)[-2] == path.time_of(1)
    for spacing in ("leading", "trailing"):
        assert path.grid(1000, spacing) == [path.time_of(tau) for tau in reversed(range(-1, 1000))]


def test_a_path_that_ends_in_noise_stands_still_after_its_cleanest_timestep():
    path = scheduler_and_path(SCHEDULERS["ending in noise"])[1]
    t = tensor([path.time_of(0), path.time_of(-0.5), 1.0])
    assert path.end == path.levels[0] < 1
    assert path.alpha(t).unique().numel() == 1
    assert path.beta(t[2]) == pytest.approx(math.sqrt(0.00085), rel=1e-4)
    assert torch.equal(path.alpha_rate(t)[1:], torch.zeros(2).double())
    step = memoryless_step(path, path.time_of(0), 1.0)
    assert (step.state, step.velocity, step.noise) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_a_grid_with_more_steps_than_timesteps_is_refused(steps, spacing):
    with pytest.raises(ValueError, match=f"1000 timesteps has no {steps} steps"):
        scheduler_and_path(STABLE_DIFFUSION)[1].grid(steps, spacing)


@pytest.mark.parametrize(("steps", "offset"), [(1000, 1), (10, 100), (10, -1)])
def test_an_offset_out_of_the_timesteps_is_refused(steps, offset):
    path = scheduler_and_path(STABLE_DIFFUSION)[1]
    with pytest.raises(ValueError, match=rf"offset of {offset} leads out of the timesteps 0 to 999"):
        path.grid(steps, "leading", offset)


def test_another_spacing_is_refused():
    with pytest.raises(ValueError, match="must be leading or trailing, got 'linspace'"):
        scheduler_and_path(STABLE_DIFFUSION)[1].grid(10, "linspace")


@pytest.mark.parametrize(
    ("levels", "end", "message"),
    [
        ((0.5, 0.6), 1.0, "must fall with the timestep"),
        ((0.5, 0.5), 1.0, "must fall with the timestep"),
        ((0.5, math.nan, 0.1), 1.0, "must fall with the timestep"),
        ((0.5, 0.4), 0.45, "must fall with the timestep"),
        ((0.5, -0.1), 1.0, r"in \[0, 1\], got -0.1 to 1.0"),
        ((0.9, 0.1), 1.5, r"in \[0, 1\], got 0.1 to 1.5"),
        ((0.9, 0.1), math.nan, "must fall"),
    ],
)
def test_levels_that_are_no_schedule_are_refused(levels, end, message):
    with pytest.raises(ValueError, match=message):
        DiscreteSchedule(levels, end)


def test_levels_are_the_products_of_what_the_steps_keep():
    scheduler, path = scheduler_and_path(STABLE_DIFFUSION)
    found = levels_of(scheduler.betas.double().tolist())
    first, second = scheduler.betas[:2].double().tolist()
    assert found[:2] == pytest.approx((1 - first, (1 - first) * (1 - second)), rel=1e-15)
    # The scheduler's own product is in single precision: a thousand roundings, each of at most 6e-8.
    torch.testing.assert_close(tensor(found), tensor(path.levels), rtol=6e-5, atol=0)


def test_equal_schedules_have_equal_hashes():
    """Steps are looked up by their path."""
    one, other = (scheduler_and_path(STABLE_DIFFUSION)[1] for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != DiscreteSchedule(one.levels, one.levels[0])
    assert hash(one) != hash(DiscreteSchedule(one.levels, one.levels[0]))


def test_a_last_step_that_leads_nowhere_is_refused():
    """Leading spacing without an offset, on a schedule that ends at its cleanest timestep."""
    path = DiscreteSchedule((0.9, 0.5, 0.2, 0.05), end=0.9)
    with pytest.raises(ValueError, match="lead from timestep 0 to its own signal level"):
        path.grid(2, "leading")
    assert path.grid(2, "leading", 1)[-1] == 1
    assert path.grid(2, "trailing")[-1] == 1
