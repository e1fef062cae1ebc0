"""Metrics of runs in long form: which rows there are, how they are read, and their statistics.

A method has three rows, one a solution: its network's, the exact one, and the one at finite
resolution. Everything is read from the ``metrics.json`` files under a results folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

if TYPE_CHECKING:
    from flowtilt.pipeline.experiment import Experiment
from flowtilt.files import one_line, read_json, read_npz, read_text
from flowtilt.pipeline.sections import KEPT, TUNED

SOLUTIONS = ("network", "exact", "resolved")
_WORDS = {"network": "", "exact": ", exact", "resolved": ", at finite resolution", "optimum": ", optimum"}
LONG_COLUMNS = ("experiment", "method", "metric", "seed", "value")
SUMMARY_COLUMNS = ("experiment", "method", "metric", "value", "sd", "seeds")


class ResultsError(ValueError):
    """Results or reported values that cannot be used; the message names the file and the fix."""


@dataclass(frozen=True)
class Method:
    """A method of an experiment.

    Attributes:
        kind: of it, as its configuration has it.
        value: where it stands on a study's axis, if the methods of one case differ in that.
    """

    name: str
    kind: str
    value: float | None = None


@dataclass(frozen=True)
class Runs:
    """What the tables and figures need to know of one experiment, or of one case of a study.

    Attributes:
        methods: in the order of the tables.
        seeds: every one of them must have been run.
        unit: ``cost`` or ``reward``, what the landscape's height is.
        mass: probability of the tail that the methods look at; 1 if they look at all of the distribution.
        tail_metric: name of the mean over that tail, or of another metric that the tables lead with.
        value: where a case stands on its study's axis, if the cases differ in that.
        solutions: of each method, the network's first.
        solved_apart: whether the other solutions have folders of their own, for all methods together.
    """

    name: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    unit: str
    mass: float
    tail_metric: str
    title: str = ""
    of: str = ""
    value: float | None = None
    solutions: tuple[str, ...] = SOLUTIONS
    solved_apart: bool = True

    @property
    def mean_metric(self) -> str:
        """Name of the plain mean."""
        return f"mean_{self.unit}"

    @property
    def has_tail(self) -> bool:
        """Whether the experiment is on a tail of the reward."""
        return self.mass < 1

    @property
    def sign(self) -> int:
        """Of the reward against the landscape's height: -1 for a cost."""
        return -1 if self.unit == "cost" else 1

    def position(self, method: Method) -> float | None:
        """Where a method's rows stand on the study's axis; None for a line of reference."""
        return self.value if method.value is None else method.value


def runs_of(experiment: Experiment) -> Runs:
    """The part of a configured experiment or case that tables and figures need. In a case without an axis
    value of its own, FDC methods stand at their number of iterations."""
    by_iterations = experiment.axis_value is None
    return Runs(
        name=experiment.name,
        methods=tuple(
            Method(name, m.kind, float(m.iterations) if by_iterations and m.iterations else None)
            for name, m in experiment.methods.items()
        ),
        seeds=tuple(experiment.seeds),
        unit=experiment.unit,
        mass=experiment.mass,
        tail_metric=experiment.main_metric,
        solutions=experiment.solutions,
        solved_apart=experiment.solved_apart,
        title=experiment.title,
        of=experiment.starts_from,
        value=experiment.axis_value,
    )


def models_of(experiment: Experiment) -> Runs:
    """The same without methods that keep samples of the pretrained model: what figures show."""
    runs = runs_of(experiment)
    return replace(runs, methods=tuple(m for m in runs.methods if m.kind not in KEPT))


# ------------------------------------------------------------------------------- reading


def row_name(method: str, solution: str) -> str:
    """``am`` and ``exact`` give ``am_exact``; a network's row has the method's own name."""
    return method if solution == "network" else f"{method}_{solution}"


def split_row(row: str) -> tuple[str, str]:
    """The method and the solution of a row's name."""
    for solution in tuple(_WORDS)[1:]:
        if row.endswith(f"_{solution}"):
            return row.removesuffix(f"_{solution}"), solution
    return row, "network"


def row_words(row: str) -> str:
    """``am_exact`` as ``am, exact``."""
    method, solution = split_row(row)
    return method + _WORDS[solution]


def run_folder(results: str | Path, runs: Runs, method: str, solution: str, seed: int) -> Path:
    """Where the files of a row's run are kept."""
    own = solution == "network" or not runs.solved_apart
    return Path(results) / "runs" / runs.name / (method if own else solution) / f"seed{seed}"


def collect(results: str | Path, runs: Runs) -> pd.DataFrame:
    """All metrics of an experiment or case in long form.

    Args:
        runs: of which every one must have been run; of those that are fine-tuned every row must be there.

    Returns:
        Columns :data:`LONG_COLUMNS`, ``method`` being the row's name; the rows of a method follow
        each other. A metric that was recorded as undefined (null) has the value NaN.

    Raises:
        ResultsError: if a file is missing or malformed; the message says how to make it.
    """
    records: list[tuple[str, str, str, int, float]] = []
    for method, kind in ((m.name, m.kind) for m in runs.methods):
        for solution in runs.solutions:
            row = row_name(method, solution)
            for seed in runs.seeds:
                path = run_folder(results, runs, method, solution, seed) / "metrics.json"
                rows = read_metrics(path)
                if row in rows:
                    records += [(runs.name, row, metric, seed, value) for metric, value in rows[row].items()]
                elif kind in TUNED or solution == "network":
                    raise ResultsError(f"{path}: no row {row!r}, only {', '.join(rows)}; {again(path)}")
    return _long(records)


def collect_runs(results: str | Path, runs: Iterable[Runs]) -> pd.DataFrame:
    """:func:`collect` for several experiments and cases."""
    return pd.concat([collect(results, each) for each in runs], ignore_index=True)


def read_by_seed(path: str | Path) -> pd.DataFrame:
    """Every metric of every row and seed, as :func:`collect_runs` has them, from a file of an earlier run.
    Raises ResultsError if it is not such a file."""
    try:
        frame = pd.read_csv(StringIO(read_text(path)), dtype=str)  # numbers are then read exactly
        return frame[list(LONG_COLUMNS)].astype({"value": float, "seed": int})
    except (OSError, KeyError, ValueError) as error:
        raise ResultsError(
            f"{path}: not a table of metrics by seed ({one_line(error)}); name the by_seed.csv of a run"
        ) from None


def _long(records: Sequence[tuple[str, str, str, int, float]]) -> pd.DataFrame:
    return pd.DataFrame(records, columns=list(LONG_COLUMNS)).astype({"value": float, "seed": int})


def read_metrics(path: Path) -> dict[str, dict[str, float]]:
    """The rows of one metrics file; null becomes NaN. Raises ResultsError if the file is missing or
    malformed."""
    if not path.is_file():
        raise ResultsError(missing(path))
    try:
        data = read_json(path)
        return {
            str(row): {str(metric): _number(metric, value) for metric, value in metrics.items()}
            for row, metrics in data["rows"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        shape = '{"rows": {row: {metric: number or null}}}'
        raise ResultsError(f"{path}: not of the form {shape} ({one_line(error)}); {again(path)}") from None


def missing(path: Path) -> str:
    return f"{path}: no such file; make it with `snakemake --cores all {path}`"


def again(path: Path) -> str:
    return f"make it again with `snakemake --cores all --force {path}`"


def _number(metric: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{metric} is {value!r}, not a number")
    return float(value)


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV table as text, checked for columns that it must have. Raises ResultsError if it is missing, no
    table, or lacks a column."""
    if not path.is_file():
        raise ResultsError(f"{path}: no such file; restore it, or make it again")
    try:
        table = pd.read_csv(StringIO(read_text(path)), dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ResultsError(
            f"{path}: not a CSV table ({one_line(error)}); restore it, or make it again"
        ) from None
    if absent := [c for c in columns if c not in table.columns]:
        raise ResultsError(
            f"{path}: no column {', '.join(absent)}, only {', '.join(map(str, table.columns))}; "
            "restore it, or make it again"
        )
    return table


def read_history(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A run's history, a line an update, as numbers. Raises ResultsError if it is missing or malformed."""
    if not path.is_file():
        raise ResultsError(missing(path))
    table = read_csv(path, columns)
    try:
        return table.astype(float)
    except ValueError as error:
        raise ResultsError(f"{path}: not a history ({one_line(error)}); {again(path)}") from None


def totals_of(history: pd.DataFrame, *columns: str) -> pd.Series:
    """What a run's history counts: within a solve counts are cumulative, and those of solves add up."""
    solve = history["iteration"] if "iteration" in history else pd.Series(0, index=history.index)
    return history.groupby(solve)[list(columns)].max().sum()


# -------------------------------------------------------------------------------- arrays


def read_arrays(path: Path, *needed: str) -> dict[str, np.ndarray]:
    """All arrays of an npz file by name. Raises ResultsError if it is missing, not whole, or lacks an array
    that is needed."""
    if not path.is_file():
        raise ResultsError(missing(path))
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ResultsError(f"{path}: {error}; {again(path)}") from None
    if absent := {*needed} - arrays.keys():
        raise ResultsError(f"{path}: no array {', '.join(sorted(absent))}; {again(path)}")
    return arrays


# ---------------------------------------------------------------------------- statistics


def mean_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


CONFIDENCE = 0.95
"""Of the interval of a mean over seeds that whatever is decided has to rest on."""

TEST = f"by Student's t over paired seeds, {100 * CONFIDENCE:g} %"
"""How a difference is decided, in words: the test of every verdict and every sentence."""


def half_width(values: np.ndarray) -> float:
    """Of the interval of the mean over seeds by Student's t; infinite for less than two.

    Args:
        values: one a seed, (seeds,).
    """
    if len(values) < 2:
        return math.inf
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return quantile * mean_sd(values)[1] / math.sqrt(len(values))


def sign(values: np.ndarray) -> int:
    """The sign of a mean over seeds, or 0 where its interval holds 0.

    Args:
        values: one a seed, (seeds,). With one seed, or an undefined value, nothing is decided.
    """
    mean = float(values.mean())
    return int(np.sign(mean)) if abs(mean) > half_width(values) else 0


class Entry(NamedTuple):
    """One metric of one row over its seeds."""

    experiment: str
    row: str
    metric: str
    value: float
    sd: float
    seeds: int


def entries(summary: pd.DataFrame) -> list[Entry]:
    """The lines of a summary with types; see :func:`summarise`."""
    return [
        Entry(str(experiment), str(row), str(metric), float(value), float(sd), int(seeds))
        for experiment, row, metric, value, sd, seeds in summary[list(SUMMARY_COLUMNS)].itertuples(
            index=False
        )
    ]


def by_row(long: pd.DataFrame, metric: str) -> dict[tuple[str, str, int], float]:
    """One metric by experiment, row and seed."""
    chosen = long[long["metric"] == metric]
    return {
        (str(experiment), str(row), int(seed)): float(value)
        for experiment, row, _, seed, value in chosen[list(LONG_COLUMNS)].itertuples(index=False)
    }


def of_row(long: pd.DataFrame, row: str, metric: str) -> np.ndarray:
    """One metric of one row of an experiment by rising seed, (seeds,)."""
    found = {seed: value for (_, name, seed), value in by_row(long, metric).items() if name == row}
    return np.array([found[seed] for seed in sorted(found)])


def summarise(long: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of seeds of every metric of every row.

    Returns:
        Columns :data:`SUMMARY_COLUMNS`. The sd of one seed is NaN; a metric that is undefined on
        any seed is NaN, so that a failure is not averaged away.
    """
    groups = long.groupby(["experiment", "method", "metric"], sort=False)["value"]
    summary = groups.agg(
        value=lambda v: mean_sd(v.to_numpy())[0], sd=lambda v: mean_sd(v.to_numpy())[1], seeds="size"
    )
    return summary.reset_index()[list(SUMMARY_COLUMNS)]


def with_gaps(long: pd.DataFrame) -> pd.DataFrame:
    """A long frame with what rows miss of their solved ones, by the same method and seed.

    For tails the metrics ``gap`` and ``relative_gap`` are added to every row but the exact. ``gap`` is
    the objective of the method's exact row less that of the row, on the same seed:
    positive where the row is the worse one. ``relative_gap`` is the same in percent of the size of
    the exact objective. For functionals ``gap_closed`` is added to networks' and exact rows: of the
    difference between the optimum and the pretrained distribution, the share in percent that the row reaches.
    """
    objective = by_row(long, "objective")
    added: list[tuple[str, str, str, int, float]] = []
    reached, before = by_row(long, "functional"), by_row(long, "functional_before")
    for (experiment, row, seed), value in reached.items():
        method, solution = split_row(row)
        key = (experiment, row_name(method, "optimum"), seed)
        if key in reached and solution != "optimum":
            whole = reached[key] - before[key]
            share = 100 * (value - before[key]) / whole if whole > 0 else math.nan
            added.append((experiment, row, "gap_closed", seed, share))
    for (experiment, row, seed), value in objective.items():
        method, solution = split_row(row)
        exact = objective.get((experiment, row_name(method, "exact"), seed))
        if exact is not None and solution != "exact":
            gap = exact - value
            added.append((experiment, row, "gap", seed, gap))
            added.append(
                (experiment, row, "relative_gap", seed, 100 * gap / abs(exact) if exact else math.nan)
            )
    return pd.concat([long, _long(added)], ignore_index=True) if added else long
