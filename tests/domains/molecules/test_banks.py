"""The offline batch of molecules as the bank of fits and of FDC by exponents, against solutions by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file as load_tensors
from scipy.special import logsumexp

from by_hand import Driven
from flowtilt import thresholds
from flowtilt.domains.molecules.build import build_model
from flowtilt.metrics.tails import quantile, upper_tail_mean
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Run, job_of
from flowtilt.pipeline.report.costs import takes_batch
from flowtilt.tilts import LEAST, Groups
from small_molecules import tiny, write_checkpoint

pytest.importorskip("tblite", reason="the extra 'molecules' is not installed")
pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

DRAWN, ALPHA, MASS = 240, 4.0, 0.5
FIT = {"bank": DRAWN, "bank_steps": 2, "minimum_ess": 5, "share": 0.4, "learning_rate": 0.003}
ANNEALED = {**FIT, "kind": "annealed_fitting", "stages": 3, "share": 0.8}
BUDGET = {"kl": 0.04, "stage_kl": 0.02, "share": 0.5}
FDC = {"kind": "fdc", "by": "exponents", "step": None, "iterations": 2, "mass": MASS, "updates": 2}
METHODS: dict[str, Any] = {
    "fdc": {**FDC, "solver": {"pool": 8, "minimum_ess": 5, "share": 0.1}},
    "fdc_weighted": {**FDC, "solver": {**FIT, "kind": "weighted_fitting", "share": 0.1}},
    "fdc_staged": {**FDC, "solver": ANNEALED},
    "am_weighted": {"kind": "am", "solver": {**FIT, "kind": "weighted_fitting"}},
    "am_staged": {"kind": "am", "solver": ANNEALED},
    "tfft_annealed": {"kind": "tfft", "mass": MASS, "solver": ANNEALED},
    "am_budget": {"kind": "am", "solver": {**ANNEALED, **BUDGET}},
    "tfft_budget": {"kind": "tfft", "mass": MASS, "solver": {**ANNEALED, **BUDGET}},
    "fdc_budget": {**FDC, "solver": {**FIT, **BUDGET, "kind": "weighted_fitting"}},
    "fdc_bounded": {
        **FDC,
        "barrier": {"bound": 1.0, "strength": 2.0},
        "solver": {**FIT, **BUDGET, "kind": "weighted_fitting"},
    },
}


class Bank(Driven):
    """A results folder with the offline batch, and what is in it."""

    def __init__(self, path: Path) -> None:
        checkpoint = write_checkpoint(path / "resources" / "tiny.safetensors")
        changes = {"methods": METHODS, "objective": {"alpha": ALPHA}, "offline": {"samples": DRAWN}}
        super().__init__(path, tiny(checkpoint, **changes), workers=1)
        assert self.run("pretrain") == self.run("offline") == 0
        with np.load(self.shared("seed0/offline.npz")) as arrays:
            self.states, every, self.atoms = arrays["x"], arrays["reward"].astype(float), arrays["context"]
        self.kept = np.flatnonzero(~np.isnan(every))
        self.rewards = every[self.kept]
        self.groups = Groups.of(self.atoms, self.kept, LEAST)

    def history(self, method: str) -> pd.DataFrame:
        """Of a fine-tuning that is made the first time it is asked for."""
        file = self.file(method, "history.csv")
        if not file.is_file():
            if self.experiment.methods[method].kind == "tfft":
                assert self.run("threshold", method) == 0
            assert self.run("finetune", method) == 0
        return pd.read_csv(file)

    def tilted(self, exponents: np.ndarray) -> np.ndarray:
        """Probabilities within each number of atoms, of its own share of what was drawn."""
        p = np.zeros(len(exponents))
        for atoms in np.unique(self.atoms):
            own = self.atoms[self.kept] == atoms
            p[own] = (self.atoms == atoms).mean() * np.exp(exponents[own] - logsumexp(exponents[own]))
        return p

    @property
    def untilted(self) -> np.ndarray:
        return self.tilted(np.zeros(len(self.rewards)))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return Bank(tmp_path_factory.mktemp("bank"))


def objective(bank: Bank, exponents: np.ndarray) -> float:
    """``SQ - alpha KL`` of the batch under a tilt."""
    p, q = bank.untilted, bank.tilted(exponents)
    return upper_tail_mean(bank.rewards, MASS, q) - ALPHA * float(q @ np.log(q / p))


def test_the_batch_has_enough_of_each_context_and_its_energies(bank: Bank) -> None:
    assert len(bank.groups) == len(np.unique(bank.atoms)) == 3
    assert bank.groups.pooled == 0
    assert len(bank.rewards) < DRAWN
    model = build_model(bank.experiment.flow, torch.tensor([0.0, 0, 0, 1, 1, 1]), 0)
    assert bank.states.shape[0] == DRAWN
    mask = model.context_of(torch.from_numpy(bank.atoms))
    np.testing.assert_array_equal(model.context_labels(mask).numpy(), bank.atoms)
    assert not bank.states[~mask.numpy()].any()


@pytest.mark.parametrize("method", ["fdc", "fdc_weighted"])
def test_the_searched_step_of_fdc_is_the_optimum_of_its_dual(bank: Bank, method: str) -> None:
    """An upper tail is concave: on the batch, one step of trials gets within a hundredth of the optimum."""
    first = bank.history(method).iloc[0]
    groups, weights = bank.groups.labels, bank.groups.probabilities
    before = upper_tail_mean(bank.rewards, MASS, weights)
    at = thresholds.threshold(bank.rewards, ALPHA, MASS, "upper", weights, groups)
    best = thresholds.dual_objective(at, bank.rewards, ALPHA, MASS, "upper", weights, groups)
    assert first["utility"] == pytest.approx(before, rel=1e-9)
    assert 0.99 * (best - before) < first["gain"] <= (best - before) * (1 + 1e-9)
    assert first["gain"] == pytest.approx(first["utility_promised"] - before - ALPHA * first["kl"], rel=1e-6)
    if method == "fdc_weighted":  # of the batch; Adjoint Matching counts its own trajectories
        assert first["failed_share"] == pytest.approx(1 - len(bank.rewards) / DRAWN)
    # Over all sizes together a step would promise mass that no model of given sizes can move.
    alone = thresholds.threshold(bank.rewards, ALPHA, MASS, "upper", weights)
    pooled = thresholds.dual_objective(alone, bank.rewards, ALPHA, MASS, "upper", weights)
    assert pooled > best * (1 + 1e-6)


def test_a_step_of_one_trial_is_no_better_than_what_was_found(bank: Bank) -> None:
    """By brute force over its KL weight: the hinge at the quantile, which a kink may make useless."""
    found = bank.history("fdc")["gain"].iloc[0]
    order = np.argsort(bank.rewards)
    above = np.cumsum(bank.untilted[order][::-1])[::-1]
    quantile = bank.rewards[order][above >= MASS][-1]
    hinge = np.maximum(bank.rewards - quantile, 0) / MASS
    start = objective(bank, np.zeros_like(hinge))
    gains = [objective(bank, hinge / (ALPHA * scale)) - start for scale in np.geomspace(1, 1e3, 200)]
    assert max(gains) <= found * (1 + 1e-3)


@pytest.mark.parametrize("method", ["fdc", "fdc_weighted", "fdc_staged"])
def test_fdc_goes_its_steps_by_every_solver(bank: Bank, method: str) -> None:
    history = bank.history(method)
    steps = history.groupby("iteration").first()
    assert 1 <= len(steps) <= 2
    assert (steps["gain"] > 0).all()
    assert (steps["effective_share"] >= bank.experiment.solver_of(method).share - 1e-9).all()
    before, after = (load_tensors(f) for f in (bank.shared("model.safetensors"), bank.file(method, MODEL)))
    assert any(not before[name].equal(after[name]) for name in before)


MODEL = "model.safetensors"


@pytest.mark.parametrize(
    "method", ["fdc_weighted", "fdc_staged", "am_weighted", "am_staged", "tfft_annealed"]
)
def test_no_energy_of_the_batch_is_computed_again(bank: Bank, method: str) -> None:
    """Nor is the batch drawn: what goes through the network are the updates' own samples."""
    history = bank.history(method)
    assert history["evaluated"].iloc[0] == 0
    assert history["network_passes"].iloc[0] <= 6 * bank.experiment.solver.batch


def test_fits_promise_what_the_weights_of_the_batch_say(bank: Bank) -> None:
    """Of am's reward within each number of atoms; its first stage, and the single fit."""
    exponents = bank.rewards / ALPHA
    one = bank.history("am_weighted").iloc[0]
    p, q = bank.untilted, bank.tilted(exponents)
    assert one["kl"] == pytest.approx(float(q @ np.log(q / p)), rel=1e-5)
    assert one["effective_sample_size"] == pytest.approx(1 / float(q @ q), rel=1e-5)
    first = bank.history("am_staged").iloc[0]
    q = bank.tilted(first["step"] * exponents)
    assert first["mean_before"] == pytest.approx(float(p @ bank.rewards), rel=1e-6)
    assert first["mean_promised"] == pytest.approx(float(q @ bank.rewards), rel=1e-6)
    assert first["stage_kl"] == pytest.approx(float(q @ np.log(q / p)), rel=1e-5)
    own = bank.groups.labels
    shares = [1 / ((q[own == g] ** 2 / p[own == g]).sum() / p[own == g].sum()) for g in range(3)]
    scaled = [share * (q[own == g].sum() / p[own == g].sum()) ** 2 for g, share in enumerate(shares)]
    assert first["least_effective_share"] == pytest.approx(min(scaled), rel=1e-5)


@pytest.mark.parametrize("method", ["am_staged", "tfft_annealed"])
def test_annealed_fitting_says_what_each_stage_asked_and_reached(bank: Bank, method: str) -> None:
    history = bank.history(method)
    stages = history.groupby("stage").first()
    assert 1 < len(stages) <= 3
    assert len(history) == len(stages) * bank.experiment.updates_of(method)
    assert stages["strength"].is_monotonic_increasing
    assert (stages["effective_share"] >= 0.8 - 1e-9).all()
    assert (stages["least_effective_share"] <= stages["effective_share"] + 1e-9).all()
    assert (stages["stage_kl"] > 0).all()
    assert stages["kl"].iloc[0] == pytest.approx(stages["stage_kl"].iloc[0], rel=1e-9)
    # What a stage promises, and on a fresh bank of the next what it has reached.
    assert (stages["mean_promised"] > stages["mean_before"]).all()
    fresh = history[history["update"] == 0]["evaluated"].tolist()
    assert fresh == [0] + [DRAWN] * (len(stages) - 1)
    if method == "tfft_annealed":
        own = thresholds.threshold(
            bank.rewards, ALPHA, MASS, "upper", bank.groups.probabilities, bank.groups.labels
        )
        # Failures make no number of atoms rarer; and no aim is past what half of the tail's mass is above.
        first = min(own, quantile(bank.rewards, 1 - MASS / 2))
        assert stages["parameter"].iloc[0] == pytest.approx(first, rel=1e-6)


def test_only_a_batch_that_is_large_enough_is_the_bank(bank: Bank, tmp_path: Path) -> None:
    small = tiny(None, methods=METHODS, offline={"samples": DRAWN - 1})
    read = {}
    for experiment in (bank.experiment, small):
        jobs = {m: job_of("finetune", [experiment], m, 0, tmp_path)[1] for m in ("am", *METHODS)}
        read[experiment.offline.samples] = {m for m, job in jobs.items() if "offline" in job.inputs}
        costs = {m for m in jobs if takes_batch(Run("", experiment, m))}  # where its cost is counted
        assert costs == read[experiment.offline.samples] | {"tfft_annealed", "tfft_budget"}
    assert read == {DRAWN: set(METHODS), DRAWN - 1: {"fdc"}}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"by": "scores", "step": None}, "an fdc method needs step, or by: exponents"),
        ({"by": "scores", "solver": FIT | {"kind": "weighted_fitting"}}, "or by: exponents for fdc"),
        ({"by": "values"}, "'scores' or 'exponents'"),
        ({"kind": "am", "iterations": None, "step": None, "by": "exponents"}, "by belongs to fdc, not to am"),
    ],
)
def test_what_has_no_values_is_refused(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny(None, methods={"fdc": method})


@pytest.mark.parametrize("method", ["am_budget", "tfft_budget", "fdc_budget", "fdc_bounded"])
def test_a_budget_has_a_point_of_the_frontier_for_each_stage(bank: Bank, method: str) -> None:
    """The first is what the batch itself is worth, and the last of a bank of the model that is kept."""
    history = bank.history(method)
    frontier = pd.read_csv(bank.file(method, "frontier.csv"))
    stages = history.groupby("iteration" if method.startswith("fdc") else "stage").first()
    assert frontier["stage"].tolist() == list(range(len(stages) + 1))
    paid = stages["divergence" if method.startswith("fdc") else "kl"]
    assert frontier["kl"].tolist() == [0, *paid]
    first = frontier.iloc[0]
    assert first["mean_negative_energy"] == pytest.approx(bank.rewards.mean(), rel=1e-6)
    best = np.sort(bank.rewards)
    for mass, name in ((0.1, "top_10pct"), (0.01, "top_1pct"), (0.002, "top_0.2pct")):
        assert first[f"{name}_negative_energy"] == pytest.approx(upper_tail_mean(best, mass), rel=1e-6)
    assert 0 <= first["validity_pct"] <= 100
    if method != "fdc_bounded":
        assert paid.tolist() == pytest.approx([0.02, 0.04][: len(stages)], abs=1e-3)


def test_the_weight_of_a_budget_is_the_one_of_so_many_nats_within_each_size(bank: Bank) -> None:
    row = bank.history("am_budget").iloc[0]
    q, p = bank.tilted(bank.rewards / row["kl_weight"]), bank.untilted
    assert float(q @ np.log(q / p)) == pytest.approx(0.02, abs=1e-6)
    assert row["mean_promised"] == pytest.approx(float(q @ bank.rewards), rel=1e-6)


def test_the_step_of_a_barrier_goes_along_its_first_variation(bank: Bank, tmp_path: Path) -> None:
    """Of the hinge less what an invalid molecule costs; without a barrier of the hinge alone."""
    plain, kept = (bank.history(m).iloc[0] for m in ("fdc_budget", "fdc_bounded"))
    p, order = bank.untilted, np.argsort(bank.rewards)
    at = quantile(bank.rewards[order], 1 - MASS, p[order])
    q = bank.tilted(np.maximum(bank.rewards - at, 0) / MASS / plain["step_weight"])
    assert plain["utility_promised"] == pytest.approx(upper_tail_mean(bank.rewards, MASS, q), rel=1e-6)
    assert float(q @ np.log(q / p)) == pytest.approx(plain["divergence"], rel=1e-5)
    assert kept["divergence"] <= 0.02 + 1e-9


def test_a_barrier_without_a_valid_molecule_is_refused_before_any_training(tmp_path: Path) -> None:
    """The made-up model has hardly one in two hundred: none is below a share of a tenth."""
    barrier = {**METHODS["fdc_bounded"], "barrier": {"bound": 0.1, "strength": 1.0}}
    checkpoint = write_checkpoint(tmp_path / "resources" / "tiny.safetensors")
    changes = {"objective": {"alpha": ALPHA}, "offline": {"samples": DRAWN}}
    run = Driven(tmp_path, tiny(checkpoint, methods={"fdc_bounded": barrier}, **changes), workers=1)
    assert run.run("pretrain") == run.run("offline") == 0
    assert run.run("finetune", "fdc_bounded") == 1
    assert not run.file("fdc_bounded", MODEL).exists()
