"""Tables and costs of images, from made-up metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml

from flowtilt.domains.images.experiment import ImageExperiment
from flowtilt.domains.images.tables import findings, groups, note
from flowtilt.domains.images.tables import reported as with_reported
from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.base import beside
from flowtilt.pipeline.report.comparison import EFFECTS, LEVELS, comparison, read_reported
from flowtilt.pipeline.report.costs import cost_panel, costs_of
from flowtilt.pipeline.report.measurements import LONG_COLUMNS, ResultsError
from flowtilt.pipeline.report.panels import describe
from flowtilt.pipeline.report.tables import write_comparison, write_table
from made_up_images import (
    DESIGNS,
    ENTROPY,
    LEFT_TAIL,
    loaded,
    write_config,
    write_histories,
    write_metrics,
)
from small import CONFIG

REPORTED = CONFIG / "reported_results.csv"
Values = Mapping[str, Mapping[str, Sequence[float]]]

EXPLORED: Values = {
    "vendi": {
        "pretrained": [2.36, 2.36, 2.36],  # the reported value itself
        "am": [2.0, 2.1, 2.2],
        "fdc_alpha_32": [2.46, 2.66, 2.86],
        "fdc_alpha_16": [2.56, 2.76, 2.96],
        "fdc": [2.66, 2.86, 3.06],
    },
    "clip": {
        "pretrained": [0.3, 0.31, 0.32],
        "am": [0.4, 0.41, 0.42],
        "fdc_alpha_32": [0.3, 0.31, 0.32],
        "fdc_alpha_16": [0.31, 0.29, 0.32],
        "fdc": [0.29, 0.296, 0.309],
    },
    "mean_reward": {"pretrained": [0.3, 0.31, 0.32], "am": [0.4, 0.41, 0.42]},
    "designs_covered": {
        "pretrained": [3, 4, 4],
        "fdc_alpha_32": [4, 3, 4],
        "fdc_alpha_16": [4, 5, 5],
        "fdc": [5, 5, 5],
    },
    "effective_designs": {
        method: [level, level, level]
        for method, level in (("pretrained", 2.0), ("fdc_alpha_32", 2.0), ("fdc_alpha_16", 2.5), ("fdc", 4.0))
    },
}
TAILED: Values = {
    "left_cvar_0.2": {
        "pretrained": [0.10, 0.11, 0.12],
        "am": [0.13, 0.15, 0.14],
        "tfft": [0.15, 0.17, 0.18],
    },
    "left_cvar_0.1": {
        "pretrained": [0.05, 0.06, 0.07],
        "am": [0.09, 0.08, 0.07],
        "tfft_0.1": [0.07, 0.08, 0.09],
    },
    "left_cvar_0.5": {
        "pretrained": [0.2, 0.2, 0.2],
        "am": [0.25, 0.25, 0.25],
        "tfft_0.5": [0.23, 0.23, 0.23],
    },
    "mean_reward": {
        "pretrained": [0.3, 0.3, 0.3],
        "am": [0.34, 0.36, 0.38],
        "tfft": [0.31, 0.33, 0.35],
        "tfft_0.1": [0.32, 0.28, 0.3],
        "tfft_0.5": [0.36, 0.38, 0.4],
    },
    "active_share": {"tfft": [0.2, 0.25, 0.3], "tfft_0.1": [0.1, 0.0, 0.1], "tfft_0.5": [0.5, 0.5, 0.5]},
    "offline_active_share": {method: [0.25, 0.25, 0.25] for method in ("tfft", "tfft_0.1", "tfft_0.5")},
}


def frame(experiment: ImageExperiment, values: Values) -> pd.DataFrame:
    """Values by metric and method, one a seed, in long form."""
    lines = [
        (experiment.name, method, metric, seed, value)
        for metric, of in values.items()
        for method, own in of.items()
        for seed, value in enumerate(own)
    ]
    return pd.DataFrame(lines, columns=list(LONG_COLUMNS))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_metrics(tmp_path, loaded(ENTROPY), EXPLORED)
    write_metrics(tmp_path, loaded(LEFT_TAIL), TAILED)
    return tmp_path


# ----------------------------------------------------------------------- beside reported values


def test_scores_of_small_models_are_compared_by_what_they_gain(results: Path) -> None:
    write_table(write_config(results, ENTROPY), {}, results, REPORTED, results / "tables" / "entropy")
    table = pd.read_csv(results / "tables" / "entropy.csv").set_index(["metric", "row"])
    values, reported = table["value"].to_dict(), table["reported"].to_dict()
    assert values["vendi", "fdc"] == pytest.approx(2.86)
    assert reported["vendi", "fdc"] == 2.47
    # Ours is the reported value, which says nothing where its scale is another.
    assert values["vendi", "pretrained"] == reported["vendi", "pretrained"] == 2.36
    # Scores fall by .0117 with a deviation of .0021, where .03 are gained in the paper.
    assert table["verdict"].dropna().to_dict() == {
        ("vendi", "fdc"): "same direction",
        ("clip", "fdc"): "opposite direction",
    }
    text = (results / "tables" / "entropy.md").read_text()
    beside = "reported (fdc) | gain over pretrained | reported gain (fdc) | verdict"
    assert f"| Vendi score | {beside} | CLIP score (cosine) | {beside} |" in text
    assert EFFECTS in text
    assert LEVELS not in text


def test_the_papers_reward_stands_beside_ours(results: Path) -> None:
    write_table(write_config(results, LEFT_TAIL), {}, results, REPORTED, results / "tables" / "tail")
    table = pd.read_csv(results / "tables" / "tail.csv").set_index(["metric", "row"])
    reported = table.loc[table["source"] == "ftfc", "reported"]
    assert reported.to_dict() == {
        ("left_cvar_0.2", "pretrained"): -1.0,
        ("left_cvar_0.2", "am"): -0.5,
        ("left_cvar_0.2", "tfft"): -0.5,
        ("mean_reward", "pretrained"): 0.3,
        ("mean_reward", "am"): 0.7,
        ("mean_reward", "tfft"): 0.8,
    }
    # Gains of the tail are .03 and .057 with deviations of .01 and .006.
    assert table.loc["left_cvar_0.2"]["verdict"].dropna().tolist() == ["same direction"] * 2
    # Gains of the mean are .06 and .03, both with a deviation of .02: three seeds tell .05 from nothing.
    assert table.loc["mean_reward"]["verdict"].dropna().to_dict() == {
        "am": "same direction",
        "tfft": "not decided",
    }


def test_at_the_papers_scale_exploration_has_the_papers_levels() -> None:
    overrides = yaml.safe_load((CONFIG / "paper.yaml").read_text())["overrides"]
    small = loaded(ENTROPY)
    (large,) = load_file(CONFIG / "experiments" / f"{ENTROPY}.yaml", overrides).values()
    assert (small.same_as, large.same_as) == ([], ["fdc"])
    values = beside(read_reported(REPORTED), large)
    judged = comparison(frame(large, EXPLORED), values)
    found = judged[judged["metric"] == "vendi"].set_index("method")["verdict"]
    assert found["pretrained"] == "match"
    assert "large CLIP" in note(small)
    assert "large CLIP" not in note(large)


def test_the_comparison_takes_both_experiments(results: Path) -> None:
    files = [write_config(results, name) for name in (ENTROPY, LEFT_TAIL)]
    write_comparison(files, {}, results, REPORTED, results / "comparison.csv", results / "by_seed.csv")
    table = pd.read_csv(results / "comparison.csv")
    assert table.dropna(subset="reported").groupby("experiment").size().to_dict() == {
        "text_to_image_entropy": 4,
        "text_to_image_left_tail": 7,
    }
    assert set(table["verdict"].dropna()) == {"same direction", "opposite direction", "not decided"}


def test_reported_values_keep_their_lines() -> None:
    reported = read_reported(REPORTED)
    both = with_reported(with_reported(reported, loaded(ENTROPY)), loaded(LEFT_TAIL))
    pd.testing.assert_frame_equal(both.iloc[: len(reported)][reported.columns], reported)
    added = both.iloc[len(reported) :]
    theirs = reported.groupby("experiment").size()
    assert added.groupby("experiment").size().to_dict() == {
        "text_to_image_entropy": theirs["text_to_image_sd14"],
        "text_to_image_left_tail": theirs["text_to_image_sd15"],
    }


# --------------------------------------------------------------------------------- what holds


def test_what_exploration_does_is_said() -> None:
    experiment = loaded(ENTROPY)
    said = findings(frame(experiment, EXPLORED), experiment, read_reported(REPORTED))
    undecided = "not decided by these seeds"
    assert said == [
        "am raises the mean over pretrained: holds, by 0.1000 ± 0 reward (3 of 3 seeds).",
        # On three seeds 2.48 sd are the interval of a mean.
        f"fdc_alpha_32 raises the Vendi score over pretrained: {undecided}, by 0.30 ± 0.20 (3 of 3 seeds).",
        f"fdc_alpha_32 raises the designs covered over pretrained: {undecided}, by 0.0 ± 1.0 (1 of 3 seeds).",
        f"fdc_alpha_32 raises the effective number of designs over pretrained: {undecided}, by 0 ± 0 "
        "(0 of 3 seeds).",
        "fdc_alpha_32 does not lower the CLIP score of pretrained: holds, the difference is 0 ± 0 (not lower "
        "on 3 of 3 seeds).",
        f"fdc_alpha_16 raises the Vendi score over pretrained: {undecided}, by 0.40 ± 0.20 (3 of 3 seeds).",
        "fdc_alpha_16 raises the designs covered over pretrained: holds, by 1.000 ± 0 (3 of 3 seeds).",
        "fdc_alpha_16 raises the effective number of designs over pretrained: holds, by 0.5000 ± 0 "
        "(3 of 3 seeds).",
        f"fdc_alpha_16 does not lower the CLIP score of pretrained: {undecided}, the difference is "
        "-0.003 ± 0.015 (not lower on 2 of 3 seeds).",
        "fdc raises the Vendi score over pretrained: holds, by 0.50 ± 0.20 (3 of 3 seeds).",
        f"fdc raises the designs covered over pretrained: {undecided}, by 1.33 ± 0.58 (3 of 3 seeds).",
        "fdc raises the effective number of designs over pretrained: holds, by 2.000 ± 0 (3 of 3 seeds).",
        "fdc does not lower the CLIP score of pretrained: does not hold, the difference is "
        "-0.0117 ± 0.0021 (not lower on 0 of 3 seeds).",
        "The Vendi score rises as alpha falls: holds, with means fdc_alpha_32 2.660, fdc_alpha_16 2.760, "
        "fdc 2.860 (every step up on 3 of 3 seeds).",
    ]


@pytest.mark.parametrize(
    ("middle", "word", "count"),
    [
        ([2.56, 2.76, 2.96], "holds", 3),
        # Mean steps of 0.1 up, and each seed's on its own: sd 0.1, standard error 0.058.
        ([2.46, 2.76, 3.06], "not decided by these seeds", 1),
        ([2.76, 2.96, 3.16], "does not hold", 0),
        ([2.36, 2.56, 2.76], "does not hold", 0),
    ],
)
def test_the_order_by_alpha_needs_every_step(middle: list[float], word: str, count: int) -> None:
    experiment = loaded(ENTROPY)
    values = {**EXPLORED, "vendi": {**EXPLORED["vendi"], "fdc_alpha_16": middle}}
    said = findings(frame(experiment, values), experiment, read_reported(REPORTED))[-1]
    assert f"as alpha falls: {word}," in said
    assert f"on {count} of 3 seeds" in said


def test_combinations_are_said_where_factors_are_told() -> None:
    told = {"factors": [{"classes": ["by day", "at night"], "template": "a bridge {}"}]}
    experiment = loaded(ENTROPY, evaluation=told)
    covered = {"pretrained": [50.0, 52.5, 51.0], "fdc": [54.0, 55.5, 56.0]}
    values = {**EXPLORED, "combinations_covered": {**dict.fromkeys(EXPLORED["vendi"], [51.0] * 3), **covered}}
    said = findings(frame(experiment, values), experiment, read_reported(REPORTED))
    assert (
        "fdc raises the combinations covered over pretrained: holds, by 4.0 ± 1.0 (3 of 3 seeds)."
    ) in said
    assert "combinations_covered" in groups(experiment, "")[""]
    assert "Combinations are those of the design" in note(experiment)
    assert "means over 3 sets of 100 images" in note(loaded(ENTROPY, evaluation={"sets": 3}))
    assert not {"Combinations", "sets"} & set(note(loaded(ENTROPY)).split())
    assert "combinations_covered" not in groups(loaded(ENTROPY), "")[""]


def test_no_more_designs_than_there_are() -> None:
    experiment = loaded(ENTROPY)
    covered = {**EXPLORED["designs_covered"], "pretrained": [5, 5, 5]}
    values = {**EXPLORED, "designs_covered": covered}
    said = findings(frame(experiment, values), experiment, read_reported(REPORTED))
    assert (
        "fdc_alpha_32 cannot cover more designs than pretrained, which covers all 5 on every seed: it covers "
        "3.67 ± 0.58."
    ) in said
    assert not [line for line in said if "raises the designs covered" in line]


def test_what_the_left_tail_does_is_said() -> None:
    experiment = loaded(LEFT_TAIL)
    reported = with_reported(read_reported(REPORTED), experiment)
    said = findings(frame(experiment, TAILED), experiment, reported)
    undecided = "not decided by these seeds"
    assert said == [
        "am raises the mean over pretrained: holds, by 0.060 ± 0.020 reward (3 of 3 seeds).",
        "tfft raises the worst-20 % mean over pretrained: holds, by 0.0567 ± 0.0058 reward (3 of 3 seeds).",
        f"tfft raises the worst-20 % mean over am: {undecided}, by 0.027 ± 0.012 reward (3 of 3 seeds).",
        f"tfft raises the mean over pretrained: {undecided}, by 0.030 ± 0.020 reward (3 of 3 seeds).",
        "The mean of tfft against that of am: lower, the difference is -0.03000 ± 0 reward (higher on 0 of "
        "3 seeds).",
        "tfft is trained on active samples: holds, a share of 0.250 ± 0.050 in training and of 0.2500 ± 0 "
        "offline (above zero on 3 of 3 seeds).",
        "tfft_0.1 raises the worst-10 % mean over pretrained: holds, by 0.02000 ± 0 reward (3 of 3 seeds).",
        f"tfft_0.1 raises the worst-10 % mean over am: {undecided}, by 0.000 ± 0.020 reward (1 of 3 seeds).",
        f"tfft_0.1 raises the mean over pretrained: {undecided}, by 0.000 ± 0.020 reward (1 of 3 seeds).",
        f"The mean of tfft_0.1 against that of am: {undecided}, the difference is -0.060 ± 0.035 reward "
        "(higher on 0 of 3 seeds).",
        "tfft_0.1 is trained on active samples: does not hold, a share of 0.067 ± 0.058 in training and of "
        "0.2500 ± 0 offline (above zero on 2 of 3 seeds).",
        "tfft_0.5 raises the worst-50 % mean over pretrained: holds, by 0.03000 ± 0 reward (3 of 3 seeds).",
        "tfft_0.5 raises the worst-50 % mean over am: does not hold, by -0.02000 ± 0 reward (0 of 3 seeds).",
        "tfft_0.5 raises the mean over pretrained: holds, by 0.080 ± 0.020 reward (3 of 3 seeds).",
        "The mean of tfft_0.5 against that of am: higher, the difference is 0.02000 ± 0 reward (higher on 3 "
        "of 3 seeds).",
        "tfft_0.5 is trained on active samples: holds, a share of 0.5000 ± 0 in training and of 0.2500 ± 0 "
        "offline (above zero on 3 of 3 seeds).",
        "ftfc reports A100 days of training, 3.4 for am, 2.8 for tfft; what ours took is in the table of "
        "costs.",
    ]


def test_columns_of_the_tables() -> None:
    entropy, tail = groups(loaded(ENTROPY), "main"), groups(loaded(LEFT_TAIL), "main")
    assert entropy["main"] == ["vendi", "clip", "designs_covered", "effective_designs"]
    # The reward is the CLIP score, which would be there twice.
    assert tail["main"] == [
        *("left_cvar_0.2", "mean_reward", "left_cvar_0.1", "left_cvar_0.5"),
        *("vendi", "vendi_of_a_prompt", "designs_covered", "effective_designs"),
    ]
    assert entropy["Shares of the designs"] == [f"share_{name}" for name in DESIGNS]
    plain = groups(loaded(LEFT_TAIL, evaluation={"designs": []}), "main")
    assert plain["main"][-2:] == ["vendi", "vendi_of_a_prompt"]
    assert plain["Shares of the designs"] == []
    weights = {"path": "weights.safetensors"}
    rewarded = groups(loaded(LEFT_TAIL, reward={"kind": "image_reward", "weights": weights}), "main")
    assert "clip" in rewarded["main"]


def test_words_of_metrics() -> None:
    assert describe("left_cvar_0.2").header == "worst-20 % mean (reward)"
    assert describe("left_cvar_0.05").words == "worst-5 % mean"
    assert describe("share_cable-stayed").header == "cable-stayed (share)"
    assert describe("active_share").words == "active samples"
    assert describe("vendi").header == "Vendi score"


# -------------------------------------------------------------------------------------- costs


def benchmark(results: Path, job: str, seconds: float) -> None:
    file = results / "benchmarks" / f"{job}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"s\tmax_rss\n{seconds}\t700\n")


@pytest.mark.parametrize(("scale", "of_a_state"), [(1.0, 1), (3.0, 2)])
def test_passes_of_tfft_include_its_offline_batch(tmp_path: Path, scale: float, of_a_state: int) -> None:
    experiment = loaded(
        LEFT_TAIL, seeds=2, guidance={"sampling": scale}, offline={"samples": 100}, solver={"steps": 10}
    )
    write_histories(tmp_path, experiment, {"am": 1000, "tfft": 600})
    for seed, more in ((0, 0.0), (1, 2.0)):
        for method, seconds in (("am", 100.0), ("tfft", 90.0)):
            benchmark(
                tmp_path, f"images_finetune/text_to_image_left_tail/{method}/seed{seed}", seconds + more
            )
            benchmark(tmp_path, f"images_sample/text_to_image_left_tail/{method}/seed{seed}", 30.0)
            benchmark(tmp_path, f"images_evaluate/text_to_image_left_tail/{method}/seed{seed}", 5.0)
        benchmark(tmp_path, f"images_offline/text_to_image_left_tail/seed{seed}", 20.0)
        benchmark(tmp_path, f"images_threshold/text_to_image_left_tail/tfft/seed{seed}", 1.0)
    lines = {line.method: line for line in costs_of(tmp_path / "benchmarks", [experiment])}
    am, tfft = lines["am"], lines["tfft"]
    assert (am.finetune, am.passes, am.relative_passes, am.assess) == (101.0, 2000.0, 1.0, 35.0)
    assert (tfft.batch, tfft.threshold) == (20.0, 1.0)
    assert tfft.relative == pytest.approx((91 + 21) / 101)
    assert tfft.passes == 1200 + 100 * 10 * of_a_state
    assert tfft.relative_passes == tfft.passes / 2000
    assert (am.updates, lines["pretrained"].updates) == (experiment.solver.updates, 0)
    assert math.isnan(lines["pretrained"].passes)
    assert math.isnan(lines["tfft_0.1"].passes)  # there is no history of it
    panel = cost_panel(list(lines.values()), "Costs")
    at = panel.header.index("thousand network passes")
    assert [line[at] for line in panel.lines] == ["", "2.000", f"{tfft.passes / 1000:.3f}", "", ""]


def test_passes_of_every_iteration_are_counted(tmp_path: Path) -> None:
    experiment = loaded(ENTROPY)
    write_histories(tmp_path, experiment, {"am": 1000, "fdc": 400})
    lines = {line.method: line for line in costs_of(tmp_path / "benchmarks", [experiment])}
    assert lines["fdc"].passes == 2 * 800
    assert lines["fdc"].updates == 2 * 15
    history = tmp_path / "runs/text_to_image_entropy/fdc/seed0/history.csv"
    history.write_text("update,seconds\n0,1\n")
    with pytest.raises(ResultsError, match="no column network_passes"):
        costs_of(tmp_path / "benchmarks", [experiment])
