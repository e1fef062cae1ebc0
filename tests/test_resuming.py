import json
from dataclasses import replace

import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, generator
from flowtilt.checkpoints import CheckpointError
from flowtilt.control import adjoint_matching, annealed_fitting, weighted_fitting
from flowtilt.fdc import MirrorAscent, ascend
from flowtilt.functionals.base import Objective
from flowtilt.functionals.divergences import KL
from flowtilt.functionals.utilities import ExpectedReward, RewardVariation
from flowtilt.pretraining import PretrainingSettings, Watch, fit_flow
from flowtilt.resuming import SECONDS, Resumption
from flowtilt.rewards import Reward

DATA = Mixture.of(
    [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]]]
)
START = Mixture.of([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.0]], DATA.covariances)
SETTINGS = PretrainingSettings(
    updates=30, batch=32, learning_rate=0.03, warmup=0.1, average=0.9, gradient_clip=1
)


class Stopped(Exception):
    pass


def stop_after(*updates):
    """A progress that stops the training the first time each of some updates is done."""
    left = list(updates)

    def progress(row):
        if left and row["update"] == left[0]:
            left.pop(0)
            raise Stopped

    return progress


def states(folder, of="a training", seconds=0.0):
    return Resumption(folder, of, seconds)


def fit(settings=SETTINGS, seed=0, progress=None, slot=None, source=DATA.sample):
    model = MixtureFlow(PATHS["linear"], START, trainable=True)
    return model, fit_flow(model, source, settings, generator(seed), progress, slot)


def but_for_seconds(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def same_weights(first, second):
    return all(torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items())


def test_a_stopped_training_goes_on_exactly_where_it_was(tmp_path):
    """Stopped twice; what came after the last state is done again, from the same random numbers."""
    whole, history = fit()
    slot = states(tmp_path).slot("pretraining")
    for update, seed in ((7, 0), (19, 50)):
        with pytest.raises(Stopped):
            fit(progress=stop_after(update), seed=seed, slot=slot)
    resumed, again = fit(seed=99, slot=slot)
    assert but_for_seconds(again) == but_for_seconds(history)
    assert same_weights(whole, resumed)
    seconds = [row["seconds"] for row in again]
    assert seconds == sorted(seconds)


def test_a_finished_training_is_not_done_again(tmp_path):
    slot = states(tmp_path).slot("pretraining")
    first, history = fit(slot=slot)
    second, same = fit(seed=5, slot=slot, progress=stop_after(0))
    assert same == history
    assert torch.equal(first.means, second.means)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-9], lambda b: b""])
def test_a_damaged_state_is_named_with_the_fix(tmp_path, damage):
    slot = states(tmp_path).slot("pretraining")
    fit(slot=slot)
    slot.path.write_bytes(damage(slot.path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"pretraining\.safetensors: not a whole training state .*dele"):
        fit(slot=slot)


def test_states_of_other_settings_inputs_or_networks_are_refused(tmp_path):
    slot = states(tmp_path).slot("pretraining")
    fit(slot=slot)
    with pytest.raises(CheckpointError, match="other settings or inputs"):
        fit(replace(SETTINGS, batch=16), slot=slot)
    with pytest.raises(CheckpointError, match="other settings or inputs"):
        fit(slot=states(tmp_path, of="another one").slot("pretraining"))
    distribution = Mixture.of([0.2, 0.3, 0.5], torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    larger = MixtureFlow(PATHS["linear"], distribution, trainable=True)
    with pytest.raises(CheckpointError, match="another network"):
        fit_flow(larger, DATA.sample, SETTINGS, generator(0), slot=slot)


def test_a_short_training_leaves_no_state(tmp_path, monkeypatch):
    """What is not due is not written; the variable says when it is."""
    solver, start, tilt = (
        SOLVERS["adjoint_matching"],
        MixtureFlow(PATHS["linear"], START, trainable=True),
        PULL,
    )
    folder = tmp_path / "state"
    for seconds, written in (("3600", False), ("0", True)):
        monkeypatch.setenv(SECONDS, seconds)
        solver(start, tilt, generator(0), None, Resumption(folder, "a").slot("solve"))
        assert folder.exists() == written
    Resumption(folder, "a").remove()
    assert not folder.exists()


class Pull(Reward):
    """Rises with the first coordinate, and levels off."""

    def value(self, x, context=None):
        return torch.tanh(x[:, 0])


PULL = RewardVariation(Pull())
AM = adjoint_matching.AdjointMatchingSettings(updates=12, batch=8, pool=8, steps=5, learning_rate=0.01)
WF = weighted_fitting.WeightedFittingSettings(bank=400, steps=4, updates=12, batch=8, warning_ess=0)
ANNEALED = annealed_fitting.AnnealedFittingSettings(replace(WF, minimum_ess=0.0), 0.5, 3)
SOLVERS = {
    "adjoint_matching": lambda base, tilt, random, progress, slot: adjoint_matching.solve(
        base, tilt, 0.7, AM, random, progress, slot
    ),
    "weighted_fitting": lambda base, tilt, random, progress, slot: weighted_fitting.solve(
        base, tilt, 0.7, WF, random, progress, slot
    ),
    "annealed_fitting": lambda base, tilt, random, progress, slot: annealed_fitting.solve(
        base, tilt, 0.1, ANNEALED, random, progress, slot
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stopped_solve_goes_on_exactly_where_it_was(name, tmp_path):
    base, solver = MixtureFlow(PATHS["linear"], START, trainable=True), SOLVERS[name]
    whole = solver(base, PULL, generator(3), None, None)
    slot, progress = states(tmp_path).slot("solve"), stop_after(4, 5, 9)
    for _ in range(3):
        with pytest.raises(Stopped):
            solver(base, PULL, generator(3), progress, slot)
    resumed = solver(base, PULL, generator(3), progress, slot)
    assert same_weights(whole.model, resumed.model)
    assert but_for_seconds(resumed.history) == but_for_seconds(whole.history)
    assert resumed.diagnostics == whole.diagnostics
    # In a CSV file, 3 and 3.0 differ.
    assert json.dumps(but_for_seconds(resumed.history)) == json.dumps(but_for_seconds(whole.history))
    assert not same_weights(whole.model, base)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_stopped_ascent_goes_on_exactly_where_it_was(seconds, tmp_path):
    """Stopped within iterations and at their ends; with states at every update, and with none."""
    start = MixtureFlow(PATHS["linear"], START, trainable=True)
    objective = Objective(ExpectedReward(Pull()), KL(start, score_time=0.9), 0.3)
    mirror = MirrorAscent(step_weight=2.0, distribution_samples=32, distribution_steps=5)

    def climb(progress=None, resumption=None):
        def solver(base, tilt, kl_weight, random, slot=None):
            return adjoint_matching.solve(base, tilt, kl_weight, AM, random, progress, slot)

        return ascend(start, objective, range(1, 4), mirror, solver, generator, resumption)

    whole = climb()
    done = []

    def progress(row):
        done.append(row["update"])
        if len(done) in (3, 12, 20, 30):
            raise Stopped

    resumption = states(tmp_path, seconds=seconds)
    for _ in range(4):
        with pytest.raises(Stopped):
            climb(progress, resumption)
    resumed = climb(progress, resumption)
    assert same_weights(whole.model, resumed.model)
    assert but_for_seconds(resumed.history) == but_for_seconds(whole.history)
    # With states only the update that was stopped at is done again.
    assert len(done) == (36 + 4 if seconds == 0 else 30 + 36)


def test_the_result_is_the_average_of_the_weights_after_each_update():
    """By hand, from the weights of trainings of every length without an average."""
    updates, decay = 6, 0.3
    steady = PretrainingSettings(updates=updates, batch=16, learning_rate=0.03)
    seen = []

    class Recorder(MixtureFlow):
        def matching_loss(self, x1, x0, t, context=None):
            seen.append(self.means.detach().clone())
            return super().matching_loss(x1, x0, t, context)

    last = Recorder(PATHS["linear"], START, trainable=True)
    fit_flow(last, DATA.sample, steady, generator(0))
    mean = seen[0]
    for n, weights in enumerate([*seen[1:], last.means], start=1):
        now = min(decay, n / (n + 10))
        mean = now * mean + (1 - now) * weights
    averaged, _ = fit(replace(steady, average=decay))
    torch.testing.assert_close(averaged.means, mean)
    assert not torch.equal(averaged.means, last.means)


def test_a_warm_up_begins_with_small_steps():
    steady = PretrainingSettings(updates=20, batch=16, learning_rate=0.1)
    moved = {}
    for name, settings in {"steady": steady, "warm": replace(steady, warmup=0.5)}.items():
        model = MixtureFlow(PATHS["linear"], START, trainable=True)
        with pytest.raises(Stopped):
            fit_flow(model, DATA.sample, settings, generator(0), stop_after(0))
        moved[name] = float((model.means.detach() - START.means).abs().max())
    # Adam's first step is the learning rate in each entry: 0.1, and a tenth of it.
    assert moved["steady"] == pytest.approx(0.1, rel=1e-4)
    assert moved["warm"] == pytest.approx(0.01, rel=1e-4)


def test_data_with_a_context_pass_it_to_noise_and_loss():
    class Conditional(MixtureFlow):
        def noise_like(self, x, generator, context=None):
            assert context == "the context"
            return super().noise_like(x, generator, context)

        def matching_loss(self, x1, x0, t, context=None):
            assert context == "the context"
            return super().matching_loss(x1, x0, t)

    with_context = Conditional(PATHS["linear"], START, trainable=True)
    fit_flow(with_context, lambda n, g: (DATA.sample(n, g), "the context"), SETTINGS, generator(0))
    without, _ = fit()
    assert torch.equal(with_context.means, without.means)


def test_watching_shows_the_averages_and_changes_nothing():
    seen = {}

    def look(updates, model):
        seen[updates] = model.means.detach().clone()

    plain, history = fit()
    watched = MixtureFlow(PATHS["linear"], START, trainable=True)
    again = fit_flow(watched, DATA.sample, SETTINGS, generator(0), watch=Watch(15, look))
    assert but_for_seconds(again) == but_for_seconds(history)
    assert torch.equal(watched.means, plain.means)
    assert list(seen) == [15, 30]
    assert torch.equal(seen[30], plain.means)  # what the training ends with
    assert not torch.equal(seen[15], seen[30])
