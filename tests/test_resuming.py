from dataclasses import replace

import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, generator
from flowtilt.checkpoints import CheckpointError
from flowtilt.pretraining import PretrainingSettings, Resumption, Watch, fit_flow

DATA = Mixture.of(
    [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]]]
)
START = Mixture.of([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.0]], DATA.covariances)
SETTINGS = PretrainingSettings(
    updates=30, batch=32, learning_rate=0.03, warmup=0.1, average=0.9, gradient_clip=1
)


class Stopped(Exception):
    pass


def stop_after(update):
    def progress(row):
        if row["update"] == update:
            raise Stopped

    return progress


def fit(settings=SETTINGS, seed=0, progress=None, resumption=None, source=DATA.sample):
    model = MixtureFlow(PATHS["linear"], START, trainable=True)
    return model, fit_flow(model, source, settings, generator(seed), progress, resumption)


def losses(history):
    return [(row["update"], row["loss"]) for row in history]


def test_a_stopped_training_goes_on_exactly_where_it_was(tmp_path):
    """Stopped twice; what came after the last state is done again, from the same random numbers."""
    whole, history = fit()
    resumption = Resumption(tmp_path / "state.safetensors", seconds=0)
    for update, seed in ((7, 0), (19, 50)):
        with pytest.raises(Stopped):
            fit(progress=stop_after(update), seed=seed, resumption=resumption)
    resumed, again = fit(seed=99, resumption=resumption)
    assert losses(again) == losses(history)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    seconds = [row["seconds"] for row in again]
    assert seconds == sorted(seconds)


def test_a_finished_training_is_not_done_again(tmp_path):
    resumption = Resumption(tmp_path / "state.safetensors")
    first, history = fit(resumption=resumption)
    second, same = fit(seed=5, resumption=resumption, progress=stop_after(0))
    assert same == history
    assert torch.equal(first.means, second.means)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-9], lambda b: b""])
def test_a_damaged_state_is_named_with_the_fix(tmp_path, damage):
    path = tmp_path / "state.safetensors"
    fit(resumption=Resumption(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.safetensors: not a whole training state .*delete it"):
        fit(resumption=Resumption(path))


def test_states_of_other_settings_or_networks_are_refused(tmp_path):
    resumption = Resumption(tmp_path / "state.safetensors")
    fit(resumption=resumption)
    with pytest.raises(CheckpointError, match="other settings"):
        fit(replace(SETTINGS, batch=16), resumption=resumption)
    law = Mixture.of([0.2, 0.3, 0.5], torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
    larger = MixtureFlow(PATHS["linear"], law, trainable=True)
    with pytest.raises(CheckpointError, match="another network"):
        fit_flow(larger, DATA.sample, SETTINGS, generator(0), resumption=resumption)


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
    assert losses(again) == losses(history)
    assert torch.equal(watched.means, plain.means)
    assert list(seen) == [15, 30]
    assert torch.equal(seen[30], plain.means)  # what the training ends with
    assert not torch.equal(seen[15], seen[30])
