"""Methods that train nothing, through the stages: against the grid and closed forms, what they cost, and
what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from by_hand import Folder
from closed_forms import Mixture, MixtureFlow
from flowtilt.domains.planar.bench import PlanarBench
from flowtilt.domains.planar.build import build_data, build_path, build_reward
from flowtilt.domains.planar.evaluation import evaluate
from flowtilt.domains.planar.experiment import TailExperiment
from flowtilt.domains.planar.files import write_density
from flowtilt.domains.planar.grid import hinge_tilt, no_blur
from flowtilt.domains.planar.rows import GriddedDensity
from flowtilt.domains.planar.training import sample
from flowtilt.domains.planar.truth import TailGrid, exact_rows
from flowtilt.metrics.tails import hinge, lower_tail_mean, upper_tail_mean
from flowtilt.model import Context
from flowtilt.pipeline.configuration import ConfigError
from flowtilt.pipeline.domain import Job, Run, domain_named, run_job
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.files import StageError, write_arrays, write_rows
from flowtilt.pipeline.health import flags
from flowtilt.pipeline.keeping import keep
from flowtilt.pipeline.report.measurements import collect, models_of, runs_of
from flowtilt.pipeline.report.trainings import keeping_panel
from flowtilt.rewards import Reward
from small import CONFIG, tiny

KEPT: dict[str, Any] = {
    "best_of_4": {"kind": "best_of", "n": 4},
    "steered": {"kind": "steered", "particles": 4},
    "resampled": {"kind": "resampled"},
    "resampled_tfft": {"kind": "resampled", "of": "tfft"},
    "steered_tfft": {"kind": "steered", "of": "tfft"},
}
COUNT, BANK = 3000, 4000


def job_of_stage(name: str, results: Path, experiment: Experiment, method: str) -> Job:
    """The job of one run, of a stage of files too."""
    stage = next(one for one in domain_named("planar").stages if one.name == name)
    return run_job(stage, Run(str(results), experiment, method, 0))


class DataFlow(MixtureFlow):
    """The flow of the data's own distribution, with its exact velocity; states are counted."""

    passes = 0

    def velocity(self, x: Tensor, t: Tensor, context: Context = None) -> Tensor:
        self.passes += len(x)
        return super().velocity(x, t, context)


class Counted(Reward):
    """A reward that is asked for by so many samples."""

    def __init__(self, inner: Reward) -> None:
        self.inner, self.calls = inner, 0

    def value(self, x: Tensor, context: Context = None) -> Tensor:
        self.calls += len(x)
        return self.inner.value(x, context)


class Plane(Folder):
    """Tilts of the data's own distribution, in place of a pretrained network's, that steering can follow.

    On the shipped stripes posterior means lie where no sample will, and particles are lost.
    """

    def __init__(self, path: Path) -> None:
        experiment = tiny(
            methods=KEPT,
            objective={"alpha": 30.0, "tail": "upper", "mass": 0.1},
            reward={"bump": 140.0},
            offline={"samples": BANK},
            evaluation={"samples": COUNT},
            solver={"steps": 60},
            grid={"cells": 240},
        )
        assert isinstance(experiment, TailExperiment)
        super().__init__(path, experiment)
        data = build_data(experiment)
        deviations = torch.as_tensor(data.deviations)
        mixture = Mixture.of(data.weights, data.means, torch.diag_embed(deviations**2))
        self.flow = DataFlow(build_path(experiment.path), mixture)
        self.reward = Counted(build_reward(experiment))
        axis = np.linspace(-6, 6, 161)
        at = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
        density = GriddedDensity(axis, data.log_density(at))
        write_density(density, self.base / "density.npz")
        self.grid = TailGrid(experiment, density)
        self.solved = exact_rows(self.grid).metrics

    def exact(self, method: str) -> dict[str, float | None]:
        """The method's row on the grid, of a tfft's tilt with the threshold that the batch has."""
        goal, own = self.experiment.goal_of(method), self.experiment.objective
        if goal != "tfft":
            return self.solved[f"{method}_exact"]
        at = json.loads(self.file("tfft", "threshold.json").read_text())["threshold"]
        log_p, rewards = self.grid.log_p, self.grid.rewards
        log_q = hinge_tilt(log_p, rewards, at, own.tail_alpha, own.mass, own.tail, no_blur)
        return self.grid.measured(log_q, goal)

    def kept(self, method: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(self.file(method, "kept.json").read_text())
        return found

    def rewards(self, method: str) -> np.ndarray:
        with np.load(self.file(method, "kept_samples.npz")) as arrays:
            found = build_reward(self.experiment)(torch.as_tensor(arrays["x"]))
        return found.double().numpy()

    def bank(self) -> np.ndarray:
        with np.load(self.file("pretrained", "offline.npz")) as arrays:
            return arrays["reward"].astype(float)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Plane(tmp_path_factory.mktemp("plane"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanarBench, "flow", made.flow)
        patch.setattr(PlanarBench, "reward", made.reward)
        assert made.run("offline") == made.run("threshold", "tfft") == 0
        for method in KEPT:
            made.flow.passes = made.reward.calls = 0
            assert made.run("keep", method) == 0
            counted = {"sample_passes": made.flow.passes / COUNT, "sample_rewards": made.reward.calls / COUNT}
            made.file(method, "counted.json").write_text(json.dumps(counted))
        yield made


@pytest.mark.parametrize("method", ["best_of_4", "steered", "steered_tfft", "resampled", "resampled_tfft"])
def test_what_is_kept_has_the_distribution_that_is_solved_on_the_grid(plane: Plane, method: str) -> None:
    """Mean and divergence within four standard errors, which the mean's move is larger than.

    The divergence's is about that of ``log Z``, and for the best of n there is none.
    """
    found, exact, kept = plane.rewards(method), plane.exact(method), plane.kept(method)
    effective = kept.get("effective_sample_size", math.inf)
    error = found.std() / math.sqrt(min(COUNT, effective))
    assert -found.mean() == pytest.approx(exact["mean_cost"], abs=4 * error)
    assert plane.exact("pretrained")["mean_cost"] - exact["mean_cost"] > 5 * error
    drawn = BANK if method.startswith("resampled") else 4 * COUNT
    nats = math.sqrt(1 / effective - 1 / drawn) if math.isfinite(effective) else 0.001
    assert kept["kl"] == pytest.approx(exact["kl"], abs=4 * nats)


def test_the_best_of_four_have_ranks_of_order_statistics(plane: Plane) -> None:
    """``F(r)`` of the largest of four has the mean 4/5, and the square of it 4/6; ``F`` by the bank."""
    bank = np.sort(plane.bank())
    ranks = np.searchsorted(bank, plane.rewards("best_of_4")) / BANK
    assert ranks.mean() == pytest.approx(0.8, abs=0.015)
    assert np.square(ranks).mean() == pytest.approx(2 / 3, abs=0.02)
    assert plane.kept("best_of_4")["kl"] == pytest.approx(math.log(4) - 0.75)


@pytest.mark.parametrize("method", ["resampled", "resampled_tfft"])
def test_the_resampled_bank_has_its_weighted_moments(plane: Plane, method: str) -> None:
    """Copies are numbers rounded down or up: means are nearer than those of random draws would be."""
    bank, objective = plane.bank(), plane.experiment.objective
    exponents = bank / objective.alpha
    if method == "resampled_tfft":
        at = json.loads(plane.file("tfft", "threshold.json").read_text())["threshold"]
        exponents = hinge(bank, at, objective.mass, "upper") / objective.tail_alpha
    weights = np.exp(exponents - exponents.max())
    weights /= weights.sum()
    found = plane.rewards(method)
    assert found.mean() == pytest.approx(weights @ bank, abs=0.05 * bank.std())
    for tail_mean in (lower_tail_mean, upper_tail_mean):
        assert tail_mean(found, 0.05) == pytest.approx(tail_mean(bank, 0.05, weights), rel=0.02)
    kept = plane.kept(method)
    assert kept["kl"] == pytest.approx(weights @ np.log(weights * BANK), rel=1e-6)
    assert kept["effective_sample_size"] == pytest.approx(1 / (weights @ weights), rel=1e-6)
    with np.load(plane.file(method, "kept_samples.npz")) as arrays:
        assert kept["distinct_share"] == len(np.unique(arrays["x"], axis=0)) / COUNT


@pytest.mark.parametrize("method", KEPT)
def test_costs_are_those_that_are_counted(plane: Plane, method: str) -> None:
    kept, counted = plane.kept(method), json.loads(plane.file(method, "counted.json").read_text())
    if method.startswith("resampled"):  # nothing is drawn or evaluated again: the batch's own
        assert counted == {"sample_passes": 0, "sample_rewards": 0}
        counted = {"sample_passes": 60 * BANK / COUNT, "sample_rewards": BANK / COUNT}
    assert {key: kept[key] for key in counted} == pytest.approx(counted)
    assert kept["plain_passes"] == 4 * plane.experiment.evaluation.ode_steps


@pytest.mark.parametrize("method", ["best_of_4", "resampled", "steered"])
def test_the_same_run_again_has_the_same_bytes(plane: Plane, method: str) -> None:
    files = [plane.file(method, name) for name in ("kept_samples.npz", "kept.json")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert plane.run("keep", method) == 0
    assert [file.read_bytes() for file in files] == before


def test_they_are_measured_as_all_others_and_shown_with_their_costs(plane: Plane) -> None:
    """With the exact row of each beside it, and without one at finite resolution."""
    experiment = plane.experiment.model_copy(
        update={"methods": {name: m for name, m in plane.experiment.methods.items() if name in KEPT}}
    )
    with np.load(plane.file("pretrained", "offline.npz")) as arrays:
        write_arrays(plane.file("pretrained", "samples.npz"), reward=arrays["reward"])
    for method in KEPT:
        job = job_of_stage("measure", plane.path, plane.experiment, method)
        sample(job)
        evaluate(job)
    for solution, solved in (("exact", plane.solved), ("resolved", exact_rows(plane.grid, 0.3).metrics)):
        plane.folder(solution).mkdir(parents=True, exist_ok=True)
        write_rows(solved, plane.file(solution, "metrics.json"))
    long = collect(plane.path, runs_of(experiment))
    rows = long.pivot_table("value", "method", "metric")
    for method in KEPT:
        row, found = rows.loc[method], plane.rewards(method)
        assert row["mean_cost"] == pytest.approx(-found.mean(), rel=1e-5)
        assert row["top_10pct_cost"] == pytest.approx(-upper_tail_mean(found, 0.1), rel=1e-5)
        goal = "tail_objective" if "tfft" in method else "objective"
        mean = -row["mean_cost"] - plane.experiment.objective.alpha * row["kl"]
        assert row["objective"] == pytest.approx(row[goal] if "tfft" in method else mean)
    assert not any(row.endswith("_resolved") for row in rows.index)
    panel = keeping_panel(long)
    assert panel is not None
    assert {line[0] for line in panel.lines} == {*KEPT}
    best = next(line for line in panel.lines if line[0] == "best_of_4")
    shown = dict(zip(panel.header, best, strict=True))
    assert shown["network passes a sample"] == "80.00"
    assert shown["of a plain sample"] == "20.00"
    assert shown["reward calls a sample"] == "4.000"
    assert models_of(experiment).methods == ()


# --- Degenerate input --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["best_of_4", "steered", "resampled"])
def test_a_model_without_one_valid_reward_is_refused(
    plane: Plane, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Failing(Reward):
        may_fail = True

        def value(self, x: Tensor, context: Context = None) -> Tensor:
            return torch.full((len(x),), math.nan)

    monkeypatch.setattr(PlanarBench, "reward", Failing())
    folder = Folder(tmp_path, plane.experiment)
    assert folder.run("offline") == 0
    assert folder.run("keep", method) == 1
    assert not folder.file(method, "kept.json").exists()
    with pytest.raises(StageError, match=r"no sample of the .* has a reward; look at the"):
        keep(job_of_stage("keep", tmp_path, plane.experiment, method))


def test_a_tilt_without_its_threshold_says_what_to_run(plane: Plane, tmp_path: Path) -> None:
    folder = Folder(tmp_path, plane.experiment)
    assert folder.run("offline") == 0
    with pytest.raises(StageError, match=r"threshold.json: no such file; run the threshold stage first"):
        keep(job_of_stage("keep", tmp_path, plane.experiment, "resampled_tfft"))


def test_few_and_equal_samples_are_flagged() -> None:
    assert flags({"effective_sample_size": 9.9, "distinct_share": 0.5}) == {
        "few": "its weights rest on 9.9 effective samples"
    }
    found = flags({"effective_sample_size": 10.0, "distinct_share": 0.128})
    assert found == {"copies": "12.8 % of the samples that it keeps are distinct"}
    assert flags({"sample_passes": 80.0, "kl": 0.64}) == {}


# --- Configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"kind": "best_of"}, "a best_of method needs n, the samples that each kept one is the best of"),
        ({"kind": "best_of", "n": 1}, "methods.own.n: Input should be greater than or equal to 2 (got 1)"),
        (
            {"kind": "best_of", "n": 4, "of": "am"},
            "of belongs to resampled and steered, not to best_of; remove",
        ),
        ({"kind": "resampled", "particles": 4}, "particles belongs to steered, not to resampled; remove it"),
        ({"kind": "am", "n": 4}, "n belongs to best_of, not to am; remove it"),
        (
            {"kind": "steered", "particles": 1},
            "methods.own.particles: Input should be greater than or equal to 2",
        ),
        ({"kind": "steered", "share": 0}, "methods.own.share: Input should be greater than 0 (got 0)"),
        ({"kind": "steered", "updates": 5}, "updates belong to methods that are fine-tuned, not to steered"),
        (
            {"kind": "steered", "of": "amm"},
            "methods.own.of: there is no method 'amm' (pretrained, am, fdc, tfft",
        ),
        (
            {"kind": "resampled", "of": "fdc"},
            "methods.own.of: the method 'fdc' is of kind fdc, without a fixed tilt; name a method of kind am "
            "or tfft, or remove the key, for the reward over alpha",
        ),
        ({"kind": "resampled", "of": "best_of_4"}, "'best_of_4' is of kind best_of, without a fixed tilt"),
    ],
)
def test_keys_that_do_not_fit_are_refused_before_any_draw(method: dict[str, Any], said: str) -> None:
    file = CONFIG / "experiments" / "risk_averse_2d.yaml"
    with pytest.raises(ConfigError) as caught:
        load_file(file, {"planar": {"methods": {"own": method}}})
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert said in message


def test_they_are_of_tails_in_the_plane_not_of_functionals() -> None:
    with pytest.raises(ConfigError, match=r"key methods.own.kind: .* \(got 'best_of'\)"):
        load_file(
            CONFIG / "experiments" / "ot_2d.yaml",
            {"planar": {"methods": {"own": {"kind": "best_of", "n": 4}}}},
        )


# --- The plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "batch", "samples"),
    [
        ("risk_averse_2d", "risk_averse_2d/pretrained/seed0/offline.npz", "kept_samples.npz"),
        ("molecules_qm9", "molecules_qm9/pretrained/seed0/offline.npz", "kept_samples.npz"),
        ("text_to_image_left_tail", "text_to_image_left_tail/pretrained/seed0/offline.npz", "kept_images"),
    ],
)
def test_their_jobs_read_and_write_what_they_should(file: str, batch: str, samples: str) -> None:
    (experiment,) = load_file(CONFIG / "experiments" / f"{file}.yaml").values()
    domain = domain_named(experiment.domain)
    own = [one for one in domain.stages if one.of(experiment)]
    stage = {one.name: one for one in own}
    tfft = next(name for name, m in experiment.methods.items() if m.kind == "resampled" and m.of)

    def run(method: str) -> Run:
        return Run("results", experiment, method, 0)

    read: Callable[[str], Any] = lambda method: {**stage["keep"].reads(run(method))}  # noqa: E731
    assert read("best_of_4").keys() == read("steered").keys() == {"pretrained"}
    assert read("resampled")["offline"] == f"results/runs/{batch}"
    assert read(tfft)["threshold"].endswith(f"/{experiment.methods[tfft].of}/seed0/threshold.json")
    folder = f"results/runs/{file}/best_of_4/seed0"
    written = stage["keep"].written(run("best_of_4"))
    assert written == {"samples": f"{folder}/{samples}", "kept": f"{folder}/kept.json"}
    last = stage.get("evaluate") or stage["measure"]
    assert set(written.values()) <= {*last.reads(run("best_of_4")).values()}
    jobs = {one.name for one in own if one.kinds and one.has(experiment, "best_of_4")}
    assert jobs == {"keep", last.name}
    assert not stage["keep"].has(experiment, "am")
