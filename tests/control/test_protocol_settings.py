"""What the papers' protocols ask of Adjoint Matching beyond the plain regression, as numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from closed_forms import (
    AffineFlow,
    AffineTable,
    Mixture,
    MixtureFlow,
    Quadratic,
    chain_distribution,
    generator,
    matched_distribution,
    relative_error,
    tensor,
)
from flowtilt.control import adjoint_matching
from flowtilt.control.adjoint_matching import AdjointMatchingSettings, lean_adjoint, solve, stratified_draw
from flowtilt.control.base import annealed_rate
from flowtilt.control.discretisation import discretisation_bias
from flowtilt.control.endpoints import Pathwise, Terminal, cut
from flowtilt.control.loss_steps import (
    Part,
    draw_steps,
    first_step,
    parts_by_counts,
    path_kl,
    shares_in_loss,
)
from flowtilt.functionals.utilities import Hinge, RewardVariation
from flowtilt.interpolants import Linear, time_grid
from flowtilt.resuming import Resumption
from flowtilt.sampling import memoryless_steps, sample_sde

GAUSSIAN = Mixture.gaussian([0.5, -0.3], [[1.0, 0.4], [0.4, 0.6]])
QUADRATIC = Quadratic([1.0, -0.5], [[1.5, 0.3], [0.3, 0.8]])
SMALL = AdjointMatchingSettings(updates=6, batch=4, pool=12, steps=5)


def small_flow():
    return AffineFlow(MixtureFlow(Linear(), GAUSSIAN), AffineTable(Linear(), 5))


# --- The steps in the loss ---------------------------------------------------------------------


def test_exactly_as_many_steps_are_drawn_of_each_part_and_all_of_a_part_as_often():
    """Four of fifty, two of the first 60 %: the protocol of Stable Diffusion."""
    parts = AdjointMatchingSettings(steps=50, loss_steps=((0.6, 2), (1.0, 2))).parts(time_grid(50))
    random, counts = generator(0), np.zeros(50)
    for _ in range(3000):
        drawn = draw_steps(parts, random)
        assert len(drawn.unique()) == 4
        assert int((drawn < 30).sum()) == 2
        counts[drawn.numpy()] += 1
    expected = np.array(shares_in_loss(parts, 50))
    assert expected[0] == 2 / 30
    assert expected[-1] == 2 / 20
    deviation = np.sqrt(3000 * expected * (1 - expected))
    assert np.abs((counts - 3000 * expected) / deviation).max() < 4


def test_from_a_time_on_no_step_before_it_is_drawn():
    settings = AdjointMatchingSettings(steps=100, adjoint_from=0.5, loss_steps=((1.0, 10),))
    parts = settings.parts(time_grid(100))
    assert parts == (Part(50, 100, 10),)
    assert all(int(draw_steps(parts, generator(k)).min()) >= 50 for k in range(50))
    assert first_step(time_grid(100, 2.0), 0.75) == 50
    by_shares = replace(settings, loss_steps=None).parts(time_grid(100))
    assert by_shares == (Part(50, 88, 10), Part(88, 100, None))


def test_the_control_energy_of_some_steps_stands_for_all_of_their_part():
    """Of controls that are the same at all steps of a part, the estimate is exact."""
    parts = parts_by_counts(2, 12, ((0.6, 2), (1.0, 3)))
    energies = torch.tensor([5.0, 5.0, 7.0, 7.0, 7.0], dtype=torch.float64)
    assert path_kl(energies, parts, 12) == pytest.approx(0.5 * (6 * 5 + 4 * 7) / 12, rel=1e-15)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (((0.6, 2),), "grow from above 0 to 1"),
        (((0.6, 2), (0.4, 1), (1.0, 1)), "grow"),
        (((0.1, 4), (1.0, 1)), "draws 4 of the 1 steps up to the share 0.1"),
        (((1.0, 0),), "no step at all"),
    ],
)
def test_parts_that_cannot_be_drawn_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        AdjointMatchingSettings(steps=10, loss_steps=counts)


def test_a_time_that_no_step_starts_at_is_refused_before_any_update():
    with pytest.raises(ValueError, match="adjoint_from"):
        solve(small_flow(), RewardVariation(QUADRATIC), 1.0, replace(SMALL, adjoint_from=0.9), generator(0))


def test_an_adjoint_that_is_solved_back_to_a_step_is_that_of_the_whole_way():
    flow, steps = MixtureFlow(Linear(), GAUSSIAN), 8
    trajectories = sample_sde(flow, 3, steps, generator(0))
    terminal = Terminal(QUADRATIC.gradient(trajectories[-1]))
    whole = lean_adjoint(flow, trajectories, terminal, memoryless_steps(flow, steps))
    part = lean_adjoint(flow, trajectories, terminal, memoryless_steps(flow, steps), start=5)
    for one, other in zip(whole, part, strict=True):
        assert other.shape[0] == 3
        assert torch.equal(one[5:], other)


def test_where_only_late_steps_are_trained_the_early_velocity_stays_the_bases_and_the_late_one_does_not():
    base = small_flow()
    settings = replace(SMALL, adjoint_from=0.5, rest_share=1.0, updates=20, learning_rate=0.05)
    tuned = solve(base, RewardVariation(QUADRATIC), 1.0, settings, generator(1)).model
    x = torch.randn(4, 2, generator=generator(2), dtype=torch.float64)
    moved = [
        float((tuned.velocity(x, tensor(t)) - base.velocity(x, tensor(t))).abs().max().detach())
        for t in base.time_grid(5)[:-1]
    ]
    assert moved[:3] == [0.0, 0.0, 0.0]
    assert min(moved[3:]) > 0.01


def test_network_passes_leave_out_what_is_not_solved():
    counts = {}
    for at in (0.0, 0.5):
        settings = replace(SMALL, adjoint_from=at, updates=1, loss_steps=((1.0, 1),))
        solution = solve(small_flow(), RewardVariation(QUADRATIC), 1.0, settings, generator(0))
        counts[at] = solution.history[0]["network_passes"]
    # Steps 3 and 4 start at 0.5 or later; the adjoint of state 3 is pulled through step 3, not step 2's.
    assert counts[0.0] - counts[0.5] == 2 * 2 * 4


def test_the_closed_form_bias_knows_the_parts():
    times = tuple(time_grid(40))
    plain = AdjointMatchingSettings(steps=40, last_share=0.25, rest_share=1.0)
    same = replace(plain, loss_steps=((0.75, 30), (1.0, 10)))
    other = replace(plain, loss_steps=((0.75, 2), (1.0, 10)))
    reached = [discretisation_bias(Linear(), times, 0.0, s).reached for s in (plain, same, other)]
    assert reached[0] == reached[1]
    assert abs(reached[0] - reached[2]) > 1e-4


# --- The buffer ---------------------------------------------------------------------------------


def test_every_trajectory_of_a_buffer_is_trained_on_as_often_as_there_are_passes(monkeypatch):
    settings = replace(SMALL, updates=18, batch=4, buffer=12, pool=12, passes=3)
    seen, filled = [], []
    accumulate, fill = adjoint_matching._accumulate, adjoint_matching._fill

    def watched(model, buffer, members, *more):
        seen.append(members)
        return accumulate(model, buffer, members, *more)

    def counted(base, batch, *more):
        filled.append(tuple(batch.trajectories.shape))
        return fill(base, batch, *more)

    monkeypatch.setattr(adjoint_matching, "_accumulate", watched)
    monkeypatch.setattr(adjoint_matching, "_fill", counted)
    solve(small_flow(), RewardVariation(QUADRATIC), 1.0, settings, generator(0))
    # Two buffers of 12 trajectories with nine updates each, and never more than that in memory.
    assert filled == [(6, 12, 2), (6, 12, 2)]
    assert all(len(members) == 4 for members in seen)
    for buffer in (seen[:9], seen[9:]):
        assert torch.cat(buffer).bincount(minlength=12).tolist() == [3] * 12
        passes = [torch.cat(buffer[k : k + 3]) for k in (0, 3, 6)]
        assert all(sorted(one.tolist()) == list(range(12)) for one in passes)
        assert not torch.equal(passes[0], passes[1])  # mini-batches are drawn anew


def test_a_buffer_of_one_batch_is_what_several_passes_have_always_been():
    one, other = (
        solve(small_flow(), Hinge(QUADRATIC, 0.2, 0.3, "upper"), 1.0, settings, generator(4))
        for settings in (replace(SMALL, passes=2), replace(SMALL, passes=2, buffer=4))
    )
    assert [{**row, "seconds": 0} for row in one.history] == [{**row, "seconds": 0} for row in other.history]


def test_adjoints_of_a_buffer_are_solved_in_parts_of_a_batch(monkeypatch):
    sizes = []
    targets = adjoint_matching._targets

    def watched(base, trajectories, *more):
        sizes.append(trajectories.shape[1])
        return targets(base, trajectories, *more)

    monkeypatch.setattr(adjoint_matching, "_targets", watched)
    settings = replace(SMALL, updates=3, buffer=12, passes=1)
    whole = solve(small_flow(), RewardVariation(QUADRATIC), 1.0, settings, generator(0))
    assert sizes == [4, 4, 4]
    parts = solve(
        small_flow(), RewardVariation(QUADRATIC), 1.0, replace(settings, micro_batch=2), generator(0)
    )
    assert sizes[3:] == [2] * 6
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-12)


def test_with_a_buffer_and_parts_a_gaussian_is_tilted_to_the_closed_form():
    """To what Adjoint Matching converges to on this grid, with the protocol's bookkeeping all at once."""
    path, steps, weight = Linear(), 10, 1.3
    base = AffineFlow(MixtureFlow(path, GAUSSIAN), AffineTable(path, steps))
    settings = AdjointMatchingSettings(
        updates=600,
        batch=64,
        pool=256,
        buffer=256,
        passes=3,
        steps=steps,
        learning_rate=0.03,
        ramp=0.1,
        loss_steps=((0.6, 2), (1.0, 2)),
        moments=(0.9, 0.95),
        endpoint_perturbations=3,
        endpoint_deviation=0.1,
    )
    tuned = solve(base, RewardVariation(QUADRATIC), weight, settings, generator(5)).model
    mean, covariance = chain_distribution(tuned, steps)
    discrete = matched_distribution(base, QUADRATIC, weight, steps)
    assert relative_error(mean, discrete[0]) < 0.02
    assert relative_error(covariance, discrete[1]) < 0.02


def test_a_solve_that_stopped_amid_a_buffer_goes_on_as_if_it_had_not(tmp_path):
    settings = replace(
        SMALL, updates=18, buffer=12, passes=3, endpoint_perturbations=2, endpoint_deviation=0.1
    )
    tilt = Hinge(QUADRATIC, 0.2, 0.3, "upper")
    whole = solve(small_flow(), tilt, 1.0, settings, generator(7))

    def stop(row):
        if row["update"] == 13:
            raise KeyboardInterrupt

    slots = [Resumption(tmp_path, "work", seconds=0).slot("solve") for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        solve(small_flow(), tilt, 1.0, settings, generator(7), stop, slots[0])
    again = solve(small_flow(), tilt, 1.0, settings, generator(7), slot=slots[1])
    for one, other in zip(whole.history, again.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer": 6, "batch": 4}, "multiple of batch"),
        ({"buffer": 16, "batch": 4}, "at least buffer"),
        ({"active_batch": 4}, "below batch"),
        ({"endpoint_perturbations": 3}, "belong together"),
        ({"endpoint_deviation": 0.1}, "belong together"),
        ({"endpoint_percentile": 101.0}, "up to 100"),
        ({"endpoint_percentile": 85.0, "endpoint_gradient": "likelihood_ratio"}, "must be pathwise"),
        ({"moments": (0.9, 1.0)}, "moments"),
        ({"moments": (0.9,)}, "two numbers"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"annealing": "linear"}, "cosine or none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_a_tail_of_eight_and_a_body_of_twenty_four_are_unbiased():
    """The pool of 4,096 of which up to 8 tail and 24 body samples are kept, reweighted."""
    values = torch.randn(4096, generator=generator(0), dtype=torch.float64)
    active = values > 2.5
    draws = [stratified_draw(active, 32, generator(k), 8) for k in range(400)]
    assert all(int(active[draw.index].sum()) == 8 for draw in draws)
    hinge = (values - 2.5).clamp(min=0)
    means = torch.stack([(hinge[draw.index] * draw.weights).mean() for draw in draws])
    assert abs(float(means.mean() - hinge.mean())) < 4 * float(means.std()) / 20
    few = stratified_draw(torch.arange(4096) < 3, 32, generator(1), 8)
    assert int((few.index < 3).sum()) == 3
    assert len(few.index) == 32


# --- Gradients at the ends ----------------------------------------------------------------------


class Cubic(Quadratic):
    """``sum x^3``: smoothed by a Gaussian of deviation s its gradient is ``3 x^2 + 3 s^2``."""

    def value(self, x, context=None):
        return x.pow(3).flatten(1).sum(1)

    def gradient(self, x, context=None):
        return 3 * x.square()


def perturbed(reward, x, count, deviation, percentile=None, part=100):
    flow = MixtureFlow(Linear(), GAUSSIAN)
    noise = [torch.randn(x.shape, generator=generator(k), dtype=x.dtype) for k in range(count)]
    return Pathwise(flow, noise, deviation, percentile, part).gradient(RewardVariation(reward), x, None)


def test_perturbed_gradients_have_the_mean_of_the_smoothed_reward():
    x = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64)
    count, s = 4000, 0.5
    # Of a quadratic reward the mean is the gradient at the end itself; its spread is known too.
    error = perturbed(QUADRATIC, x, count, s) - QUADRATIC.gradient(x)
    curvature = torch.stack(
        [QUADRATIC.gradient(e[None])[0] - QUADRATIC.gradient(0 * e[None])[0] for e in torch.eye(2).double()]
    )
    deviation = s * curvature.norm(dim=0) / count**0.5
    assert float((error / deviation).abs().max()) < 4
    assert float((error / deviation).abs().max()) > 0.01
    cubic = perturbed(Cubic([0.0, 0.0]), x, count, s)
    expected = 3 * x.square() + 3 * s**2
    assert float((cubic - expected).abs().max()) < 4 * 6 * s * 1.5 / count**0.5
    assert float((cubic - 3 * x.square()).min()) > 0.5  # and not that of the reward itself


def test_parts_of_a_batch_have_the_gradients_of_the_whole():
    x = torch.randn(7, 2, generator=generator(0), dtype=torch.float64)
    for percentile in (None, 85.0):
        whole, parts = (perturbed(QUADRATIC, x, 4, 0.02, percentile, part) for part in (7, 3))
        torch.testing.assert_close(whole, parts, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("percentile", [1.0, 50.0, 85.0, 100.0])
def test_entries_are_cut_at_the_percentile_of_their_own_sample_as_numpy_has_it(percentile):
    gradient = torch.randn(3, 4, 5, 5, generator=generator(0)) * torch.tensor([1.0, 10.0, 0.0]).view(
        3, 1, 1, 1
    )
    found = cut(gradient, percentile)
    for ours, own in zip(found.numpy(), gradient.numpy(), strict=True):
        bound = np.percentile(np.abs(own), percentile)
        np.testing.assert_allclose(ours, np.clip(own, -bound, bound), rtol=1e-6)
    if percentile == 85.0:
        cut_off = (found != gradient).flatten(1).sum(1)
        assert cut_off.tolist() == [15, 15, 0]


def test_perturbations_repeat_themselves_and_leave_a_solve_without_them_as_it_is():
    plain, again, other = (
        solve(small_flow(), RewardVariation(QUADRATIC), 1.0, replace(SMALL, **changes), generator(0)).history
        for changes in (
            {},
            {"endpoint_percentile": 100.0},
            {"endpoint_perturbations": 2, "endpoint_deviation": 0.5},
        )
    )
    assert [row["loss"] for row in plain] == [row["loss"] for row in again]
    assert plain[0]["loss"] != other[0]["loss"]


# --- The optimiser ------------------------------------------------------------------------------


def test_without_annealing_the_rate_stays_after_twenty_updates_of_warm_up():
    rates = [annealed_rate(k, 1600, 3e-6, 0.0125, "none") for k in range(1600)]
    np.testing.assert_allclose(rates[:20], 3e-6 * np.arange(1, 21) / 20, rtol=1e-12)
    assert set(rates[20:]) == {3e-6}


def test_moments_and_weight_decay_reach_the_weights():
    losses = {
        str(changes): solve(
            small_flow(), RewardVariation(QUADRATIC), 1.0, replace(SMALL, **changes), generator(0)
        ).history[-1]["loss"]
        for changes in ({}, {"moments": (0.9, 0.95)}, {"weight_decay": 0.5}, {"annealing": "none"})
    }
    assert len(set(losses.values())) == 4
