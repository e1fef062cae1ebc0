"""What a fine-tuning leaves of itself: against closed forms, and its flags in logs and tables."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from by_hand import Folder, pretrained
from flowtilt.pipeline.experiment import Experiment, load_file
from flowtilt.pipeline.files import StageError, read_columns, write_arrays, write_json
from flowtilt.pipeline.health import flags, tilt_metrics, training_metrics
from flowtilt.pipeline.report.measurements import LONG_COLUMNS, read_by_seed, row_name, runs_of
from flowtilt.pipeline.report.tables import write_table
from flowtilt.pipeline.report.trainings import training_panel
from made_up import write_histories, write_metrics
from small import CONFIG, tiny


def history(**columns: list[float]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in columns.items()}


def test_a_history_of_adjoint_matching_sums_what_its_solves_pay() -> None:
    """Ten updates each; of the last fifth of a solve 0.5 and 0.3 nats."""
    path = [9.0] * 8 + [0.4, 0.6] + [7.0] * 8 + [0.3, 0.3]
    active = [0.0] * 5 + [0.2] * 15
    found = training_metrics(
        history(
            iteration=[1.0] * 10 + [2.0] * 10, active_share=active, path_kl=path, clipped_share=[0.1] * 20
        )
    )
    assert found == pytest.approx(
        {
            "active_share": 0.15,
            "active_share_final": 0.2,
            "inactive_updates": 0.25,
            "kl_paid": 0.8,
            "clipped_share": 0.1,
        }
    )


def test_of_fits_the_smallest_bank_and_the_divergence_of_the_last_stage_count() -> None:
    found = training_metrics(
        history(active_share=[1.0] * 6, effective_sample_size=[90, 90, 40, 40, 60, 60], kl=[1, 1, 2, 2, 3, 3])
    )
    assert (found["effective_sample_size"], found["kl_paid"]) == (40, 3)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"active_share": 0.0, "inactive_updates": 1.0}, ["idle"]),
        ({"active_share": 0.001, "inactive_updates": 0.6}, ["scarce"]),
        ({"active_share": 0.001, "inactive_updates": 0.5}, []),
        ({"active_share": 1.0, "effective_sample_size": 9.9}, ["few"]),
        ({"active_share": 1.0, "effective_sample_size": 10.0}, []),
        ({"tilt_predicted": 2.0, "tilt_realised": 0.99}, ["short"]),
        ({"tilt_predicted": 2.0, "tilt_realised": 1.0}, []),
        ({"tilt_predicted": None, "tilt_realised": -1.0}, []),
        ({}, []),
    ],
)
def test_flags_are_at_their_bounds(metrics: dict[str, float | None], words: list[str]) -> None:
    assert list(flags(metrics)) == words


# ------------------------------------------------------------------------------------- tilts


class Evaluated(Folder):
    """Runs of a tail in the plane, with rewards that are made up."""

    def tilt(self, method: str, before: np.ndarray, after: np.ndarray, **more: np.ndarray) -> dict:  # type: ignore[type-arg]
        from dataclasses import replace

        from flowtilt.pipeline.domain import job_of

        job = job_of("finetune", [self.experiment], method, 0, self.path)[1]
        if method == "tfft":
            write_json({"threshold": 0.0, "offline_active_share": 0.5}, self.file("tfft", "threshold.json"))
            job = replace(job, inputs={"threshold": self.file("tfft", "threshold.json")})
        write_arrays(self.path / "before.npz", reward=before, **more)
        return dict(tilt_metrics(job, after, self.path / "before.npz", *more))


@pytest.fixture
def evaluated(tmp_path: Path) -> Evaluated:
    return Evaluated(tmp_path, tiny())


def test_the_predicted_mean_is_that_of_the_gaussian_tilt(evaluated: Evaluated) -> None:
    """``N(0, s^2)`` tilted by ``r / alpha`` has the mean ``s^2 / alpha``; of a context by itself, too."""
    alpha = evaluated.experiment.reward_weight_of("am")
    z = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    found = evaluated.tilt("am", alpha * z, alpha * (z + 0.4))
    assert found["tilt_predicted"] == pytest.approx(alpha, rel=5e-3)
    assert found["tilt_realised"] == pytest.approx(0.4 * alpha, rel=1e-6)
    assert list(flags(found)) == ["short"]
    # Contexts that are far apart: mass does not move from one to the other.
    apart = np.concatenate([alpha * z, alpha * z + 50 * alpha])
    found = evaluated.tilt("am", apart, apart, prompt=np.repeat([3, 7], len(z)))
    assert found["tilt_predicted"] == pytest.approx(alpha, rel=5e-3)


def test_the_hinge_of_a_lower_tail_is_that_of_the_threshold(
    evaluated: Evaluated, caplog: pytest.LogCaptureFixture
) -> None:
    """Against quadrature: f = min(r, 0) / mass at the threshold 0, for a standard normal reward."""
    problem = evaluated.experiment.tail_of("tfft")
    scale = problem.alpha * problem.mass
    z = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    r = np.linspace(-9, 9, 40_001)
    weight = norm.pdf(r) * np.exp(np.minimum(r, 0))
    f = np.minimum(r, 0) * scale / problem.mass
    expected = (weight * f).sum() / weight.sum() - (norm.pdf(r) * f).sum() / norm.pdf(r).sum()
    logging.getLogger("flowtilt").propagate = True
    with caplog.at_level(logging.WARNING):
        found = evaluated.tilt("tfft", scale * z, np.append(scale * z, math.nan))
    assert found["tilt_predicted"] == pytest.approx(expected, rel=5e-3)
    assert found["tilt_realised"] == pytest.approx(0, abs=1e-9)
    assert "tfft (short): the mean of its tilt rose by" in caplog.text


def test_a_tilt_that_few_samples_carry_or_noise_hides_is_not_predicted(evaluated: Evaluated) -> None:
    alpha = evaluated.experiment.reward_weight_of("am")
    z = norm.ppf((np.arange(2_000) + 0.5) / 2_000)
    for strength in (30.0, 0.02):
        found = evaluated.tilt("am", strength * alpha * z, strength * alpha * z)
        assert found["tilt_predicted"] is None
        assert not flags(found)


def test_without_an_evaluated_pretrained_model_there_is_no_prediction(evaluated: Evaluated) -> None:
    from flowtilt.pipeline.domain import job_of

    job = job_of("finetune", [evaluated.experiment], "am", 0, evaluated.path)[1]
    assert tilt_metrics(job, np.zeros(3), None) == {}
    assert tilt_metrics(job, np.zeros(3), evaluated.path / "none.npz") == {}
    (evaluated.path / "broken.npz").write_text("x")
    with pytest.raises(StageError, match=r"broken.npz: not a complete file"):
        tilt_metrics(job, np.zeros(3), evaluated.path / "broken.npz")


# ------------------------------------------------------------------------------------- tables


def test_a_run_without_an_active_sample_says_so_in_its_table_and_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A threshold that no sample reaches: the training goes through, and the table of the plane shows it."""
    folder = pretrained(tmp_path, tiny())
    assert folder.run("offline") == 0
    assert folder.run("threshold", "tfft") == 0
    write_json({"threshold": -1e9, "offline_active_share": 0.0}, folder.file("tfft", "threshold.json"))
    capsys.readouterr()
    assert folder.finetune("tfft") == 0
    assert "tfft (idle): no sample was active in any update" in capsys.readouterr().err
    assert not read_columns(folder.file("tfft", "history.csv"))["active_share"].any()


def frame(*lines: tuple[str, str, str, int, float]) -> pd.DataFrame:
    return pd.DataFrame(list(lines), columns=list(LONG_COLUMNS))


def test_flags_are_counted_by_seed() -> None:
    lines = [("e", "tfft", "active_share", seed, share) for seed, share in enumerate((0.0, 0.1, 0.0))]
    lines += [("e", "am", "active_share", seed, 1.0) for seed in range(3)]
    lines += [("e", "am_exact", "active_share", 0, math.nan), ("e", "pretrained", "kl", 0, 0.0)]
    panel = training_panel(frame(*lines))
    assert panel is not None
    assert [(line[0], line[-1]) for line in panel.lines] == [("tfft", "idle (2 of 3)"), ("am", "")]
    assert panel.header == ["method", "active samples (share)", "flag"]
    assert training_panel(frame(("e", "pretrained", "kl", 0, 0.0))) is None
    both = training_panel(frame(*lines, ("s/case", "tfft", "active_share", 0, 0.2)))
    assert both is not None
    assert [line[0] for line in both.lines] == ["e, tfft", "e, am", "case, tfft"]


OTHERS = {"molecules_tail_sweep": ("molecules_qm9",)}
"""Files whose runs a study's table reads as well."""

NAMES = (
    *("risk_averse_2d", "solvers_2d", "molecules_qm9"),
    *("molecules_tail_sweep", "text_to_image_left_tail"),
)


def idle_runs(results: Path, file: Path) -> None:
    """Runs of a file with the committed metrics, but for tails that were never reached on the first seed.

    A method that has none stands for another one of its kind.
    """
    known = read_by_seed(CONFIG.parent / "results" / "tables" / "by_seed.csv")
    files = [file, *map(file.with_stem, OTHERS.get(file.stem, ()))]
    for experiment in [each for one in files for each in load_file(one).values()]:
        write_histories(results, experiment)
        own = known[known["experiment"] == experiment.name]
        write_metrics(results, runs_of(experiment), partial(metrics_of, own, experiment))


def metrics_of(
    known: pd.DataFrame, experiment: Experiment, method: str, solution: str, seed: int
) -> dict[str, float | None]:
    kinds = {name: config.kind for name, config in experiment.methods.items()}
    for name in (method, *(name for name, kind in kinds.items() if kind == kinds[method])):
        row = known[(known["method"] == row_name(name, solution)) & (known["seed"] == seed)]
        if len(row):
            break
    pairs = zip(row["metric"], row["value"], strict=True)
    found: dict[str, float | None] = {name: None if math.isnan(value) else value for name, value in pairs}
    if "active_share" in found and kinds[method] == "tfft" and seed == experiment.seeds[0]:
        found |= {"active_share": 0.0, "inactive_updates": 1.0}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_every_domain_shows_an_idle_run(name: str, tmp_path: Path) -> None:
    file = CONFIG / "experiments" / f"{name}.yaml"
    idle_runs(tmp_path, file)
    write_table(file, {}, tmp_path, CONFIG / "reported_results.csv", tmp_path / "t")
    text = (tmp_path / "t.md").read_text()
    tail = text[text.index("**Fine-tuning: ") :]
    assert "idle (1 of " in tail
    assert "Flags: idle, no sample was active, and the run has not tested its method" in tail
