"""The hierarchy as a table: tiers, measured curvatures, and how near FDC comes to each optimum.

Tiers and curvatures come from the code, and what is reached from the results of a study whose cases
are one small problem a functional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from flowtilt.experiment import Experiment, FunctionalExperiment, FunctionalObjective, TermConfig
from flowtilt.measurements import entries, summarise, with_gaps
from flowtilt.panels import Panel, over_seeds, pretty

REQUIRED = {"linear": 90.0, "convex": 90.0, "general": 75.0}
"""Percent of the gap that FDC should close, by the paper's tier."""


class Reached(NamedTuple):
    """What Flow Density Control reaches of one functional.

    ``closed`` and its standard deviation over seeds are in percent of the gap between the pretrained
    law and the optimum; ``sd`` is NaN for one seed.
    """

    label: str
    varied: str
    name: str
    tier: str
    curvature: str
    needs: str
    solvers: str
    before: float
    after: float
    optimum: float
    closed: float
    sd: float
    closed_by_exact_steps: float
    seeds: int
    verdict: str


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
    """One line a case and fdc method, in the order of the cases.

    Args:
        long: metrics of all cases; see :func:`flowtilt.measurements.collect_runs`.
        cases: of the study; those that are not on functionals are left out.
    """
    # These take torch, which the other tables do without.
    from flowtilt.domains.planar.problems import build_term
    from flowtilt.functionals.curvature import curvature, example_problem

    law, ingredients = example_problem()
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
            enough = closed.value >= REQUIRED[functional.tier]
            lines.append(
                Reached(
                    label=case.name.split("/")[-1],
                    varied=kind,
                    name=name,
                    tier=functional.tier,
                    curvature=curvature(functional, law),
                    needs=functional.needs,
                    solvers=solvers_of(problem),
                    before=values[case.name, f"{method}_exact", "functional_before"].value,
                    after=values[case.name, method, "functional"].value,
                    optimum=values[case.name, f"{method}_optimum", "functional"].value,
                    closed=closed.value,
                    sd=closed.sd,
                    closed_by_exact_steps=values[case.name, f"{method}_exact", "gap_closed"].value,
                    seeds=closed.seeds,
                    verdict="reached" if enough else f"short of {REQUIRED[functional.tier]:g} %",
                )
            )
    return lines


NOTE = (
    "Tier: where the paper's hierarchy puts the functional. Curvature: measured along random chords between "
    "finite laws; a utility is easy to raise if it is concave, a divergence easy to lower if it is convex. "
    "Solvers: which methods solve the problem by construction; am by one tilt of the reward, tfft by one "
    "hinge, fdc by iterating. G before is that of the pretrained law, the optimum the largest of any law on "
    "the grid: certified for concave problems, the best stationary point found for others. Networks are "
    "measured by their own density on that grid; exact steps are FDC's own, solved there. Required are "
    f"{REQUIRED['convex']:g} % of the gap for linear and convex functionals, {REQUIRED['general']:g} % for "
    "general ones."
)


def hierarchy_panel(lines: Sequence[Reached], title: str) -> Panel:
    """The table as text."""
    header = [
        *("functional", "paper's tier", "curvature", "needs", "solvers", "G before", "G after fdc"),
        *("G optimum", "gap closed (%)", "by exact steps (%)", "verdict"),
    ]
    cells = [
        [
            *(line.label, line.tier, line.curvature, line.needs, line.solvers),
            *(pretty(value) for value in (line.before, line.after, line.optimum)),
            pretty(line.closed, line.sd),
            pretty(line.closed_by_exact_steps),
            line.verdict,
        ]
        for line in lines
    ]
    seeds = over_seeds(max((line.seeds for line in lines), default=1))
    return Panel(f"{title}: {seeds}", header, cells)
