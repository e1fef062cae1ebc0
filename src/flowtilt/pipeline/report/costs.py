"""What the runs cost: wall time and memory, from the benchmarks that Snakemake writes beside them.

A job's benchmark is ``{benchmarks}/{domain}_{stage}/{experiment}/{method}/seed{n}.tsv``, and that of all runs
of a file ``{benchmarks}/{domain}_{stage}_{file}/{file}/seed{n}.tsv``. Results that were made without one, by
another copy or by hand, leave cells empty; nothing is run again for them. Network passes are counted too,
from the runs' histories, where the domain counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from flowtilt.files import read_text
from flowtilt.pipeline.domain import Run, domain_of
from flowtilt.pipeline.experiment import Experiment, load_file, read_study
from flowtilt.pipeline.report.measurements import ResultsError, mean_sd, read_history, read_metrics, totals_of
from flowtilt.pipeline.report.panels import Panel, over_seeds, pretty
from flowtilt.pipeline.report.tables import write_panels
from flowtilt.pipeline.rules import benchmark_of
from flowtilt.pipeline.sections import KEPT, TUNED

TOTAL_COLUMNS = ["rule", "jobs", "wall_seconds", "peak_memory_mb"]


class Measured(NamedTuple):
    """Wall time and memory of one job; the mean time and the largest memory if it was repeated.

    ``memory`` is the largest resident set in MB, NaN for a job that ended before it was looked at.
    """

    seconds: float
    memory: float


def read_benchmark(file: Path) -> list[Measured]:
    """The lines of one of Snakemake's benchmark files, one a repetition. Raises ResultsError, naming the file
    and the fix, if it is not such a file."""
    try:
        table = pd.read_csv(StringIO(read_text(file)), sep="\t", na_values="-", dtype=str)
        columns = [pd.to_numeric(table[column]).astype(float) for column in ("s", "max_rss")]
    except KeyError as error:
        raise _malformed(file, f"has no column {error}") from None
    except (ValueError, OSError) as error:
        raise _malformed(file, str(error)) from None
    lines = [Measured(*line) for line in zip(*columns, strict=True)]
    if not lines:
        raise _malformed(file, "has no line of numbers")
    if not all(math.isfinite(line.seconds) and line.seconds >= 0 for line in lines):
        raise _malformed(file, "column s must be seconds, finite and not negative")
    return lines


def _malformed(file: Path, what: str) -> ResultsError:
    return ResultsError(
        f"{file}: not a benchmark of Snakemake: {' '.join(what.split())}; delete it, which leaves its "
        "job out of the table of costs, or run the job again"
    )


def stage_costs(benchmarks: Path) -> dict[str, dict[str, float]]:
    """Jobs, wall time in seconds and peak memory in MB of each stage, from Snakemake's benchmarks. Raises
    ResultsError if a benchmark is malformed."""
    costs = {}
    for folder in sorted(p for p in benchmarks.iterdir() if p.is_dir()) if benchmarks.is_dir() else []:
        jobs = [line for file in sorted(folder.rglob("*.tsv")) for line in read_benchmark(file)]
        if not jobs:
            continue  # of the job that is running this
        costs[folder.name] = {
            "jobs": len(jobs),
            "wall_seconds": round(sum(job.seconds for job in jobs), 1),
            "peak_memory_mb": round(max((j.memory for j in jobs if math.isfinite(j.memory)), default=0.0), 1),
        }
    return costs


def added_costs(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Costs of stages in two runs together: jobs and times add up, of memory the larger counts."""
    total = {stage: dict(costs) for stage, costs in first.items()}
    for stage, costs in second.items():
        known = total.setdefault(stage, {})
        for key, value in costs.items():
            before = known.get(key, 0)
            known[key] = max(before, value) if key == "peak_memory_mb" else round(before + value, 1)
    return total


def measured_job(benchmarks: Path, job: str) -> Measured | None:
    """What one job took, or None if it has no benchmark; ``job`` is the file's path without its ending."""
    file = benchmarks / f"{job}.tsv"
    if not file.is_file():
        return None
    lines = read_benchmark(file)
    seconds, memory = (np.array(column) for column in zip(*lines, strict=True))
    return Measured(float(seconds.mean()), float(memory.max()))


class Cost(NamedTuple):
    """What one method of an experiment or case cost; means over seeds in seconds, NaN where not measured.

    ``seeds`` are those whose fine-tuning was measured, or of a method without one whose samples were;
    ``updates`` the optimiser steps of the fine-tuning, without those of a run that it continues, and of
    annealed fitting, whose stages are as many as it takes, the mean over its histories once there are any.
    ``memory`` is its largest in MB. ``batch`` is the offline batch, for a method that takes it (it is one for
    all of them), and ``threshold`` of a tfft the solution of the dual on it. ``alone`` is threshold and
    fine-tuning over those of the first method of the file that is fine-tuned, and ``relative`` the same with
    the batch. ``passes`` are network passes of the fine-tuning and of the batch it takes, counted and not
    timed (see :mod:`flowtilt.control.base`); NaN in a domain that does not count them. ``assess`` is sampling
    and metrics together: for the run, or for all runs of its file where they are measured in one job; and
    ``solve`` the rows solved on the grid, on a tail, for all methods of the experiment.
    ``keep`` is the drawing of the samples that a method has kept which trains nothing, and
    ``sample_passes`` and ``sample_rewards`` are network passes and reward calls of each sample, in an
    experiment with methods that train nothing: those that :mod:`flowtilt.pipeline.keeping` counts, and of
    other rows a plain sample's. ``even`` is the number of samples whose passes, beyond those of plain ones,
    are the passes of the first fine-tuned method; NaN where these are not counted.
    """

    experiment: str
    method: str
    kind: str
    seeds: int
    updates: int
    finetune: float
    finetune_sd: float
    batch: float
    threshold: float
    alone: float
    relative: float
    passes: float
    relative_passes: float
    memory: float
    assess: float
    assess_sd: float
    solve: float
    solve_sd: float
    keep: float = math.nan
    sample_passes: float = math.nan
    sample_rewards: float = math.nan
    even: float = math.nan


def costs_of(benchmarks: Path, experiments: Iterable[Experiment]) -> list[Cost]:
    """One line a method, in the order of the experiments and cases of one file.

    Args:
        benchmarks: folder of Snakemake's benchmark files, which lies in that of the results.
        experiments: of one file: the first fine-tuned method is what costs are relative to.

    Raises:
        ResultsError: if a benchmark, or the history of a run, is malformed.
    """
    lines: list[Cost] = []
    unit = unit_passes = math.nan
    results = benchmarks.parent
    for experiment in experiments:
        domain = domain_of(experiment)
        finetune = next(stage for stage in domain.stages if stage.name == "finetune")
        solved = _of_stages(benchmarks, Run("", experiment), "exact")
        for method, config in experiment.methods.items():
            run = Run("", experiment, method)
            updates = _updates(results, run)
            each = (benchmark_of(domain, finetune, replace(run, seed=seed)) for seed in experiment.seeds)
            jobs = [measured_job(benchmarks, job) for job in each]
            tuned = [job.seconds for job in jobs if job is not None]
            assessed = _of_stages(benchmarks, run, *domain.assessment)
            batch = mean_sd(_of_stages(benchmarks, run, "offline"))[0] if takes_batch(run) else math.nan
            threshold = math.nan
            if config.kind == "tfft":
                threshold = mean_sd(_of_stages(benchmarks, run, "threshold"))[0]
            cost = mean_sd(tuned)[0] + (threshold if math.isfinite(threshold) else 0.0)
            whole = cost + (batch if math.isfinite(batch) else 0.0)
            passes = _passes(results, run)
            if updates and not any(line.updates for line in lines):
                unit, unit_passes = whole, passes
            sample_passes, sample_rewards = _of_a_sample(results, run)
            dearer = sample_passes - experiment.sample_passes if config.keeps else math.nan
            lines.append(
                Cost(
                    experiment.name,
                    method,
                    config.kind,
                    len(tuned if updates else assessed),
                    updates,
                    *mean_sd(tuned),
                    batch,
                    threshold,
                    cost / unit if unit > 0 else math.nan,
                    whole / unit if unit > 0 else math.nan,
                    passes,
                    passes / unit_passes if unit_passes > 0 else math.nan,
                    max((j.memory for j in jobs if j and math.isfinite(j.memory)), default=math.nan),
                    *mean_sd(assessed),
                    *mean_sd(solved),
                    mean_sd(_of_stages(benchmarks, run, "keep"))[0] if config.keeps else math.nan,
                    sample_passes,
                    sample_rewards,
                    unit_passes / dearer if dearer > 0 else math.nan,
                )
            )
    return lines


def read_costs(path: str | Path) -> tuple[list[Cost], dict[str, dict[str, float]]]:
    """The lines and the totals of a ``costs.csv`` that :func:`write_costs` has written. Raises ResultsError
    if it is not such a file."""
    try:
        table = pd.read_csv(StringIO(read_text(path)), dtype=str)  # numbers are then read exactly
        names = ["experiment", "method", "kind"]
        numbers = {field: float for field in Cost._fields if field not in names} | {
            "seeds": int,
            "updates": int,
        }
        # Tables from before the batch had a column of its own have it in the threshold's; others came later.
        later = ("batch", "alone", "keep", "sample_passes", "sample_rewards", "even")
        table = table.assign(**{name: math.nan for name in later if name not in table})
        runs = table[table["part"] == "runs"][list(Cost._fields)].astype(numbers)
        rules = table[table["part"] == "rules"][TOTAL_COLUMNS].astype(
            {"jobs": int, "wall_seconds": float, "peak_memory_mb": float}
        )
    except (OSError, KeyError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ResultsError(f"{path}: not a table of costs ({what}); name the costs.csv of a run") from None
    totals = {
        rule: dict(zip(TOTAL_COLUMNS[1:], costs, strict=True)) for rule, *costs in rules.itertuples(False)
    }
    return [Cost(*line) for line in runs.itertuples(index=False)], totals


def _of_stages(benchmarks: Path, run: Run, *names: str) -> list[float]:
    """Seconds of some stages of a run together, for each seed of which all were measured."""
    domain, found = domain_of(run.experiment), []
    for seed in run.experiment.seeds:
        jobs = [
            measured_job(benchmarks, benchmark_of(domain, stage, replace(run, seed=seed)))
            for stage in domain.stages
            if stage.name in names
            and (stage.has(run.experiment, run.method) if stage.kinds else stage.of(run.experiment))
        ]
        if jobs and None not in jobs:
            found.append(sum(job.seconds for job in jobs if job))
    return found


def takes_batch(run: Run) -> bool:
    """Whether a method needs the offline batch: for its threshold, or as a bank."""
    method = run.experiment.methods[run.method]
    if not method.tuned:
        return method.kind == "resampled"
    stages = domain_of(run.experiment).stages
    finetune = next(stage for stage in stages if stage.name == "finetune" and stage.of(run.experiment))
    return method.kind == "tfft" or "offline" in finetune.reads(run)


def _histories(results: Path, run: Run) -> list[Path]:
    """The histories of a method's fine-tunings that are there."""
    runs = (replace(run, results=str(results), seed=seed) for seed in run.experiment.seeds)
    return [file for one in runs if (file := Path(one.file("history.csv"))).is_file()]


def _updates(results: Path, run: Run) -> int:
    """Optimiser steps of a method; see :class:`Cost`."""
    experiment, files = run.experiment, _histories(results, run)
    tuned = experiment.methods[run.method].tuned
    if tuned and files and experiment.solver_of(run.method).kind == "annealed_fitting":
        return round(sum(len(read_history(file, ["active_share"])) for file in files) / len(files))
    return experiment.own_updates_of(run.method)


def _of_a_sample(results: Path, run: Run) -> tuple[float, float]:
    """Network passes and reward calls of a sample; see :class:`Cost`."""
    experiment, kind = run.experiment, run.experiment.methods[run.method].kind
    if not any(method.keeps for method in experiment.methods.values()):
        return math.nan, math.nan
    if kind not in KEPT:
        return (float(experiment.sample_passes), 0.0) if kind in ("pretrained", *TUNED) else (math.nan,) * 2
    runs = (replace(run, results=str(results), seed=seed) for seed in experiment.seeds)
    files = [file for one in runs if (file := Path(one.file("metrics.json"))).is_file()]
    rows = [read_metrics(file).get(run.method, {}) for file in files]
    passes, rewards = (
        mean_sd([row.get(name, math.nan) for row in rows])[0] for name in ("sample_passes", "sample_rewards")
    )
    return passes, rewards


def _passes(results: Path, run: Run) -> float:
    """Mean network passes of a method's fine-tunings, and of the batch if it takes that, where counted."""
    experiment = run.experiment
    if not experiment.counts_passes or not experiment.methods[run.method].tuned:
        return math.nan
    column = "network_passes"
    histories = _histories(results, run)
    counted = mean_sd([float(totals_of(read_history(file, [column]), column)[column]) for file in histories])[
        0
    ]
    return counted + (experiment.offline_passes if takes_batch(run) else 0)


NOTE = (
    "From Snakemake's benchmarks, on the machine of the run: wall time in seconds, mean ± sd over seeds, and "
    "the largest resident memory in MB. An empty cell was not measured. Updates are optimiser steps; a "
    "method that continues another counts its own alone. The offline batch is drawn once for all methods "
    "that need samples of the pretrained model, and stands in the first line of an experiment that does. "
    "Relative: fine-tuning, and tfft's threshold, over those of the first fine-tuned line of the table, with "
    "the batch where a method takes it, and without. "
    "Samples and metrics: where one job measures all runs of a seed it is shown in the first line, else "
    "they are two jobs of each run. Solved rows: one job for all methods of an experiment on a tail; on "
    "functionals they are solved with the metrics. Network passes, where they are counted: states through "
    "the network, a backward pass to the input counted as one and to the parameters as two, and all twice "
    "where there is guidance, with the offline batch where a method takes it; they are "
    "counted and not timed, and what the gradients of reward and entropy take is not in them. Passes and "
    "reward calls a sample are there where some methods train nothing and keep samples of the pretrained "
    "model; of all others they are those of a plain sample. Even: how many samples take the passes of the "
    "first fine-tuning, beside those of plain ones; for fewer, tuning is the dearer way. The last table "
    "is of all jobs measured when this was written, tables and figures among them if they were made before."
)

KEPT_NOTE = (
    "Experiments that this run has not are kept from an earlier one, and totals are of both, with what was "
    "run again."
)


def cost_panel(lines: Sequence[Cost], title: str) -> Panel:
    """The costs of one file as text: a line a method, or a case where every case has one method. What several
    lines share is shown in the first of them."""
    per_case = [line.experiment for line in lines]
    single = len(set(per_case)) == len(per_case)
    counted = any(math.isfinite(line.passes) for line in lines)
    keeps, evens = (
        any(math.isfinite(getattr(line, name)) for line in lines) for name in ("sample_passes", "even")
    )
    cells: list[list[str]] = []
    shown: set[tuple[str, float]] = set()
    for before, line in zip([None, *lines], lines, strict=False):
        case = line.experiment.partition("/")[2]
        name = ", ".join(part for part in (case, "" if single and case else line.method) if part)
        cells.append(
            [
                name,
                str(line.updates) if line.updates else "",
                _cell(line.finetune, line.finetune_sd),
                "" if (line.experiment, line.batch) in shown else _cell(line.batch),
                _cell(line.threshold),
                _ratio(line.relative),
                _ratio(line.alone),
                *([_cell(line.passes / 1000), _ratio(line.relative_passes)] if counted else []),
                _cell(line.memory),
                "" if before and before.assess == line.assess else _cell(line.assess, line.assess_sd),
                "" if before and before.solve == line.solve else _cell(line.solve, line.solve_sd),
                *([_cell(line.keep), _cell(line.sample_passes), _cell(line.sample_rewards)] if keeps else []),
                *([_cell(line.even)] if evens else []),
                str(line.seeds),
            ]
        )
        shown.add((line.experiment, line.batch))
    header = ["method", "updates", "fine-tuning (s)", "offline batch (s)", "threshold (s)"]
    header += ["relative", "relative, without the batch"]
    header += ["thousand network passes", "relative, in passes"] if counted else []
    header += ["its memory (MB)", "samples and metrics (s)", "solved rows of all methods (s)"]
    header += ["keeping samples (s)", "network passes a sample", "reward calls a sample"] if keeps else []
    header += ["even at samples"] if evens else []
    seeds = over_seeds(max((line.seeds for line in lines), default=1))
    return Panel(f"{title}: {seeds}", [*header, "seeds measured"], cells)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def _cell(value: float, sd: float = math.nan) -> str:
    return pretty(value, sd) if math.isfinite(value) else ""


def totals_panel(stages: Mapping[str, Mapping[str, float]]) -> Panel:
    """Jobs, seconds and the largest memory of every rule, and of all together, by falling time."""
    ordered = sorted(stages.items(), key=lambda item: -item[1]["wall_seconds"])
    lines = [(rule, int(s["jobs"]), s["wall_seconds"], s["peak_memory_mb"]) for rule, s in ordered]
    if lines:
        _, jobs, seconds, memory = zip(*lines, strict=True)
        lines.append(("all", sum(jobs), sum(seconds), max(memory)))
    cells = [[rule, str(jobs), f"{seconds:.1f}", f"{memory:.1f}"] for rule, jobs, seconds, memory in lines]
    return Panel("Totals by rule", ["rule", "jobs", "wall time (s)", "largest memory (MB)"], cells)


def write_costs(
    files: Iterable[str | Path],
    overrides: Mapping[str, Any] | None,
    benchmarks: str | Path,
    prefix: str | Path,
    earlier: str | Path | None = None,
) -> None:
    """Write ``{prefix}.csv``, ``{prefix}.md`` and ``{prefix}.tex``.

    The data are the lines of :class:`Cost` (part ``runs``), then the totals (part ``rules``).

    Args:
        overrides: merged into every experiment last.
        benchmarks: folder of Snakemake's benchmark files, which lies in that of the results.
        earlier: ``costs.csv`` of an earlier run: of files without a run in the results its lines are kept,
            and its totals are added, with what was run again.

    Raises:
        ConfigError: if a file is not a valid experiment or study.
        ResultsError: if a benchmark, the history of a run, or the earlier table is malformed.
    """
    benchmarks = Path(benchmarks)
    kept, totals_before = ([], {}) if earlier is None else read_costs(earlier)
    lines: list[Cost] = []
    panels = []
    for file in files:
        experiments = load_file(file, overrides)
        study = read_study(Path(file))
        title = study.title if study else next(iter(experiments.values())).title
        own = [line for line in kept if line.experiment in experiments]
        if not own or any((benchmarks.parent / "runs" / name).is_dir() for name in experiments):
            own = costs_of(benchmarks, experiments.values())
        lines += own
        panels.append(cost_panel(own, f"{Path(file).stem}, {title}"))
    stages = added_costs(totals_before, stage_costs(benchmarks))
    totals = [{"rule": rule, **stage} for rule, stage in stages.items()]
    runs = pd.DataFrame(lines, columns=list(Cost._fields)).assign(part="runs")
    frame = pd.concat([runs, pd.DataFrame(totals, columns=TOTAL_COLUMNS).assign(part="rules")])
    whole = ["seeds", "updates", "jobs"]
    frame[whole] = frame[whole].astype("Int64")
    frame = frame[["part", *Cost._fields, *TOTAL_COLUMNS]]
    note = NOTE if earlier is None else f"{NOTE} {KEPT_NOTE}"
    write_panels(prefix, frame, [*panels, totals_panel(stages)], note)
