"""Figures of images from made-up runs: what is drawn, where, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from flowtilt.domains.images.experiment import ImageExperiment, tail_metric
from flowtilt.domains.images.figures import (
    Cell,
    Strip,
    exploration_figure,
    exploration_strips,
    images_figure,
    images_of,
    load_scores,
    read_image,
    tail_figure,
    tail_strips,
)
from flowtilt.metrics.tails import lower_tail_mean, quantile
from flowtilt.pipeline.files import write_arrays
from flowtilt.pipeline.report.frontier import frontier_figure, load_frontiers, with_frontier
from flowtilt.pipeline.report.measurements import ResultsError, collect, of_row, run_folder, runs_of
from flowtilt.pipeline.report.style import figure_style, save_figure, write_figures
from made_up_images import DESIGNS, ENTROPY, LEFT_TAIL, loaded, write_config, write_images
from small import CONFIG

REPORTED = CONFIG / "reported_results.csv"
PROMPTS = ["a red beam bridge", "a blue arch bridge over the sea at sunset", "a truss bridge"]
# As many images as make the second line of a method shorter than the first.
SMALL: dict[str, dict[str, Any]] = {
    ENTROPY: {"evaluation": {"images": 14}},
    LEFT_TAIL: {"evaluation": {"images": 4}, "prompts": PROMPTS},
}
LEVELS = {"pretrained": 0.0, "am": 0.2, "tfft": 0.6, "fdc_alpha_32": 0.3, "fdc": 0.9}
SEEDS = 2


def small(name: str) -> ImageExperiment:
    return loaded(name, seeds=SEEDS, **SMALL[name])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up runs of both experiments, with their figures and files."""
    root = tmp_path_factory.mktemp("results")
    for name in (ENTROPY, LEFT_TAIL):
        write_images(root, small(name), lambda method: LEVELS.get(method, 0.5), size=16)
        file = write_config(root / "config", name, seeds=SEEDS, **SMALL[name])
        write_figures(file, {}, root, REPORTED, root / "figures" / name)
    return root


@pytest.mark.slow
def test_both_experiments_have_two_figures(results: Path) -> None:
    drawn = sorted((results / "figures").iterdir())
    assert [path.name for path in drawn] == [
        f"{name}_{what}.png" for name in (ENTROPY, LEFT_TAIL) for what in ("images", "scores")
    ]
    for path in drawn:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 500
        assert pixels.std() > 10  # something was drawn
        margins = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
        assert all((margin > 250).all() for margin in margins)  # and nothing was cut off


def test_the_same_runs_give_the_same_figures(results: Path, tmp_path: Path) -> None:
    file = results / "config" / "experiments" / f"{LEFT_TAIL}.yaml"
    write_figures(file, {}, results, REPORTED, tmp_path / "again")
    for what in ("images", "scores"):
        first = results / "figures" / f"{LEFT_TAIL}_{what}.png"
        assert (tmp_path / f"again_{what}.png").read_bytes() == first.read_bytes()


BUDGET = {"kind": "annealed_fitting", "kl": 0.8, "stage_kl": 0.4, "bank": 400}


def test_the_frontier_has_a_line_for_each_seed_of_a_method_with_a_budget(tmp_path: Path) -> None:
    annealed = {f"{kind}_annealed": {"kind": kind, "solver": BUDGET} for kind in ("am", "tfft")}
    changes = {"seeds": SEEDS, **SMALL[LEFT_TAIL], "methods": annealed}
    experiment = loaded(LEFT_TAIL, **changes)
    write_images(tmp_path, experiment, lambda method: 0.5, size=16)
    methods = with_frontier(experiment)
    assert methods == ["am_annealed", "tfft_annealed"]
    frontiers = {method: load_frontiers(tmp_path, experiment, method) for method in methods}
    long = collect(tmp_path, runs_of(experiment))
    paid = long[(long["metric"] == "clip") & (long["method"] == "am")].assign(metric="kl_paid", value=0.7)
    shown = ["mean_reward", tail_metric(0.2), "vendi"]
    with figure_style():
        figure = frontier_figure(experiment, frontiers, pd.concat([long, paid]), shown)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["mean", "worst-20 % mean"]  # banks have no Vendi score
    lines = panels[0].get_lines()
    assert len(lines) == len(methods) * SEEDS + 1
    for line, frame in zip(lines, [f for frames in frontiers.values() for f in frames], strict=False):
        np.testing.assert_allclose(line.get_xdata(), [0, 0.4, 0.8])
        np.testing.assert_array_equal(line.get_ydata(), frame["mean_reward"])
    np.testing.assert_array_equal(lines[-1].get_xdata(), [0.7] * SEEDS)
    np.testing.assert_array_equal(lines[-1].get_ydata(), of_row(long, "am", "mean_reward"))
    file = write_config(tmp_path / "config", LEFT_TAIL, **changes)
    write_figures(file, {}, tmp_path, REPORTED, tmp_path / LEFT_TAIL)
    assert (tmp_path / f"{LEFT_TAIL}_frontier.png").stat().st_size > 10_000
    (run_folder(tmp_path, runs_of(experiment), "am_annealed", "network", 0) / "frontier.csv").unlink()
    with pytest.raises(ResultsError, match="run the finetune stage of am_annealed first"):
        load_frontiers(tmp_path, experiment, "am_annealed")


# ---------------------------------------------------------------------------------- images


def image_of(results: Path, experiment: ImageExperiment, method: str, prompt: int, number: int) -> np.ndarray:
    folder = run_folder(results, runs_of(experiment), method, "network", 0) / "images"
    with Image.open(folder / f"prompt{prompt:03d}_{number:04d}.png") as image:
        return np.asarray(image)


def test_methods_show_the_same_numbers_framed_by_their_designs(results: Path) -> None:
    experiment = small(ENTROPY)
    strips = exploration_strips(results, experiment)
    assert [strip.name for strip in strips] == list(experiment.methods)
    frames: dict[int, set[str | None]] = {}
    for strip in strips:
        assert [len(line) for line in strip.lines] == [12, 2]
        design = load_scores(results, runs_of(experiment), strip.name, 0).design
        for number, cell in enumerate(cell for line in strip.lines for cell in line):
            np.testing.assert_array_equal(cell.image, image_of(results, experiment, strip.name, 0, number))
            frames.setdefault(int(design[number]), set()).add(cell.frame)
    assert len(frames) > 2
    assert all(len(colours) == 1 for colours in frames.values())  # one colour a design
    assert len(set.union(*frames.values())) == len(frames)  # and another for each


def test_images_without_designs_have_no_frame(results: Path, tmp_path: Path) -> None:
    experiment = loaded(ENTROPY, seeds=1, evaluation={"images": 2, "designs": []})
    write_images(tmp_path, experiment, lambda _: 0.0, size=16)
    for method in experiment.methods:
        file = tmp_path / "runs" / ENTROPY / method / "seed0" / "scores.npz"
        scores = load_scores(tmp_path, runs_of(experiment), method, 0)
        write_arrays(file, prompt=scores.prompt, reward=scores.reward, design=np.full(2, -1))
    assert all(
        cell.frame is None
        for strip in exploration_strips(tmp_path, experiment)
        for line in strip.lines
        for cell in line
    )
    with figure_style():
        assert not images_of(tmp_path, experiment).legends
        save_figure(
            exploration_figure(experiment, collect(tmp_path, runs_of(experiment))), tmp_path / "s.png"
        )


def test_rewards_like_the_pretrained_models_worst_are_red(results: Path) -> None:
    experiment = small(LEFT_TAIL)
    strips, bad = tail_strips(results, experiment)
    runs = runs_of(experiment)
    pretrained = np.sort(load_scores(results, runs, "pretrained", 0).reward)
    assert bad == pretrained[2]  # of 12 rewards, the third is the first with a share of 0.2 up to it
    red = black = 0
    for strip in strips:
        ((*cells,),) = strip.lines
        reward = load_scores(results, runs, strip.name, 0).reward
        assert [cell.text for cell in cells] == [f"{reward[4 * prompt]:.3f}" for prompt in range(3)]
        for prompt, cell in enumerate(cells):
            np.testing.assert_array_equal(cell.image, image_of(results, experiment, strip.name, prompt, 0))
            assert (cell.text_colour != "black") == (reward[4 * prompt] <= bad)
            red, black = red + (cell.text_colour != "black"), black + (cell.text_colour == "black")
    assert red
    assert black


def test_images_are_squares_in_the_order_of_their_methods() -> None:
    bright, dark = np.full((8, 8, 3), 250, np.uint8), np.full((8, 8, 3), 5, np.uint8)
    strips = [
        Strip("pretrained", "pretrained", [[Cell(bright, "0.1"), Cell(dark, "0.2", "red")]]),
        Strip("am", "am", [[Cell(dark, frame="#117733"), Cell(bright)]]),
    ]
    with figure_style():
        figure = images_figure("Title", PROMPTS[:2], strips, [])
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [image.get_window_extent() for image in axes.images]
    assert all(box.width == pytest.approx(box.height) for box in boxes)
    first, second, third, fourth = boxes
    assert first.x0 == third.x0
    assert second.x0 == fourth.x0
    assert first.x1 < second.x0
    assert third.y1 < first.y0
    # Small images are enlarged by whole numbers, so that theirs stay sharp.
    assert all(np.asarray(image.get_array()).shape == (256, 256, 3) for image in axes.images)
    assert [int(np.asarray(image.get_array()).mean()) for image in axes.images] == [250, 5, 5, 250]
    (frame,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert frame.get_window_extent().bounds == pytest.approx(third.bounds)
    texts = {text.get_text(): text for text in axes.texts}
    assert {"pretrained", "am", "0.1", "0.2", "a red beam\nbridge", "Title"} <= texts.keys()
    assert texts["0.2"].get_color() == "red"
    title = texts["a red beam\nbridge"].get_window_extent()
    assert (title.x0 + title.x1) / 2 == pytest.approx((first.x0 + first.x1) / 2, abs=1)
    assert title.y0 > first.y1


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_bad_images_are_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "prompt000_0001.png"
    if damage == "truncated":
        Image.new("RGB", (16, 16)).save(file)
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ResultsError, match=r"prompt000_0001\.png: cannot be read") as caught:
        read_image(tmp_path, 0, 1)
    assert f"snakemake --cores all --force {tmp_path}" in str(caught.value)


def test_bad_scores_are_named(tmp_path: Path) -> None:
    runs = runs_of(small(LEFT_TAIL))
    with pytest.raises(ResultsError, match=r"scores\.npz: no such file"):
        load_scores(tmp_path, runs, "am", 0)
    write_arrays(tmp_path / "runs" / LEFT_TAIL / "am" / "seed0" / "scores.npz", prompt=np.zeros(3))
    with pytest.raises(ResultsError, match=r"scores\.npz: no array design, reward"):
        load_scores(tmp_path, runs, "am", 0)


# ------------------------------------------------------------------------------------ scores


def lines_at(axes: Axes) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axes.lines]  # type: ignore[index, arg-type]


def test_tails_and_their_means_are_marked() -> None:
    experiment = small(LEFT_TAIL)
    random = np.random.default_rng(0)
    rewards = {
        method: [random.normal(number + 0.1 * seed, 0.1, 50) for seed in range(SEEDS)]
        for number, method in enumerate(experiment.methods)
    }
    with figure_style():
        figure = tail_figure(experiment, rewards)
    base = np.mean([lower_tail_mean(own, 0.2) for own in rewards["pretrained"]])
    for axes, (method, own) in zip(figure.axes, rewards.items(), strict=True):
        assert axes.get_title(loc="left") == method
        mean = np.mean([lower_tail_mean(seed, 0.2) for seed in own])
        assert lines_at(axes) == pytest.approx([base, mean])
        histograms = [patch for patch in axes.patches if hasattr(patch, "get_data")]
        for histogram in histograms:  # nothing is left out at either end
            assert np.asarray(histogram.get_data().values).sum() == pytest.approx(1)
        (span,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert span.get_x() + span.get_width() == pytest.approx(quantile(np.concatenate(own), 0.2))
    said = figure.axes[3].get_title(loc="right")
    assert said.startswith("worst-20 % mean ")
    tenth = np.array([lower_tail_mean(own, 0.1) for own in rewards["tfft_0.1"]])
    assert f"worst-10 % mean {tenth.mean():.2f}" in said
    assert "worst-10" not in figure.axes[2].get_title(loc="right")


def test_shares_and_scores_are_means_over_seeds(results: Path) -> None:
    experiment = small(ENTROPY)
    long = collect(results, runs_of(experiment))
    with figure_style():
        figure = exploration_figure(experiment, long)
    panels = {axes.get_title() or axes.get_ylabel(): axes for axes in figure.axes}
    shares = panels["share of images"]
    heights = [patch.get_height() for patch in shares.patches]  # type: ignore[attr-defined]
    wanted = [of_row(long, m, f"share_{d}").mean() for m in experiment.methods for d in DESIGNS]
    assert heights == pytest.approx(wanted)
    colours = [to_hex(patch.get_facecolor()) for patch in shares.patches]
    assert len(set(colours)) == len(experiment.methods)
    for text, metric in (("Vendi score", "vendi"), ("CLIP score (cosine)", "clip")):
        means, dots = panels[text].lines[::2], panels[text].lines[1::2]
        for method, mean, own in zip(experiment.methods, means, dots, strict=True):
            values = of_row(long, method, metric)
            assert mean.get_ydata() == pytest.approx([values.mean()] * 2)
            assert own.get_ydata() == pytest.approx(values)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "pretrained, Vendi score 1.050 ± 0.071"
    assert labels[-1] == "each seed"
