"""Figures from made-up runs: that they are drawn, of what size, and what they are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import TwoSlopeNorm
from PIL import Image

from flowtilt.domains.planar.figures import draw_experiment, draw_study, height_of, relief, window
from flowtilt.domains.planar.measured import load_distributions, load_samples, read_resolution
from flowtilt.domains.planar.studies import StudyRuns
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.comparison import read_reported
from flowtilt.pipeline.report.measurements import (
    Method,
    ResultsError,
    row_name,
    runs_of,
)
from flowtilt.pipeline.report.style import figure_style, write_figures
from made_up import (
    METHODS,
    made_up_runs,
    plain_metrics,
    write_arrays,
    write_functional_arrays,
    write_histories,
    write_metrics,
)
from small import CONFIG, in_plane

REPORTED = CONFIG / "reported_results.csv"


def stripes(points: np.ndarray) -> np.ndarray:
    """A cost with a plateau, and narrow stripes in a low zone to its right."""
    x = points[:, 0]
    ground = 20 + 70 / (1 + np.exp(12 * (x - 1.4)))
    offset = (x - 1.7 + 0.3) % 0.6 - 0.3
    return np.where(x > 1.4, ground + (290 - ground) * np.exp(-((offset / 0.06) ** 4)), ground)


def spikes(points: np.ndarray) -> np.ndarray:
    """A reward with a plateau, and one spike off the line y = 0."""
    squared = (points[:, 0] - 2.0) ** 2 + (points[:, 1] - 0.5) ** 2
    return np.where(points[:, 0] < 1.5, 40.0, 10.0) + 560 * np.exp(-((squared / 0.1**2) ** 2))


NOVELTY = made_up_runs("novelty_2d", "reward", seeds=(4,))
FIGURES = ("densities", "histograms", "landscape")


@pytest.fixture(scope="module", autouse=True)
def style() -> Iterator[None]:
    """What the pipeline draws all figures in."""
    with figure_style():
        yield


@pytest.fixture(scope="module")
def results(style: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up results of both experiments, and the figures of the first."""
    root = tmp_path_factory.mktemp("results")
    write_arrays(root, made_up_runs(), stripes, cells=120, samples=2000)
    write_arrays(root, NOVELTY, spikes, cells=120, samples=2000)
    draw_experiment(root, made_up_runs(), stripes, read_reported(REPORTED), root / "figures" / "risk")
    return root


def check_image(path: Path) -> None:
    assert path.stat().st_size < 400_000
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 500
    assert pixels.std() > 10  # something was drawn
    margins = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((margin > 250).all() for margin in margins)  # and nothing was cut off


@pytest.mark.slow
def test_experiment_has_three_figures(results: Path) -> None:
    drawn = sorted((results / "figures").iterdir())
    assert [p.name for p in drawn] == [f"risk_{what}.png" for what in FIGURES]
    for path in drawn:
        check_image(path)


@pytest.mark.slow
def test_rewards_of_one_seed_without_reported_values(results: Path, tmp_path: Path) -> None:
    none = pd.DataFrame(columns=["source", "experiment", "method", "metric", "value", "unit"])
    draw_experiment(results, NOVELTY, spikes, none, tmp_path / "novelty")
    for what in FIGURES:
        check_image(tmp_path / f"novelty_{what}.png")


@pytest.mark.slow
def test_same_files_give_the_same_images(results: Path, tmp_path: Path) -> None:
    draw_experiment(results, made_up_runs(), stripes, read_reported(REPORTED), tmp_path / "again")
    for what in FIGURES:
        first = results / "figures" / f"risk_{what}.png"
        assert (tmp_path / f"again_{what}.png").read_bytes() == first.read_bytes()


def test_half_of_the_colours_go_to_the_ground() -> None:
    drawn = relief(stripes, 4.0, cells=600)
    assert drawn.ground == pytest.approx(90, abs=0.1)
    assert isinstance(drawn.norm, TwoSlopeNorm)
    assert float(drawn.norm(90.0)) < 0.5 < float(drawn.norm(120.0))
    plain = relief(lambda points: points[:, 0], 4.0, cells=100)
    assert not isinstance(plain.norm, TwoSlopeNorm)
    flat = relief(lambda points: np.full(len(points), 3.0), 4.0, cells=100)
    assert not isinstance(flat.norm, TwoSlopeNorm)


def test_profile_runs_through_the_bumps() -> None:
    assert relief(stripes, 4.0, cells=300).profile_at == 0.0
    assert relief(spikes, 4.0, cells=300).profile_at == pytest.approx(0.5, abs=0.05)


def test_window_holds_nearly_all_samples() -> None:
    points = np.random.default_rng(0).normal(size=(10_000, 2))
    half = window([points, points / 2])
    assert 3.0 < half < 5.0
    assert (np.abs(points) < half).all(axis=1).mean() > 0.999


# ------------------------------------------------------------------------------- reading


def test_distributions_are_averaged_and_samples_pooled_over_seeds(tmp_path: Path) -> None:
    runs = made_up_runs(methods=METHODS[1:2])
    for seed, share in ((0, 1.0), (1, 0.5)):
        folder = tmp_path / "runs" / runs.name / "exact" / f"seed{seed}"
        folder.mkdir(parents=True)
        distribution = np.array([[share, 0.0], [0.0, 1 - share]])
        edges, rewards = np.array([-2.0, -1.0, 0.0]), np.array([1 - share, share])
        arrays: dict[str, Any] = {"am_exact": distribution, "am_exact__rewards": rewards}
        np.savez(folder / "distributions.npz", axis=np.array([-1.0, 1.0]), reward_edges=edges, **arrays)
        folder = tmp_path / "runs" / runs.name / "am" / f"seed{seed}"
        folder.mkdir(parents=True)
        np.savez(folder / "samples.npz", x=np.full((3, 2), seed), reward=np.full(3, seed))
    distributions = load_distributions(tmp_path, runs, "exact")
    np.testing.assert_allclose(distributions.cells["am_exact"], [[0.75, 0.0], [0.0, 0.25]])
    np.testing.assert_allclose(distributions.rewards["am_exact"], [0.25, 0.75])
    points, rewards = load_samples(tmp_path, runs, "am")
    assert points.shape == (6, 2)
    assert list(rewards) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "other arrays", "other grid"])
def test_bad_distributions_are_explained(tmp_path: Path, damage: str) -> None:
    runs = made_up_runs(methods=METHODS[:2])
    write_arrays(tmp_path, runs, stripes, cells=40, samples=20)
    path = tmp_path / "runs" / runs.name / "exact" / "seed1" / "distributions.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other arrays":
        np.savez(path, something=np.zeros(3))
    else:
        with np.load(path) as data:
            arrays = dict(data)
        moved: dict[str, Any] = arrays | {"axis": arrays["axis"] + 1}
        np.savez(path, **moved)
    with pytest.raises(ResultsError) as caught:
        load_distributions(tmp_path, runs, "exact")
    assert str(path) in str(caught.value)
    assert "snakemake" in str(caught.value)


def test_failure_leaves_the_earlier_figures(tmp_path: Path) -> None:
    runs = made_up_runs(methods=METHODS[:2], seeds=(0,))
    (tmp_path / "f_landscape.png").write_bytes(b"earlier")
    with pytest.raises(ResultsError, match=r"samples\.npz: no such file"):
        draw_experiment(tmp_path, runs, stripes, read_reported(REPORTED), tmp_path / "f")
    assert (tmp_path / "f_landscape.png").read_bytes() == b"earlier"


def test_resolution_is_read_if_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "resolution.json"
    assert read_resolution(path) is None
    path.write_text('{"width": 0.25}')
    assert read_resolution(path) == 0.25
    path.write_text("{}")
    with pytest.raises(ResultsError, match="not a resolution file"):
        read_resolution(path)


# ------------------------------------------------------------------------------- studies


@pytest.mark.parametrize("resolution", [None, 0.2])
def test_study_of_widths_is_drawn(tmp_path: Path, resolution: float | None) -> None:
    cases = []
    for of, unit, exact in (("risk_averse_2d", "cost", 90.0), ("novelty_2d", "reward", 500.0)):
        for width in (0.05, 0.1, 0.4):
            runs = made_up_runs(f"widths/{unit}-{width}", unit, methods=METHODS[:2], of=of, value=width)
            rows = {
                row_name(m.name, k): exact for m in runs.methods for k in ("network", "exact", "resolved")
            }
            rows["am"] = exact + (exact if width < 0.2 else 0)
            write_metrics(tmp_path, runs, plain_metrics(runs, rows))
            cases.append(runs)
    if resolution is not None:
        (tmp_path / "resolution.json").write_text(f'{{"width": {resolution}}}')
    draw_study(tmp_path, StudyRuns("widths", "Widths", "half-width", tuple(cases), 0.05), tmp_path / "widths")
    check_image(tmp_path / "widths.png")


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_study_of_iterations_is_drawn(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    methods = (*(Method(f"fdc_k{k}", "fdc", float(k)) for k in (1, 2, 5)), Method("tfft", "tfft"))
    runs = made_up_runs("iterations/risk", methods=methods, of="risk_averse_2d", seeds=seeds)
    rows = {row_name(m.name, k): 90.0 for m in methods for k in ("network", "exact", "resolved")}
    write_metrics(tmp_path, runs, plain_metrics(runs, rows))
    draw_study(tmp_path, StudyRuns("iterations", "Iterations", "K", (runs,)), tmp_path / "iterations")
    check_image(tmp_path / "iterations.png")


# ----------------------------------------------------------------- the project's own files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["novelty_2d", "resolution_2d"])
def test_figures_of_the_projects_experiments(tmp_path: Path, name: str) -> None:
    file = CONFIG / "experiments" / f"{name}.yaml"
    overrides = in_plane(seeds=1, grid={"cells": 96})
    for experiment in load_file(file, overrides).values():
        write_arrays(tmp_path, runs_of(experiment), height_of(experiment), cells=96, samples=500)
    write_figures(file, overrides, tmp_path, REPORTED, tmp_path / "figures" / name)
    drawn = sorted((tmp_path / "figures").iterdir())
    expected = [f"{name}.png"] if name == "resolution_2d" else [f"{name}_{what}.png" for what in FIGURES]
    assert [p.name for p in drawn] == expected
    for path in drawn:
        check_image(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entropy_2d", "ot_2d", "hierarchy_2d", "solvers_2d"])
def test_figures_of_the_experiments_on_functionals(tmp_path: Path, name: str) -> None:
    file = CONFIG / "experiments" / f"{name}.yaml"
    overrides = in_plane(seeds=2)
    for experiment in load_file(file, overrides).values():
        write_functional_arrays(tmp_path, runs_of(experiment), cells=24, samples=400)
        write_histories(tmp_path, experiment)
    write_figures(file, overrides, tmp_path, REPORTED, tmp_path / "figures" / name)
    drawn = sorted((tmp_path / "figures").iterdir())
    single = [f"{name}.png"]
    expected = (
        single if name in ("hierarchy_2d", "solvers_2d") else [f"{name}_densities.png", f"{name}_metrics.png"]
    )
    assert [p.name for p in drawn] == expected
    for path in drawn:
        check_image(path)
