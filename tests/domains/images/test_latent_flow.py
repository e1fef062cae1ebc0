"""A denoiser as a flow: against the steps of diffusers, and with the exact denoiser of Gaussian data."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from closed_forms import (
    Mixture,
    Quadratic,
    affine_velocity,
    chain_distribution,
    generator,
    halving_orders,
    matched_distribution,
    memoryless_limit,
    relative_error,
    tensor,
)
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, solve
from flowtilt.domains.images.model import LatentFlow, Prompted
from flowtilt.domains.images.pipeline import schedule_of
from flowtilt.domains.images.sections import GuidanceConfig
from flowtilt.functionals.utilities import RewardVariation
from flowtilt.interpolants import convert, memoryless_step
from flowtilt.model import FlowModel
from flowtilt.sampling import memoryless_steps, sample_sde

TARGETS = ("epsilon", "v_prediction", "sample")
targets = pytest.mark.parametrize("target", TARGETS)

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
TRAILING = STABLE_DIFFUSION | {"timestep_spacing": "trailing"}
# That of Stable Diffusion 1.4, whose last step leads to the level of timestep 0.
FIRST = STABLE_DIFFUSION | {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
NO_SIGNAL = TRAILING | {"rescale_betas_zero_snr": True}

# Each schedule with each of the targets that it has.
CASES = [
    *((TRAILING, target) for target in TARGETS),
    *((FIRST, target) for target in TARGETS),
    *((FIRST | {"set_alpha_to_one": True, "steps_offset": 0}, target) for target in TARGETS),
    *((NO_SIGNAL, target) for target in TARGETS[1:]),
]
cases = pytest.mark.parametrize(
    ("known", "target"),
    CASES,
    ids=[
        f"{target}, {name}"
        for name, count in {"trailing": 3, "ending in noise": 3, "leading": 3, "no signal": 2}.items()
        for target in TARGETS[-count:]
    ],
)


# --- Denoisers ---------------------------------------------------------------------------------


class Arbitrary(nn.Module):
    """A smooth function of state, timestep and prompt, that remembers what it was asked for."""

    def __init__(self, dimension=8, width=3):
        super().__init__()
        rng = generator(0)
        self.of_state = torch.randn(dimension, dimension, generator=rng, dtype=torch.float64)
        self.of_prompt = torch.randn(width, dimension, generator=rng, dtype=torch.float64)
        self.sizes, self.timesteps = [], []

    def forward(self, x, timesteps, embeddings):
        assert len(x) == len(timesteps) == len(embeddings)
        self.sizes.append(len(x))
        self.timesteps.append(timesteps)
        inner = x.flatten(1) @ self.of_state.to(x) + embeddings.to(x).sum(1) @ self.of_prompt.to(x)
        return SimpleNamespace(sample=torch.tanh(inner + timesteps[:, None].to(x) / 300).view_as(x))


class Fixed(nn.Module):
    """Predicts the same, whatever it is asked."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction

    def forward(self, x, timesteps, embeddings):
        return SimpleNamespace(sample=self.prediction)


SHAPE = (2, 2, 2)
TABLE = torch.randn(4, 5, 3, generator=generator(5))
EMPTY = torch.randn(5, 3, generator=generator(6))


def scheduler_of(known, target="epsilon"):
    return DDIMScheduler(**known, prediction_type=target)


def flow_of(denoiser, scheduler, shape=SHAPE, prompts=(TABLE, EMPTY), **settings):
    config = scheduler.config
    flow = LatentFlow(
        denoiser,
        schedule_of(scheduler),
        shape,
        config.prediction_type,
        config.timestep_spacing,
        config.steps_offset,
        **settings,
    )
    flow.use_prompts(*prompts)
    return flow


@contextmanager
def in_precision(precision):
    before = torch.get_default_dtype()
    torch.set_default_dtype(precision)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_double(scheduler):
    """The scheduler with the same levels, and double precision in what it makes of them.

    For mean and noise it takes the root of what is left of the variance, in single precision a difference
    of numbers that are nearly equal.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


# --- Against diffusers -------------------------------------------------------------------------


# From pure noise a step keeps nothing of the state: the scheduler takes the root of the rounding of zero,
# which at some numbers of steps is negative, and at those of these tests is not.
ROOT_OF_ROUNDING = math.sqrt(2**-53)


@cases
@pytest.mark.parametrize(
    ("precision", "accuracy", "steps"), [(torch.float32, 1e-5, 10), (torch.float64, 1e-12, 20)]
)
def test_a_memoryless_step_is_a_step_of_ddim_with_eta_one(known, target, precision, accuracy, steps):
    scheduler = in_double(scheduler_of(known, target))
    flow, prompt = flow_of(Arbitrary(), scheduler), torch.tensor([0, 3, 1, 1, 2])
    scheduler.set_timesteps(steps)
    coefficients, grid = memoryless_steps(flow, steps), flow.time_grid(steps)
    rng = generator(1)
    for t, step, tau in zip(grid, coefficients, scheduler.timesteps, strict=False):
        x, noise = torch.randn(2, 5, *SHAPE, generator=rng, dtype=torch.float64)
        own = x.to(precision)
        v = flow.velocity(own, own.new_tensor(t), flow.context_of(prompt))
        found = step.state * own + step.velocity * v + step.noise * noise
        output = flow.denoiser(x, tau.expand(5), TABLE[prompt]).sample
        expected = scheduler.step(output, int(tau), x, eta=1, variance_noise=noise).prev_sample
        # Rounding of endpoints of a size up to 40, where little signal is left.
        bound = accuracy if flow.path.alpha(tensor(t)) > 0 else max(accuracy, 4 * ROOT_OF_ROUNDING)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    # All steps have noise, but for a last one that leads to data without noise.
    assert [step.noise > 0 for step in coefficients[:-1]] == [True] * (steps - 1)
    assert (coefficients[-1].noise > 0) == (scheduler.final_alpha_cumprod < 1)


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("steps", [1, 20, 50, 1000])
def test_the_first_step_from_pure_noise_leads_to_the_noised_prediction(target, steps):
    """``alpha y + beta xi``, with nothing of the state; there v is minus the endpoint."""
    flow = flow_of(Arbitrary(), scheduler_of(NO_SIGNAL, target))
    x, noise = torch.randn(2, 3, *SHAPE, generator=generator(0))
    times, context = flow.time_grid(steps)[:2], flow.context_of(torch.arange(3))
    step, (start, then) = memoryless_step(flow.path, *times), torch.tensor(times)
    found = step.state * x + step.velocity * flow.velocity(x, start, context) + step.noise * noise
    output = flow.predict(x, start, context)
    endpoint = -output if target == "v_prediction" else output
    # Single precision.
    expected = flow.path.alpha(then) * endpoint + flow.path.beta(then) * noise
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@cases
def test_trajectories_are_those_of_ddim_with_eta_one(known, target):
    steps, prompt = 20, torch.tensor([2, 0, 3])
    with in_precision(torch.float64):
        scheduler = in_double(scheduler_of(known, target))
        flow = flow_of(Arbitrary(), scheduler)
        found = sample_sde(flow, 3, steps, generator(4), flow.context_of(prompt))
        scheduler.set_timesteps(steps)
        rng = generator(4)
        states = [torch.randn(3, *SHAPE, generator=rng)]
        for tau in scheduler.timesteps:
            output = flow.denoiser(states[-1], tau.expand(3), TABLE[prompt]).sample
            noise = torch.randn(3, *SHAPE, generator=rng)
            moved = scheduler.step(output, int(tau), states[-1], eta=1, variance_noise=noise)
            states.append(moved.prev_sample)
    # Rounding, which a chain of denoisers spreads by up to 1e2.
    bound = 1e2 * (2**-53 if flow.path.levels[-1] > 0 else ROOT_OF_ROUNDING)
    torch.testing.assert_close(found, torch.stack(states), rtol=bound, atol=10 * bound)


def small_unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=3,
            attention_head_dim=2,
            norm_num_groups=16,
        ).requires_grad_(False)


def test_a_guided_unet_is_sampled_as_diffusers_does():
    """With whole timesteps, one number for all latents, and guidance from two passes."""
    steps, prompt, scale = 10, torch.tensor([1, 2]), 7.5
    scheduler = scheduler_of(FIRST)
    unet = small_unet()
    flow = flow_of(unet, scheduler, (4, 4, 4), guidance=GuidanceConfig(sampling=scale))
    found = sample_sde(flow, 2, steps, generator(4), flow.context_of(prompt))
    scheduler.set_timesteps(steps)
    rng = generator(4)
    x = torch.randn(2, 4, 4, 4, generator=rng)
    for tau in scheduler.timesteps:
        without, conditional = (unet(x, tau, e).sample for e in (EMPTY.expand(2, -1, -1), TABLE[prompt]))
        noise = torch.randn(x.shape, generator=rng)
        guided = without + scale * (conditional - without)
        x = scheduler.step(guided, tau, x, eta=1, variance_noise=noise).prev_sample
    # Single precision: endpoints from a signal of 0.068, guided by 7.5, at each of ten steps.
    assert relative_error(found[-1], x) < 1e-5
    assert found.dtype == torch.float32


# --- Predictions of each other -----------------------------------------------------------------


def known_pair(path, t, precision):
    """States at times (n,), with the noise and data that they are made of."""
    noise, endpoint = torch.randn(2, len(t), *SHAPE, generator=generator(2), dtype=precision)
    alpha, beta, alpha_rate, beta_rate = (
        of(t).view(-1, 1, 1, 1) for of in (path.alpha, path.beta, path.alpha_rate, path.beta_rate)
    )
    truth = {
        "epsilon": noise,
        "v_prediction": alpha * noise - beta * endpoint,
        "sample": endpoint,
        "velocity": alpha_rate * endpoint + beta_rate * noise,
        "score": -noise / beta,
    }
    return alpha * endpoint + beta * noise, truth


@cases
@pytest.mark.parametrize(("precision", "accuracy"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_velocity_and_score_follow_from_what_the_denoiser_predicts(known, target, precision, accuracy):
    scheduler = scheduler_of(known, target)
    path = schedule_of(scheduler)
    t = torch.tensor([path.time_of(tau) for tau in range(1, 999)], dtype=precision)
    x, truth = known_pair(path, t, precision)
    flow = flow_of(Fixed(truth[target]), scheduler)
    context = flow.context_of(torch.zeros(len(t), dtype=torch.long))
    velocity = flow.velocity(x, t, context)

    def close(found, expected):
        # Of the largest entry at each time, which is where rounding is measured from.
        sizes = expected.flatten(1).abs().amax(1)
        assert float(((found - expected).flatten(1).abs().amax(1) / sizes).max()) < accuracy

    close(velocity, truth["velocity"])
    close(flow.score(x, t, context), truth["score"])
    for name, kind in (("epsilon", "noise"), ("sample", "endpoint")):
        close(convert(velocity, x, t, path, "velocity", kind), truth[name])


def test_the_score_is_that_of_the_guidance_of_the_control():
    flow = flow_of(
        Arbitrary(), scheduler_of(TRAILING), guidance=GuidanceConfig(sampling=5.0, adjoint=2.0, control=3.0)
    )
    x, t = torch.randn(4, *SHAPE, generator=generator(0)), torch.tensor(0.4)
    context = flow.context_of(torch.arange(4))
    expected = flow.predict(x, t, replace(context, guidance=3.0)) / -flow.path.beta(t)
    assert relative_error(flow.score(x, t, context), expected) < 1e-5


@targets
def test_a_denoiser_of_noise_alone_is_refused_where_no_signal_is_left(target):
    path = schedule_of(scheduler_of(NO_SIGNAL))
    if target != "epsilon":
        assert LatentFlow(Arbitrary(), path, SHAPE, target).path.alpha(tensor(0.0)) == 0
        return
    with pytest.raises(
        ValueError, match="needs a denoiser that predicts v_prediction or sample, not epsilon"
    ):
        LatentFlow(Arbitrary(), path, SHAPE, target)


# --- Prompts and guidance ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.0, 7.5, -0.5])
@targets
def test_guidance_goes_from_the_empty_prompt_through_the_prompt(scale, target):
    flow = flow_of(Arbitrary(), scheduler_of(TRAILING, target))
    x, t = torch.randn(6, *SHAPE, generator=generator(0)), torch.linspace(0.1, 0.9, 6)
    prompt = torch.tensor([0, 1, 2, 3, 3, 0])
    found = flow.predict(x, t, replace(flow.context_of(prompt), guidance=scale))
    # One pass of the denoiser: of each sample once, or together with the empty prompt.
    assert flow.denoiser.sizes == ([6] if scale == 1 else [12])
    timesteps = flow.path.timestep_of(t).float()
    conditional = flow.denoiser(x, timesteps, TABLE[prompt]).sample
    without = flow.denoiser(x, timesteps, EMPTY.expand(6, -1, -1)).sample
    torch.testing.assert_close(found, without + scale * (conditional - without), rtol=1e-5, atol=1e-5)
    assert relative_error(conditional, without) > 0.1


def test_each_use_has_its_guidance_and_the_prompts_stay():
    flow = flow_of(
        Arbitrary(), scheduler_of(TRAILING), guidance=GuidanceConfig(sampling=7.5, adjoint=1.0, control=2.0)
    )
    drawn = flow.draw_context(50, generator(3))
    assert drawn.guidance == 7.5
    scales = {use: flow.context_for(use, drawn).guidance for use in ("sampling", "adjoint", "control")}
    assert scales == {"sampling": 7.5, "adjoint": 1.0, "control": 2.0}
    assert [flow.evaluations(use) for use in scales] == [2, 1, 2]
    for use in scales:
        kept = flow.context_for(use, flow.context_for("adjoint", drawn))
        assert kept.guidance == scales[use]
        assert torch.equal(kept.embeddings, drawn.embeddings)
        assert torch.equal(kept.empty, EMPTY)
    # What is as it should be is not made anew.
    assert flow.context_for("sampling", drawn) is drawn


def test_a_selection_keeps_the_prompts_of_its_samples():
    flow = flow_of(Arbitrary(), scheduler_of(TRAILING), guidance=GuidanceConfig(sampling=3.0))
    context = flow.context_of(torch.tensor([3, 1, 0, 2, 1]))
    torch.testing.assert_close(context.embeddings, TABLE[[3, 1, 0, 2, 1]])
    some = flow.select_context(context, torch.tensor([4, 0, 0]))
    assert isinstance(some, Prompted)
    assert torch.equal(some.embeddings, TABLE[[1, 3, 3]])
    assert some.guidance == 3
    x, t = torch.randn(5, *SHAPE, generator=generator(0)), torch.linspace(0.2, 0.8, 5)
    index = torch.tensor([2, 4])
    found = flow.predict(x[index], t[index], context.select(index))
    torch.testing.assert_close(found, flow.predict(x, t, context)[index])


def test_prompts_are_drawn_evenly_and_by_the_generator_alone():
    flow, rng = flow_of(Arbitrary(), scheduler_of(TRAILING)), generator(3)
    counts = flow.draw_context(4003, generator(3)).prompt.bincount(minlength=4)
    assert set(counts.tolist()) == {1000, 1001}
    # A single one is any of them: binomial counts, 500 with a standard deviation of 19.4.
    first = torch.cat([flow.draw_context(1, rng).prompt for _ in range(2000)]).bincount(minlength=4)
    assert int((first - 500).abs().max()) < 4 * 19.4
    drawn = [flow.draw_context(50, generator(seed)).prompt for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_flow_without_prompts_asks_for_them():
    flow = LatentFlow(Arbitrary(), schedule_of(scheduler_of(TRAILING)), SHAPE)
    with pytest.raises(ValueError, match="give it some by use_prompts"):
        flow.draw_context(3, generator(0))


# --- How much goes through the denoiser, and how exactly ---------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("shared", [True, False], ids=["one time", "a time for each"])
def test_chunks_change_nothing(scale, shared):
    x, prompt = torch.randn(8, *SHAPE, generator=generator(0)), torch.arange(8) % 4
    t = torch.tensor(0.3) if shared else torch.linspace(0.1, 0.9, 8)
    found = {}
    for chunk in (None, 3, 8):
        guidance = GuidanceConfig(sampling=scale)
        flow = flow_of(Arbitrary(), scheduler_of(TRAILING), guidance=guidance, chunk=chunk)
        with torch.no_grad():
            found[chunk] = flow.velocity(x, t, flow.context_of(prompt))
        passes = 1 if scale == 1 else 2
        assert flow.denoiser.sizes == [passes * n for n in ((3, 3, 2) if chunk == 3 else (8,))]
    # The order of sums within a product of matrices may depend on how many rows it has.
    torch.testing.assert_close(found[3], found[None], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[8], found[None])


def test_where_gradients_are_kept_all_latents_go_together():
    flow = flow_of(Arbitrary(), scheduler_of(TRAILING), chunk=3)
    x = torch.randn(8, *SHAPE, generator=generator(0)).requires_grad_(True)
    flow.velocity(x, torch.tensor(0.3), flow.context_of(torch.arange(8) % 4)).sum().backward()
    assert flow.denoiser.sizes == [8]
    assert bool((x.grad != 0).all())


def test_half_precision_is_that_of_the_products_alone():
    """bfloat16 rounds by up to 2^-9: two factors, each product, and the sum of the two products."""
    x, prompt, unit = torch.randn(64, *SHAPE, generator=generator(0)), torch.arange(64) % 4, 2**-9
    flow = flow_of(Arbitrary(), scheduler_of(TRAILING), precision="bfloat16")
    found = flow.predict(x, torch.tensor(0.9), flow.context_of(prompt)).flatten(1)
    assert found.dtype == torch.float32
    factors = [(x.flatten(1), flow.denoiser.of_state), (TABLE[prompt].sum(1), flow.denoiser.of_prompt)]
    products = [a @ b.float() for a, b in factors]
    sizes = sum(a.abs() @ b.float().abs() for a, b in factors)
    rounding = 2 * unit * sizes + unit * (sum(p.abs() for p in products) + sum(products).abs())
    exact = torch.tanh(sum(products) + 99 / 300)
    assert bool(((found - exact).abs() <= 1.01 * rounding).all())  # and terms of second order
    assert 1e-4 < relative_error(found, exact) < 1e-2


def test_a_unet_runs_in_half_precision():
    """Each product adds roundings of its factors and of itself, of a root mean square of 2^-9 together."""
    unet = small_unet()
    x, t = torch.randn(16, 4, 4, 4, generator=generator(0)), torch.linspace(0.05, 0.95, 16)
    found = {}
    for precision in ("float32", "bfloat16"):
        flow = flow_of(unet, scheduler_of(TRAILING), (4, 4, 4), precision=precision)
        found[precision] = flow.predict(x, t, flow.context_of(torch.arange(16) % 4))
        assert found[precision].dtype == torch.float32
    products = sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in unet.modules())
    assert 1e-4 < relative_error(found["bfloat16"], found["float32"]) < math.sqrt(products) * 2**-9


# --- Gaussian data: the exact denoiser -----------------------------------------------------------

COVARIANCE = tensor([[1.0, 0.4], [0.4, 0.6]])
MEANS = tensor([[0.5, -0.3], [-1.0, 0.4]])
EMPTY_MEAN = tensor([0.2, 0.1])
LINEAR = Quadratic([1.0, 0.5])
QUADRATIC = Quadratic([1.0, -0.5], [[1.5, 0.3], [0.3, 0.8]])
KL_WEIGHT = 1.3


class Gaussian(nn.Module):
    """The exact denoiser of ``N(m, S)``, where the prompt's embedding is m.

    With ``Sigma = alpha^2 S + beta^2`` and ``r = Sigma^-1 (x - alpha m)``, the posterior means of noise and
    data are ``beta r`` and ``m + alpha S r``.

    Args:
        path: with the timesteps.
        target: what it predicts.
    """

    def __init__(self, path, target):
        super().__init__()
        t, self.target = tensor([path.time_of(tau) for tau in range(path.timesteps)]), target
        self.alpha, self.beta = path.alpha(t)[:, None], path.beta(t)[:, None]
        eye = torch.eye(2, dtype=torch.float64)
        self.precision = torch.linalg.inv(
            self.alpha[..., None] ** 2 * COVARIANCE + self.beta[..., None] ** 2 * eye
        )

    def forward(self, x, timesteps, embeddings):
        tau, mean, flat = timesteps.long(), embeddings[:, 0].double(), x.flatten(1).double()
        alpha, beta = self.alpha[tau], self.beta[tau]
        r = torch.bmm(self.precision[tau], (flat - alpha * mean)[..., None])[..., 0]
        noise, endpoint = beta * r, mean + alpha * r @ COVARIANCE
        if self.target == "v_prediction":
            found = alpha * noise - beta * endpoint
        else:
            found = noise if self.target == "epsilon" else endpoint
        return SimpleNamespace(sample=found.view_as(x).to(x))


class Corrected(nn.Module):
    """The exact denoiser plus, at each of a sampler's timesteps, a trained offset or a trained affine map.

    Tilts change the score by ``alpha`` times something that stays of one size, which a prediction's gain
    turns into its own units. Affine maps, for a tilt by a quadratic, are of the state and the prompt's mean.
    """

    def __init__(self, exact, path, grid, affine):
        super().__init__()
        self.exact, self.affine = exact, affine
        gains = {"epsilon": exact.alpha * exact.beta, "v_prediction": exact.beta, "sample": exact.beta**2}
        self.gain = gains[exact.target]
        self.entry = torch.full((path.timesteps,), len(grid))  # out of the table, but for the sampler's
        self.entry[path.timestep_of(tensor(grid)).long()] = torch.arange(len(grid))
        self.table = nn.Parameter(torch.zeros(len(grid), 5 if affine else 1, 2, dtype=torch.float64))

    def forward(self, x, timesteps, embeddings):
        tau = timesteps.long()
        known = [x.flatten(1), embeddings[:, 0]] if self.affine else []
        features = torch.cat([*known, x.new_ones(len(x), 1)], dim=1).double()
        moved = torch.bmm(features[:, None], self.table[self.entry[tau]])[:, 0]
        found = self.exact(x, timesteps, embeddings).sample
        return SimpleNamespace(sample=found + (self.gain[tau] * moved).view_as(x).to(x))


def gaussian_flow(known, target, steps=None, affine=False, **settings):
    """The flow of both prompts, with a correction if there is a sampler to make it for."""
    scheduler = scheduler_of(known, target)
    path = schedule_of(scheduler)
    denoiser = Gaussian(path, target)
    if steps is not None:
        denoiser = Corrected(denoiser, path, path.grid(steps, "trailing")[:-1], affine)
    return flow_of(denoiser, scheduler, (2, 1, 1), (MEANS[:, None], EMPTY_MEAN[None]), **settings)


class Flat(FlowModel):
    """The same flow under one prompt, with states (batch, 2), which the closed forms are written for."""

    def __init__(self, flow, prompt):
        super().__init__()
        self.flow, self.prompt, self.path = flow, prompt, flow.path

    def time_grid(self, steps):
        return self.flow.time_grid(steps)

    def prior(self, count, generator, context=None):
        return self.flow.prior(count, generator).flatten(1)

    def velocity(self, x, t, context=None):
        context = self.flow.context_of(torch.full((len(x),), self.prompt))
        return self.flow.velocity(x.view(-1, 2, 1, 1), t, context).flatten(1)


def distribution_of(prompt, scale=1.0):
    """The data of a prompt under guidance: of a Gaussian it moves the mean alone."""
    return Mixture.gaussian(EMPTY_MEAN + scale * (MEANS[prompt] - EMPTY_MEAN), COVARIANCE)


def chosen_prompts(flow, count):
    return flow.context_of(torch.arange(count) % 2)


@targets
@pytest.mark.parametrize("tau", [0, 1, 150, 500, 850, 999])
def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance_and_its_residual_is_unpredictable(
    target, tau
):
    """It is ``alpha^2 S Sigma^-1`` of the noise and ``beta^2 S Sigma^-1`` of the data, of a covariance S.

    ``Sigma = alpha^2 S + beta^2``, and ``v = (noise - beta x) / alpha`` has the noise's over ``alpha^2``.
    What is left has mean zero given the state: no change of the prediction that is linear in state and
    prompt lowers the mean square.
    """
    count = 40_000
    flow = gaussian_flow(TRAILING, target)
    path, context, rng = flow.path, chosen_prompts(flow, count), generator(tau)
    factor = torch.linalg.cholesky(COVARIANCE)
    x1 = MEANS[context.prompt] + torch.randn(count, 2, generator=rng, dtype=torch.float64) @ factor.T
    x0 = torch.randn(count, 2, generator=rng, dtype=torch.float64)
    t = tensor(path.time_of(tau)).expand(count)
    pair = x1.view(-1, 2, 1, 1), x0.view(-1, 2, 1, 1)
    residual = flow.matching_residual(*pair, t, context).flatten(1)
    losses = flow.matching_loss(*pair, t, context)
    torch.testing.assert_close(losses, residual.square().mean(1))

    alpha, beta = path.alpha(t[0]), path.beta(t[0])
    explained = COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + beta**2 * torch.eye(2).double())
    variance = {"epsilon": alpha**2, "sample": beta**2, "v_prediction": 1.0}[target] * explained
    error = losses.std() / math.sqrt(count)
    assert abs(float((losses.mean() - variance.trace() / 2) / error)) < 4
    assert float(error / losses.mean()) < 0.01

    features = torch.cat([alpha * x1 + beta * x0, MEANS[context.prompt], torch.ones(count, 1)], dim=1)
    products = (residual[:, :, None] * features[:, None]).flatten(1)
    assert float((products.mean(0) / (products.std(0) / math.sqrt(count))).abs().max()) < 4


def test_the_denoiser_is_trained_at_its_timesteps_alone():
    flow = flow_of(Arbitrary(), scheduler_of(TRAILING))
    t = torch.cat([torch.linspace(0, 1, 2003), torch.tensor([flow.path.time_of(417)])])
    x1, x0 = torch.randn(2, len(t), *SHAPE, generator=generator(0))
    residual = flow.matching_residual(x1, x0, t, flow.context_of(torch.arange(len(t)) % 4))
    (asked,) = flow.denoiser.timesteps
    assert torch.equal(asked, asked.round())
    assert (float(asked.min()), float(asked.max()), float(asked[-1])) == (0, 999, 417)
    inner = slice(2, -3)
    assert float((asked - flow.path.timestep_of(t))[inner].abs().max()) < 1
    # States are of the timesteps that the denoiser is told.
    levels = scheduler_of(TRAILING).alphas_cumprod[asked.long()].view(-1, 1, 1, 1)
    states = levels.sqrt() * x1 + (1 - levels).sqrt() * x0
    expected = flow.denoiser(states, asked, TABLE[torch.arange(len(t)) % 4]).sample - x0
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


@targets
def test_guidance_of_gaussians_moves_their_mean(target):
    """The velocity is affine in it: that of ``N(m_0 + scale (m - m_0), S)``."""
    scale = 2.5
    flow = gaussian_flow(TRAILING, target, guidance=GuidanceConfig(sampling=scale))
    other = gaussian_flow(TRAILING, target)
    other.use_prompts(
        torch.stack([distribution_of(prompt, scale).mean for prompt in (0, 1)])[:, None], EMPTY_MEAN[None]
    )
    x = torch.randn(6, 2, 1, 1, generator=generator(0), dtype=torch.float64)
    for t in torch.linspace(0.05, 0.95, 7, dtype=torch.float64):
        found, expected = (f.velocity(x, t, chosen_prompts(f, 6)) for f in (flow, other))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- Adjoint Matching of Gaussian data, under the schedule of Stable Diffusion -------------------

rewards = pytest.mark.parametrize("reward", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
schedules = pytest.mark.parametrize(
    ("known", "target"), [(TRAILING, "epsilon"), (NO_SIGNAL, "v_prediction")], ids=["signal", "no signal"]
)


@schedules
@pytest.mark.parametrize("reward", [None, LINEAR, QUADRATIC], ids=["pretrained", "linear", "quadratic"])
@pytest.mark.slow_after(2)
def test_the_distribution_of_the_steps_has_order_one(known, target, reward):
    """DDIM's steps with eta = 1 leave Gaussian data too little variance: 18 % at 25 steps, 3 % at 200."""
    flow = Flat(gaussian_flow(known, target), 0)
    limit = memoryless_limit(flow.path, distribution_of(0), reward, KL_WEIGHT)
    errors = {"mean": [], "covariance": []}
    for steps in (25, 50, 100, 200):
        found = (
            chain_distribution(flow, steps)
            if reward is None
            else matched_distribution(flow, reward, KL_WEIGHT, steps, "step")
        )
        for name, value, exact in zip(errors, found, limit, strict=True):
            errors[name].append(relative_error(value, exact))
    if reward is None:  # the posterior mean has the right mean in every step
        assert max(errors.pop("mean")) < 1e-13
    for error in errors.values():
        assert error[0] < 0.2
        assert error[-1] < 0.04
    orders = halving_orders(errors["covariance"])
    # It comes near to 1 slowly, by steps that are spread over orders of magnitude of the noise.
    assert orders == sorted(orders)
    assert 0.75 < orders[0] < orders[-1] < 1


@rewards
def test_where_no_signal_is_left_at_the_start_the_limit_is_the_tilted_distribution(reward):
    exact = distribution_of(0).tilted(reward, KL_WEIGHT)
    errors = []
    for known in (NO_SIGNAL, TRAILING):
        mean, covariance = memoryless_limit(
            schedule_of(scheduler_of(known)), distribution_of(0), reward, KL_WEIGHT
        )
        errors.append(max(relative_error(mean, exact.mean), relative_error(covariance, exact.covariance)))
    assert errors[0] < 1e-13
    # The signal of 0.068 that Stable Diffusion leaves moves the mean.
    assert 1e-3 < errors[1] < 1e-2


@schedules
@pytest.mark.parametrize("steps", [20, 50])
def test_what_a_linear_reward_is_matched_to_is_the_tilt_of_the_distribution_of_the_steps(
    known, target, steps
):
    """All but its first state's part, which no control moves, and the last step's share of it.

    The chain's endpoint is ``P x_0`` plus noise of the covariance ``C - P P^T``, and ``exp(c x / lambda)``
    moves it by that times ``c / lambda``. The last step has no noise, and is moved as by noise of the size
    ``sqrt(velocity eta)``.
    """
    flow = Flat(gaussian_flow(known, target), 1)
    mean, covariance = chain_distribution(flow, steps)
    eye, coefficients = torch.eye(2, dtype=torch.float64), memoryless_steps(flow, steps)
    product = eye
    for t, step in zip(flow.time_grid(steps)[:-1], coefficients, strict=True):
        slope, _ = affine_velocity(flow, t)
        product = (step.state * eye + step.velocity * slope) @ product
    last = coefficients[-1].velocity * flow.path.eta(tensor(flow.time_grid(steps)[-2]))
    c = LINEAR.linear / KL_WEIGHT
    moved = (covariance - product @ product.T) @ c + last * c
    found = matched_distribution(flow, LINEAR, KL_WEIGHT, steps, "step")
    torch.testing.assert_close(found[0], mean + moved, rtol=1e-11, atol=0)
    torch.testing.assert_close(found[1], covariance, rtol=1e-11, atol=0)
    # The last step's share, of the order of a step.
    assert float(last * c.norm() / moved.norm()) < 1.1 / steps


def solved(flow, reward, steps, seed=0, **changes):
    """Several updates on the same trajectories, since the family fits within a few hundred of them."""
    settings = {"updates": 160, "batch": 4, "pool": 4, "learning_rate": 0.1, "rest_share": 1.0, "passes": 8}
    settings["target"] = (
        "step"  # that of the shipped experiments, whose distribution of the steps is known exactly
    )
    own = AdjointMatchingSettings(steps=steps, ramp=0.0, gradient_clip=10.0, **(settings | changes))
    return solve(flow, RewardVariation(reward), KL_WEIGHT, own, generator(seed)).model


def check_samples(model, steps, distributions, count=5_000):
    """Means and covariances of samples of both prompts, within four standard errors of Gaussian ones."""
    context = chosen_prompts(model, 2 * count)
    x = sample_sde(model, 2 * count, steps, generator(1), context)[-1].flatten(1).double()
    for prompt, (mean, covariance) in enumerate(distributions):
        own, variances = x[context.prompt == prompt], covariance.diagonal()
        assert float(((own.mean(0) - mean) / (variances / count).sqrt()).abs().max()) < 4
        error = ((torch.outer(variances, variances) + covariance**2) / count).sqrt()
        assert float(((own.T.cov() - covariance) / error).abs().max()) < 4


@pytest.mark.parametrize(
    ("known", "target", "steps", "guidance"),
    [
        (TRAILING, "epsilon", 20, GuidanceConfig()),
        (TRAILING, "epsilon", 50, GuidanceConfig()),
        (NO_SIGNAL, "v_prediction", 20, GuidanceConfig()),
        (TRAILING, "sample", 20, GuidanceConfig(sampling=3.0, adjoint=1.0, control=2.0)),
    ],
    ids=["noise", "noise, 50 steps", "v, no signal", "data, guided"],
)
@pytest.mark.slow_after(1)
def test_a_linear_reward_moves_the_mean_of_every_prompt(known, target, steps, guidance):
    """The lean adjoint is the same for all states: the regression has no noise, and finds its fixed point."""
    flow = gaussian_flow(known, target, steps, guidance=guidance)
    model, distributions = solved(flow, LINEAR, steps), []
    for prompt in (0, 1):
        mean, covariance = chain_distribution(Flat(model, prompt), steps)
        matched = matched_distribution(Flat(flow, prompt), LINEAR, KL_WEIGHT, steps, "step")
        # Of what is left of 160 updates; samples and adjoints are in single precision.
        assert relative_error(mean, matched[0]) < 2e-4
        assert relative_error(covariance, matched[1]) < 1e-6
        before, exact = distribution_of(prompt, guidance.sampling), COVARIANCE @ LINEAR.linear / KL_WEIGHT
        # The rest is of the steps, as their order has it.
        assert relative_error(mean - before.mean, exact) < {20: 0.18, 50: 0.1}[steps]
        distributions.append((mean, covariance))
    check_samples(model, steps, distributions)


@pytest.mark.parametrize(
    ("known", "target", "seed"),
    [(TRAILING, "epsilon", 0), (NO_SIGNAL, "v_prediction", 1)],
    ids=["noise", "v, no signal"],
)
@pytest.mark.slow
def test_a_quadratic_reward_moves_mean_and_covariance(known, target, seed):
    steps, distributions = 20, []
    flow = gaussian_flow(known, target, steps, affine=True)
    model = solved(flow, QUADRATIC, steps, seed, updates=240, batch=512, pool=512)
    for prompt in (0, 1):
        mean, covariance = chain_distribution(Flat(model, prompt), steps)
        matched = matched_distribution(Flat(flow, prompt), QUADRATIC, KL_WEIGHT, steps, "step")
        # The noise of training: over five seeds entries have standard deviations of at most 0.008 and 0.003.
        assert float((mean - matched[0]).abs().max()) < 4 * 0.008
        assert float((covariance - matched[1]).abs().max()) < 4 * 0.003
        # That is finer than what the tilt of the distribution of the steps differs by, and of data in
        # continuous time.
        pretrained = Mixture.gaussian(*chain_distribution(Flat(flow, prompt), steps))
        for distribution, least in ((pretrained, 0.013), (distribution_of(prompt), 0.08)):
            other = distribution.tilted(QUADRATIC, KL_WEIGHT).covariance
            assert float((other - matched[1]).abs().max()) > least
        distributions.append((mean, covariance))
    check_samples(model, steps, distributions)
