"""Verdicts on made-up values: what seeds support, and what they leave open."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from flowtilt.pipeline.experiment import load_file
from flowtilt.pipeline.report.base import beside
from flowtilt.pipeline.report.comparison import (
    COMPARISON_COLUMNS,
    EFFECTS,
    LEVELS,
    comparison,
    effect_verdict,
    level_verdict,
    read_reported,
    reported_columns,
    sign,
    verdict_note,
)
from flowtilt.pipeline.report.measurements import LONG_COLUMNS
from small import CONFIG

REPORTED = CONFIG / "reported_results.csv"

numbers = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))
seeds = st.lists(numbers, min_size=3, max_size=3).map(np.array)
pairs = st.lists(st.tuples(seeds, numbers), max_size=4)


def spread(mean: float, sd: float, count: int = 3) -> np.ndarray:
    """Values of a mean and a standard deviation, (count,)."""
    found = np.linspace(-1.0, 1.0, count)
    return mean + sd * found / found.std(ddof=1)


@given(seeds)
def test_a_mean_has_a_sign_where_a_t_test_says_so(values: np.ndarray) -> None:
    """Against scipy's test of one sample."""
    assume(values.std() > 0)
    p = stats.ttest_1samp(values, 0.0).pvalue
    assume(abs(p - 0.05) > 1e-9)
    assert sign(values) == (int(np.sign(values.mean())) if p < 0.05 else 0)


def test_one_seed_decides_nothing() -> None:
    assert sign(np.array([3.0])) == 0
    assert sign(np.array([3.0, math.nan, 3.0])) == 0


# ---------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("mean", "sd", "reported", "others", "expected"),
    [
        (110.0, 0.0, 100.0, [], "match"),  # exactly 10 %
        (-110.0, 0.0, -100.0, [], "match"),
        (110.1, 0.0, 100.0, [], "differs"),
        (120.0, 10.0, 100.0, [], "match"),  # exactly 2 sd
        (120.1, 10.0, 100.0, [], "not decided"),  # the interval, 24.8 at each side, reaches what matches
        (145.0, 10.0, 100.0, [], "differs"),
        (150.0, 1.0, 100.0, [(spread(200, 1), 110.0)], "same ordering"),
        (150.0, 1.0, 100.0, [(spread(140, 1), 110.0)], "differs"),
        (150.0, 1.0, 100.0, [(spread(200, 1), 110.0), (spread(90, 1), 50.0)], "same ordering"),
        (150.0, 1.0, 100.0, [(spread(200, 1), 110.0), (spread(160, 1), 50.0)], "differs"),
        (150.0, 1.0, 100.0, [(spread(151, -1), 110.0)], "not decided"),  # seeds differ by more than that
        (150.0, 1.0, 100.0, [(spread(151, 1), 110.0)], "same ordering"),  # the same seeds, all one apart
        (150.0, 1.0, 100.0, [(spread(150, 1), 110.0)], "not decided"),  # ours tie, theirs do not
        (150.0, 1.0, 100.0, [(spread(90, 1), 100.0)], "differs"),  # theirs tie: no order to share
        (math.nan, 1.0, 100.0, [(spread(200, 1), 110.0)], "not decided"),
        (0.0, 0.0, 0.0, [], "match"),
    ],
)
def test_levels(
    mean: float, sd: float, reported: float, others: list[tuple[np.ndarray, float]], expected: str
) -> None:
    assert level_verdict(spread(mean, sd), reported, others) == expected


@given(seeds, numbers, pairs, st.integers(-8, 8))
def test_a_verdict_does_not_depend_on_the_unit(
    values: np.ndarray, reported: float, others: list[tuple[np.ndarray, float]], power: int
) -> None:
    scale = 2.0**power
    scaled = [(scale * a, scale * b) for a, b in others]
    assert level_verdict(scale * values, scale * reported, scaled) == level_verdict(values, reported, others)


@given(seeds, numbers, pairs)
def test_a_verdict_is_the_same_for_a_cost_and_its_reward(
    values: np.ndarray, reported: float, others: list[tuple[np.ndarray, float]]
) -> None:
    mirrored = [(-a, -b) for a, b in others]
    assert level_verdict(-values, -reported, mirrored) == level_verdict(values, reported, others)


@given(seeds, numbers, pairs, st.randoms())
def test_a_verdict_does_not_depend_on_the_order_of_the_others(
    values: np.ndarray, reported: float, others: list[tuple[np.ndarray, float]], random: object
) -> None:
    mixed = list(others)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert level_verdict(values, reported, mixed) == level_verdict(values, reported, others)


@given(seeds, numbers, pairs)
def test_values_that_rise_with_the_reported_ones_never_differ(
    values: np.ndarray, reported: float, others: list[tuple[np.ndarray, float]]
) -> None:
    rising = [(values + 3 * (theirs - reported), theirs) for _, theirs in others]
    assume(any(theirs != reported for _, theirs in rising))
    assert level_verdict(values, reported, rising) != "differs"


def test_a_rerun_within_the_spread_never_turns_a_verdict_into_its_opposite() -> None:
    """Validity of four models on three seeds, drawn again two thousand times from the spread of the first."""
    theirs = {"pretrained": 96.4, "am": 96.4, "fdc": 95.1, "tfft": 94.2}
    means = {"pretrained": 62.8, "am": 62.5, "fdc": 62.1, "tfft": 62.8}
    generator = np.random.default_rng(1)
    drawn = {name: generator.normal(mean, 0.7, (2000, 3)) for name, mean in means.items()}
    for method in ("am", "fdc", "tfft"):
        found = [
            effect_verdict(drawn[method][i] - drawn["pretrained"][i], theirs[method] - 96.4, math.nan)
            for i in range(2000)
        ]
        # A test at 95 % is wrong on either side once in forty.
        assert found.count("opposite direction") < 2000 * 0.06
        assert found.count("not decided") > 2000 * 0.8


# --------------------------------------------------------------------------------- effects


@pytest.mark.parametrize(
    ("gain", "sd", "reported", "uncertainty", "expected"),
    [
        (2.0, 0.5, 10.0, math.nan, "same direction"),
        (2.0, 0.5, -10.0, math.nan, "opposite direction"),
        (-2.0, 0.5, -0.1, math.nan, "same direction"),
        (2.0, 1.0, 10.0, math.nan, "not decided"),  # 2.48 sd are the interval of three seeds
        (2.0, 0.5, 0.0, math.nan, "not decided"),
        (2.0, 0.5, 1.0, 0.5, "not decided"),  # no more than two of theirs
        (2.0, 0.5, 1.1, 0.5, "same direction"),
        (math.nan, 0.5, 1.0, math.nan, "not decided"),
    ],
)
def test_effects(gain: float, sd: float, reported: float, uncertainty: float, expected: str) -> None:
    assert effect_verdict(spread(gain, sd), reported, uncertainty) == expected


# ------------------------------------------------------------------------------ the frame

LINES = (("pretrained", (10.0, 11.0, 12.0)), ("am", (12.0, 13.5, 14.0)), ("fdc", (18.0, 19.0, 20.5)))


def long_frame() -> pd.DataFrame:
    lines = [
        ("e", method, "kl", seed, value) for method, values in LINES for seed, value in enumerate(values)
    ]
    lines += [("e", "am_exact", "kl", seed, 1.0) for seed in range(3)]
    return pd.DataFrame(lines, columns=list(LONG_COLUMNS))


def reported_frame(*lines: tuple[str, str, float, float], same: bool = False) -> pd.DataFrame:
    """Reported values from (source, method, value, uncertainty)."""
    names = ["source", "method", "value", "uncertainty"]
    frame = pd.DataFrame(lines, columns=names)
    return frame.assign(experiment="e", metric="kl", unit="nats", same=same)


THEIRS = (("a", "pretrained", 100.0, 3.0), ("a", "am", 90.0, 4.0), ("a", "ftfc", 1.0, math.nan))


def test_gains_are_taken_seed_by_seed() -> None:
    frame = comparison(long_frame(), reported_frame(*THEIRS))
    assert list(frame.columns) == list(COMPARISON_COLUMNS)
    assert list(zip(frame["method"], frame["source"], strict=True)) == [
        ("pretrained", "a"),
        ("am", "a"),
        ("fdc", "flowtilt"),
        ("am_exact", "flowtilt"),
    ]
    pretrained, am, fdc, exact = frame.itertuples(index=False)
    assert (am.baseline, am.verdict) == ("pretrained", "not decided")  # theirs are two deviations of 5
    assert am.gain == pytest.approx((2.0 + 2.5 + 2.0) / 3)
    assert am.gain_sd == pytest.approx(np.std([2.0, 2.5, 2.0], ddof=1))
    assert (am.reported_gain, am.reported_gain_sd) == (-10.0, 5.0)
    assert (pretrained.verdict, pretrained.reported, fdc.verdict, exact.verdict) == ("", 100.0, "", "")


def test_without_a_pretrained_value_gains_are_over_am() -> None:
    lines = [("a", "am", 5.0, math.nan), ("a", "fdc", 3.0, math.nan)]
    frame = comparison(long_frame(), reported_frame(*lines)).set_index("method")
    assert frame.loc["fdc", "baseline"] == "am"
    assert frame.loc["fdc", "verdict"] == "opposite direction"
    assert frame.loc["am", "verdict"] == ""


def test_levels_are_compared_where_they_are_the_same() -> None:
    lines = [("a", "pretrained", 11.0, math.nan), ("a", "am", 9.0, math.nan)]
    frame = comparison(long_frame(), reported_frame(*lines, same=True)).set_index("method")
    assert frame["verdict"].to_dict() == {
        "pretrained": "match",
        "am": "not decided",  # 13.17 with an interval of 2.6 at each side, and 0.9 or two sd allowed
        "fdc": "",
        "am_exact": "",
    }
    assert frame["gain"].isna().all()
    assert verdict_note(frame) == LEVELS


def test_columns_beside_ours() -> None:
    frame = comparison(long_frame(), reported_frame(*THEIRS[:2], ("b", "pretrained", 7.0, math.nan)))
    assert verdict_note(frame) == EFFECTS
    assert reported_columns(frame) == {
        "kl": [
            ("reported (a)", {"pretrained": "100", "am": "90"}),
            ("gain over pretrained", {"am": "2.17 ± 0.29"}),
            ("reported gain (a)", {"am": "-10 ± 5"}),
            ("verdict", {"am": "not decided"}),
        ]
    }


# -------------------------------------------------------------------------- the project's own


def test_an_experiment_says_of_which_sources_it_has_the_levels() -> None:
    (experiment,) = load_file(CONFIG / "experiments" / "entropy_2d.yaml", {}).values()
    values = read_reported(REPORTED)
    assert not beside(values, experiment)["same"].any()
    (alike,) = load_file(
        CONFIG / "experiments" / "entropy_2d.yaml", {"planar": {"same_as": ["fdc"]}}
    ).values()
    marked = beside(values, alike)
    assert set(marked.loc[marked["same"], "experiment"]) == {"entropy_2d"}
    # Another experiment's lines keep theirs.
    assert beside(marked, experiment)["same"].equals(marked["same"])


def test_no_committed_verdict_is_on_levels_of_another_problem() -> None:
    table = pd.read_csv(Path(CONFIG).parent / "results" / "tables" / "comparison.csv")
    judged = table[table["verdict"].notna()]
    assert len(judged) > 20
    assert judged["baseline"].notna().all()
    assert set(judged["verdict"]) <= {"same direction", "opposite direction", "not decided"}
