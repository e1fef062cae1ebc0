"""The hierarchy as a table: tiers, measured curvatures, and how near FDC comes to each optimum.

Tiers and curvatures come from the code, and what is reached from the results of a study whose cases
are one small problem a functional.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from flowtilt.domains.planar.experiment import FunctionalExperiment
from flowtilt.domains.planar.sections import FunctionalObjective, TermConfig
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.report.measurements import entries, summarise, with_gaps
from flowtilt.pipeline.report.panels import Panel, over_seeds, pretty

REQUIRED = {"linear": 90.0, "convex": 90.0, "general": 75.0}
"""Percent of the gap that FDC should close, by the paper's tier."""


class Reached(NamedTuple):
    """What Flow Density Control reaches of one functional, and what a method of a single solve does.

    ``closed`` and its standard deviation over seeds are in percent of the gap between the pretrained
    distribution and the optimum; ``sd`` is NaN for one seed. ``single`` is the kind of the case's method of
    one solve, if it has any. Numbers are NaN where nothing was run.
    """

    label: str
    varied: str
    name: str
    tier: str
    curvature: str
    needs: str
    solvers: str
    before: float = math.nan
    after: float = math.nan
    optimum: float = math.nan
    closed: float = math.nan
    sd: float = math.nan
    closed_by_exact_steps: float = math.nan
    single: str = ""
    closed_by_single: float = math.nan
    single_sd: float = math.nan
    seeds: int = 0
    verdict: str = "no case"


def varied_term(problem: FunctionalObjective) -> tuple[str, str]:
    """Which term a case is about, its divergence unless that is KL, and the names of its parts."""
    if problem.divergence.kind != "kl":
        return "divergence", _named(problem.divergence)
    return "utility", _named(problem.utility)


def _named(term: TermConfig) -> str:
    if term.kind != "sum":
        return term.kind
    return " + ".join(str(part["name"]) for part in term.parameters["parts"])


def solvers_of(problem: FunctionalObjective) -> str:
    """Which methods solve a problem: one tilt does for a linear one, one hinge for a tail."""
    utility, divergence = problem.utility.kind, problem.divergence.kind
    if divergence != "kl":
        return "fdc"
    return {"expected_reward": "am, fdc", "cvar": "tfft, fdc", "sq": "tfft, fdc"}.get(utility, "fdc")


def reached(long: pd.DataFrame, cases: Sequence[Experiment]) -> list[Reached]:
    """One line a case and fdc method, in the order of the cases; then the functionals without a case."""
    # These take torch, which the other tables do without.
    from flowtilt.domains.planar.problems import build_term
    from flowtilt.functionals.curvature import curvature, example_problem

    distribution, ingredients = example_problem()
    values = {(e.experiment, e.row, e.metric): e for e in entries(summarise(with_gaps(long)))}
    lines = []
    for case in cases:
        if not isinstance(case, FunctionalExperiment):
            continue
        for method, config in case.methods.items():
            if config.kind != "fdc":
                continue
            problem = case.problem_of(method)
            kind, name = varied_term(problem)
            term = problem.divergence if kind == "divergence" else problem.utility
            functional = build_term(kind, term, ingredients)
            closed = values[case.name, method, "gap_closed"]
            single, by_single = "", None
            for other, its in case.methods.items():
                if its.kind in ("am", "tfft") and case.problem_of(other) == problem:
                    single, by_single = its.kind, values[case.name, other, "gap_closed"]
            enough = closed.value >= REQUIRED[functional.tier]
            lines.append(
                Reached(
                    label=case.name.split("/")[-1],
                    varied=kind,
                    name=name,
                    tier=functional.tier,
                    curvature=curvature(functional, distribution),
                    needs=functional.needs,
                    solvers=solvers_of(problem),
                    before=values[case.name, f"{method}_exact", "functional_before"].value,
                    after=values[case.name, method, "functional"].value,
                    optimum=values[case.name, f"{method}_optimum", "functional"].value,
                    closed=closed.value,
                    sd=closed.sd,
                    closed_by_exact_steps=values[case.name, f"{method}_exact", "gap_closed"].value,
                    single=single,
                    closed_by_single=by_single.value if by_single else math.nan,
                    single_sd=by_single.sd if by_single else math.nan,
                    seeds=closed.seeds,
                    verdict="reached" if enough else f"short of {REQUIRED[functional.tier]:g} %",
                )
            )
    return lines + _without_case({part for line in lines for part in line.name.split(" + ")})


def _without_case(named: set[str]) -> list[Reached]:
    """One line for each registered functional that no case is about."""
    from flowtilt.functionals.curvature import TierRow, tier_table

    found: dict[tuple[str, str], list[TierRow]] = {}
    for row in tier_table():
        found.setdefault((row.kind, row.name), []).append(row)
    return [
        Reached(
            label=name,
            varied=kind,
            name=name,
            tier=examples[0].paper,
            curvature=" or ".join(dict.fromkeys(row.curvature for row in examples)),
            needs=examples[0].needs,
            solvers="fdc",
        )
        for (kind, name), examples in found.items()
        if name not in named
    ]


NOTE = (
    "Tier: where the paper's hierarchy puts the functional. Curvature: measured along random chords "
    "between finite distributions; a utility is easy to raise if it is concave, a divergence easy to "
    "lower if it is convex. Solvers: which methods solve the problem by construction; am by one tilt of the "
    "reward, tfft by one hinge, fdc by iterating. By one solve: the gap that am or tfft closes where the "
    "case has it. G before is that of the pretrained distribution, the optimum the largest of any "
    "distribution on the grid: certified for concave problems, the best stationary point found for others. "
    "Networks are measured by their own density on that grid; exact steps are FDC's own, solved there. "
    f"Required are {REQUIRED['convex']:g} % of the gap for linear and convex functionals, "
    f"{REQUIRED['general']:g} % for general ones. "
    "A functional without a case is registered and checked, but no network was run on it."
)


def hierarchy_panel(lines: Sequence[Reached], title: str) -> Panel:
    """The table as text."""
    header = [
        *("functional", "paper's tier", "curvature", "needs", "solvers", "G before", "G after fdc"),
        *("G optimum", "gap closed (%)", "by exact steps (%)", "by one solve (%)", "verdict"),
    ]
    cells = [
        [
            *(line.label, line.tier, line.curvature, line.needs, line.solvers),
            *(pretty(value) for value in (line.before, line.after, line.optimum)),
            pretty(line.closed, line.sd),
            pretty(line.closed_by_exact_steps),
            f"{line.single}: {pretty(line.closed_by_single, line.single_sd)}" if line.single else "",
            line.verdict,
        ]
        if line.seeds
        else [line.label, line.tier, line.curvature, line.needs, line.solvers, *[""] * 6, line.verdict]
        for line in lines
    ]
    seeds = over_seeds(max((line.seeds for line in lines), default=1))
    return Panel(f"{title}: {seeds}", header, cells)
