"""Images by values of the reward: fits, and FDC by exponents, from the offline batch as their bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file as load_tensors

from by_hand import Driven
from flowtilt import thresholds
from flowtilt.metrics.tails import lower_tail_mean
from flowtilt.tilts import LEAST, Groups
from small_images import tiny, write_models

pytest.importorskip("diffusers", reason="the extra 'images' is not installed")
pytest.importorskip("open_clip", reason="the extra 'images' is not installed")

DRAWN, MASS = 60, 0.5
FIT = {"bank": DRAWN, "minimum_ess": 2, "share": 0.5, "learning_rate": 0.003}
ANNEALED = {**FIT, "kind": "annealed_fitting", "stages": 2}
FDC = {"kind": "fdc", "by": "exponents", "iterations": 2, "mass": MASS}
METHODS: dict[str, Any] = {
    "fdc": {**FDC, "solver": {"minimum_ess": 2, "share": 0.2}},
    "fdc_weighted": {**FDC, "solver": {**FIT, "kind": "weighted_fitting", "share": 0.2}},
    "fdc_staged": {**FDC, "solver": ANNEALED},
    "am_fit": {"kind": "am", "solver": {**FIT, "kind": "weighted_fitting"}},
    "am_staged": {"kind": "am", "solver": ANNEALED},
    "tfft_staged": {"kind": "tfft", "mass": MASS, "solver": ANNEALED},
    "tfft_budget": {"kind": "tfft", "mass": MASS, "solver": {**ANNEALED, "kl": 0.1, "stage_kl": 0.05}},
}


class Bank(Driven):
    """A results folder with the offline batch. The KL weight is the rewards' spread: tilts of about a nat."""

    def __init__(self, path: Path, models: tuple[Path, Path]) -> None:
        self.model = {
            part: {"path": str(p)} for part, p in zip(("pipeline", "alignment"), models, strict=True)
        }
        super().__init__(path, self.with_alpha(1.0))
        assert self.run("model") == self.run("offline") == 0
        with np.load(self.shared("seed0/offline.npz")) as arrays:
            self.rewards, self.prompts = arrays["reward"].astype(float), arrays["context"]
            self.states = arrays["x"]
        self.alpha = float(self.rewards.std())
        self.use(self.with_alpha(self.alpha))
        self.groups = Groups.of(self.prompts, np.arange(DRAWN), LEAST)

    def with_alpha(self, alpha: float) -> Any:
        changes = {"methods": METHODS, "objective": {"alpha": alpha}, "offline": {"samples": DRAWN}}
        return tiny("text_to_image_left_tail", retrain=False, model=self.model, **changes)

    def history(self, method: str) -> pd.DataFrame:
        """Of a fine-tuning that is made the first time it is asked for."""
        file = self.file(method, "history.csv")
        if not file.is_file():
            if self.experiment.methods[method].kind == "tfft":
                assert self.run("threshold", method) == 0
            assert self.run("finetune", method) == 0
        return pd.read_csv(file)

    def tilted(self, exponents: np.ndarray) -> np.ndarray:
        """Probabilities within each prompt, all equally likely."""
        p = np.exp(exponents - exponents.max())
        return np.array([p[i] / p[self.prompts == prompt].sum() / 3 for i, prompt in enumerate(self.prompts)])


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    models = write_models(tmp_path_factory.mktemp("models"))
    return Bank(tmp_path_factory.mktemp("bank"), models)


def test_the_batch_has_its_latents_and_every_prompt_as_often(bank: Bank) -> None:
    assert bank.states.shape == (DRAWN, 4, 8, 8)
    assert np.bincount(bank.prompts).tolist() == [20, 20, 20]
    assert len(bank.groups) == 3


@pytest.mark.parametrize("method", ["fdc", "fdc_weighted"])
def test_the_searched_step_of_fdc_raises_the_worst_share(bank: Bank, method: str) -> None:
    """At least as much as any step by the hinge at the quantile, by brute force over its weight; and no more
    than the optimum, which is that of the dual though a lower tail is not concave."""
    first = bank.history(method).iloc[0]
    p = np.full(DRAWN, 1 / DRAWN)
    before = lower_tail_mean(bank.rewards, MASS)
    assert first["utility"] == pytest.approx(before, rel=1e-6)
    at = thresholds.threshold(bank.rewards, bank.alpha, MASS, "lower", contexts=bank.prompts)
    most = thresholds.dual_objective(at, bank.rewards, bank.alpha, MASS, "lower", contexts=bank.prompts)
    hinge = np.minimum(bank.rewards - np.sort(bank.rewards)[DRAWN // 2 - 1], 0) / MASS
    gains = []
    for eta in bank.alpha * np.geomspace(1, 1e3, 300):
        q = bank.tilted(hinge / eta)
        if 1 / float((q * q / p).sum()) >= 0.2:
            gains.append(lower_tail_mean(bank.rewards, MASS, q) - before - bank.alpha * (q @ np.log(q / p)))
    assert 0 < max(gains) <= first["gain"] * (1 + 1e-3)
    assert first["gain"] <= (most - before) * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_solver_starts_from_the_batch(bank: Bank, method: str) -> None:
    history = bank.history(method)
    own = load_tensors(bank.file(method, "model.safetensors"))
    assert all(bool(tensor.isfinite().all()) for tensor in own.values())
    if method != "fdc":
        # Guided states go through the network twice; of a bank none does, since there is the batch.
        per_update = bank.experiment.solver.batch * 4 * 2
        assert history["network_passes"].iloc[0] <= per_update


def test_fits_promise_what_the_weights_of_the_batch_say(bank: Bank) -> None:
    p, exponents = np.full(DRAWN, 1 / DRAWN), bank.rewards / bank.alpha
    q = bank.tilted(exponents)
    one = bank.history("am_fit").iloc[0]
    assert one["kl"] == pytest.approx(float(q @ np.log(q / p)), rel=1e-4)
    assert one["effective_sample_size"] == pytest.approx(1 / float((q * q).sum()), rel=1e-4)
    first = bank.history("am_staged").iloc[0]
    q = bank.tilted(first["step"] * exponents)
    assert first["mean_before"] == pytest.approx(bank.rewards.mean(), rel=1e-5)
    assert first["mean_promised"] == pytest.approx(float(q @ bank.rewards), rel=1e-5)
    assert first["stage_kl"] == pytest.approx(float(q @ np.log(q / p)), rel=1e-4)


@pytest.mark.parametrize("method", ["am_staged", "tfft_staged"])
def test_annealed_fitting_says_what_each_stage_asked_and_reached(bank: Bank, method: str) -> None:
    history = bank.history(method)
    stages = history.groupby("stage").first()
    assert len(history) == len(stages) * bank.experiment.updates_of(method)
    assert stages["strength"].is_monotonic_increasing
    assert (stages["effective_share"] >= 0.5 - 1e-9).all()
    assert (stages["stage_kl"] > 0).all()
    assert stages["kl"].iloc[0] == pytest.approx(stages["stage_kl"].iloc[0], rel=1e-9)
    assert (stages["mean_promised"] > stages["mean_before"]).all()
    if method == "tfft_staged":
        own = thresholds.threshold(bank.rewards, bank.alpha, MASS, "lower", contexts=bank.prompts)
        assert stages["parameter"].iloc[0] == pytest.approx(own, rel=1e-5)


def test_banks_of_images_are_drawn_as_images_are(bank: Bank) -> None:
    """By the memoryless process in the solver's steps, under the guidance of sampling."""
    from flowtilt.pipeline.solvers import fitting_settings
    from flowtilt.pipeline.stages import workbench_of

    bench = workbench_of(bank.job("finetune", "am_fit"))
    settings = fitting_settings(bank.experiment.solver_of("am_fit"), 2, bench.sampler)
    assert (settings.sampler, settings.steps) == ("sde", bank.experiment.solver.steps)
    assert bench.offline is not None
    assert bench.offline.context.guidance == bank.experiment.guidance.sampling == 3.0


def test_a_fit_of_adapters_leaves_the_denoiser_as_it_is(bank: Bank, tmp_path: Path) -> None:
    changes = {"methods": METHODS, "objective": {"alpha": bank.alpha}, "offline": {"samples": DRAWN}}
    adapter = {"rank": 2, "alpha": 2.0}
    name = "text_to_image_left_tail"
    own = Driven(tmp_path, tiny(name, retrain=False, model=bank.model, adapter=adapter, **changes))
    assert own.run("model") == own.run("offline") == own.run("finetune", "am_fit") == 0
    tensors = load_tensors(own.file("am_fit", "model.safetensors"))
    assert all("lora_" in name for name in tensors)
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)


def test_a_budget_has_a_point_of_the_frontier_for_each_stage(bank: Bank) -> None:
    """The first is what the batch itself is worth; a lower tail is thinned within each prompt."""
    stages = bank.history("tfft_budget").groupby("stage").first()
    frontier = pd.read_csv(bank.file("tfft_budget", "frontier.csv"))
    assert frontier["kl"].tolist() == [0, *stages["kl"]]
    assert stages["kl"].iloc[0] == pytest.approx(0.05, abs=0.005)
    assert frontier["mean_reward"].iloc[0] == pytest.approx(bank.rewards.mean(), rel=1e-6)
    for mass in (0.2, 0.1):
        worst = lower_tail_mean(bank.rewards, mass)
        assert frontier[f"left_cvar_{mass:g}"].iloc[0] == pytest.approx(worst, rel=1e-6)
