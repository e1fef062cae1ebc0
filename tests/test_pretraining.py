from typing import ClassVar

import pytest
import torch

from closed_forms import PATHS, Mixture, MixtureFlow, generator, tensor
from flowtilt.control.base import TrainingDiverged
from flowtilt.model import FlowModel
from flowtilt.pretraining import PretrainingSettings, fit_flow

DATA = Mixture.of(
    [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.3]]]
)
START = Mixture.of([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.0]], DATA.covariances)
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def fit(path, seed=0, progress=None, **changes):
    model = MixtureFlow(path, START, trainable=True)
    choice = PretrainingSettings(**({"updates": 250, "batch": 256, "learning_rate": 0.03} | changes))
    return model, fit_flow(model, DATA.sample, choice, generator(seed), progress)


@paths
def test_flow_matching_finds_the_data_within_a_family_that_contains_it(path):
    """The regression's minimum is the data's own velocity, so weights and means must come back."""
    # The variance-preserving path's velocity targets diverge like (1 - t)^-1/2 at the data.
    model, history = fit(path, margin=0.02)
    # Means and weights of 64,000 samples are known to 0.005; the last updates average over a part of them.
    torch.testing.assert_close(model.means, DATA.means, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.softmax(model.logits, 0), DATA.weights, rtol=0, atol=0.03)
    assert [row["update"] for row in history] == list(range(250))
    losses = [row["loss"] for row in history]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert not any(p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_model_and_progress_sees_every_update():
    seen = []
    first, history = fit(PATHS["linear"], progress=seen.append, updates=5)
    second, _ = fit(PATHS["linear"], updates=5)
    other, _ = fit(PATHS["linear"], seed=1, updates=5)
    assert torch.equal(first.means, second.means)
    assert not torch.equal(first.means, other.means)
    assert seen == history


def test_times_keep_their_margin_and_cover_all_of_the_rest():
    class Recorder(MixtureFlow):
        times: ClassVar[list] = []

        def matching_loss(self, x1, x0, t, context=None):
            self.times.append(t)
            return super().matching_loss(x1, x0, t, context)

    model = Recorder(PATHS["linear"], START, trainable=True)
    choice = PretrainingSettings(updates=1, batch=100, margin=0.1)
    fit_flow(model, DATA.sample, choice, generator(0))
    times = model.times[0].sort().values
    edges = 0.1 + 0.8 * torch.arange(101) / 100
    assert bool((times >= edges[:-1] - 1e-6).all())
    assert bool((times <= edges[1:] + 1e-6).all())


def test_a_loss_that_stops_being_finite_stops_the_run_and_names_the_update():
    class Failing(FlowModel):
        calls = 0

        def __init__(self):
            super().__init__()
            self.path = PATHS["linear"]
            self.weight = torch.nn.Parameter(torch.zeros(()).double())

        def prior(self, count, generator, context=None):
            return torch.randn(count, 2, generator=generator, dtype=torch.float64)

        def velocity(self, x, t, context=None):
            self.calls += 1
            return self.weight * x * tensor(float("nan") if self.calls == 4 else 1.0)

    with pytest.raises(TrainingDiverged, match="at update 3 of 10"):
        fit_flow(Failing(), DATA.sample, PretrainingSettings(updates=10, batch=8), generator(0))


def test_data_with_a_context_bring_it_to_the_loss_and_to_the_noise():
    class Recorder(MixtureFlow):
        seen: ClassVar[list] = []

        def noise_like(self, x, generator, context=None):
            self.seen.append(context)
            return super().noise_like(x, generator)

        def matching_loss(self, x1, x0, t, context=None):
            self.seen.append(context)
            return super().matching_loss(x1, x0, t)

    def source(count, generator):
        return DATA.sample(count, generator), {"masks": torch.arange(count)}

    plain, kept = (MixtureFlow(PATHS["linear"], START, trainable=True) for _ in range(2))
    choice = PretrainingSettings(updates=2, batch=8, learning_rate=0.03)
    model = Recorder(PATHS["linear"], START, trainable=True)
    fit_flow(model, source, choice, generator(0))
    assert [context["masks"].tolist() for context in model.seen] == [list(range(8))] * 4
    fit_flow(plain, DATA.sample, choice, generator(0))
    assert torch.equal(plain.means, model.means)
    assert not torch.equal(plain.means, kept.means)


def test_times_can_be_drawn_with_a_normal_logit():
    class Recorder(MixtureFlow):
        times: ClassVar[list] = []

        def matching_loss(self, x1, x0, t, context=None):
            self.times.append(t)
            return super().matching_loss(x1, x0, t, context)

    model = Recorder(PATHS["linear"], START, trainable=True)
    count = 2000
    fit_flow(
        model, DATA.sample, PretrainingSettings(1, batch=count, margin=1e-4, times=(1.0, 1.2)), generator(0)
    )
    u = torch.special.ndtr((torch.logit(model.times[0].double()) - 1.0) / 1.2)
    # Stratified: one in each of equal slices, which the margin moves by 1e-4 at most.
    excess = u - torch.arange(count) / count
    assert float(excess.min()) > -1e-3
    assert float(excess.max()) < 1 / count + 1e-3
