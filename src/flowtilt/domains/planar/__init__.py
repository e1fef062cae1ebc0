"""Experiments in the plane: every method beside its exact solution on a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowtilt.domains.planar.experiment import FunctionalExperiment, PlanarExperiment, TailExperiment
from flowtilt.domains.planar.terms import check_terms
from flowtilt.domains.planar.words import describe
from flowtilt.pipeline.domain import Chapter, Run, Stage
from flowtilt.pipeline.experiment import Experiment
from flowtilt.pipeline.resources import Needs
from flowtilt.pipeline.sections import KEPT
from flowtilt.pipeline.usual import (
    PRETRAINED,
    RUN,
    BaseDomain,
    finetune_stage,
    keep_stage,
    offline_stage,
    threshold_stage,
)

_SHORT = "pretrain"
"""The group of the short jobs before a fine-tuning."""


def _is_tail(experiment: Experiment) -> bool:
    return isinstance(experiment, TailExperiment)


def _finetune_reads(run: Run) -> dict[str, str]:
    """The pretrained model, the offline batch for what needs a bank of it, and a threshold or the model of an
    earlier run."""
    files = {"pretrained": run.pretrained("model.safetensors")}
    method: Any = run.experiment.methods[run.method]
    if method.by == "exponents" or run.experiment.solver_of(run.method).kind != "adjoint_matching":
        files["offline"] = run.file_of("pretrained", "offline.npz")
    start = method.continue_from
    if run.kind == "tfft":
        files["threshold"] = run.file("threshold.json")
    elif start is not None:
        files["start"] = run.file_of(start, "model.safetensors")
    return files


def _measure_reads(run: Run) -> dict[str, str]:
    """A run's model, or the samples that it has kept, and what it is measured against."""
    base = {"base": run.pretrained("model.safetensors"), "density": run.pretrained("density.npz")}
    own = {"model": run.file("model.safetensors")} if run.kind != "pretrained" else {}
    if run.kind in KEPT:
        own = {"samples": run.drawn("samples.npz")}
    return base | own | run.trained()


def am_runs(results: str, experiment: Experiment) -> list[Run]:
    """The runs of Adjoint Matching, which the resolution of networks is measured from."""
    return [
        Run(results, experiment, name, seed)
        for name, method in experiment.methods.items()
        if method.kind == "am"
        for seed in experiment.seeds
    ]


def _resolution_reads(run: Run) -> dict[str, list[str]]:
    """What they have sampled, and the densities that they started from."""
    runs = am_runs(run.results, run.experiment)
    return {
        "samples": [one.file("samples.npz") for one in runs],
        "densities": [one.pretrained("density.npz") for one in runs],
    }


_HERE = "flowtilt.domains.planar"

_MEASURE_TAILS = Stage(
    "measure",
    f"{_HERE}.measuring:measure",
    writes={"samples": f"{RUN}/samples.npz", "metrics": f"{RUN}/metrics.json"},
    reads=_measure_reads,
    sections=("name", "path", "network", "reward", "objective", "grid", "evaluation", "methods"),
    kinds=("pretrained", "am", "fdc", "tfft", *KEPT),
    of=_is_tail,
    needs=Needs((1500, 8000), (15, 120), group="measure", threaded=True),
    networks=True,
    scope="file",
    priority=20,
)

STAGES = (
    Stage(
        "pretrain",
        f"{_HERE}.training:pretrain",
        writes={"model": f"{PRETRAINED}/model.safetensors", "history": f"{PRETRAINED}/history.csv"},
        reads=lambda run: {},
        sections=("starts_from", "path", "network", "data", "pretrain"),
        needs=Needs((1500, 8000), (15, 120), gpu=True, group=_SHORT, threaded=True),
        before=True,
        priority=10,
    ),
    Stage(
        "density",
        f"{_HERE}.solving:density",
        writes={"density": f"{PRETRAINED}/density.npz"},
        reads=lambda run: {"model": run.pretrained("model.safetensors")},
        sections=("path", "network", "grid", "evaluation"),
        needs=Needs((1500, 8000), (10, 30), group=_SHORT, threaded=True),
        networks=True,
        before=True,
        priority=20,
    ),
    offline_stage(
        reads=lambda run: {"pretrained": run.pretrained("model.safetensors")},
        sections=("name", "path", "network", "reward", "offline", "solver"),
        needs=Needs((1500, 8000), (10, 30), gpu=True, group=_SHORT, threaded=True),
    ),
    threshold_stage(
        reads=lambda run: {"offline": run.file_of("pretrained", "offline.npz")},
        sections=("objective",),
        needs=Needs((1000, 1000), (5, 5), group=_SHORT, always=True, threaded=True),
    ),
    finetune_stage(
        reads=_finetune_reads,
        sections=("name", "path", "network", "reward", "objective", "offline", "solver"),
        needs=Needs((1500, 8000), (10, 480), gpu=True, shared=True, group="finetune", threaded=True),
    ),
    keep_stage(
        reads=lambda run: {"pretrained": run.pretrained("model.safetensors")},
        sections=("name", "path", "network", "reward", "objective", "offline", "solver", "evaluation"),
        needs=Needs((1500, 8000), (10, 60), gpu=True, group="finetune", threaded=True),
        of=_is_tail,
    ),
    _MEASURE_TAILS,
    replace(
        _MEASURE_TAILS,
        writes={**_MEASURE_TAILS.writes, "distributions": f"{RUN}/distributions.npz"},
        of=lambda experiment: not _is_tail(experiment),
    ),
    Stage(
        "resolution",
        f"{_HERE}.solving:measure_resolution",
        writes={"resolution": "resolution.json"},
        reads=_resolution_reads,
        sections=("reward", "objective", "grid", "methods"),
        of=_is_tail,
        needs=Needs((1500, 1500), (30, 30), local=True, threaded=True),
        scope="resolution",
    ),
    Stage(
        "exact",
        f"{_HERE}.solving:exact",
        writes={
            "metrics": "runs/{experiment}/exact/seed{seed}/metrics.json",
            "distributions": "runs/{experiment}/exact/seed{seed}/distributions.npz",
            "resolved_metrics": "runs/{experiment}/resolved/seed{seed}/metrics.json",
            "resolved_distributions": "runs/{experiment}/resolved/seed{seed}/distributions.npz",
        },
        reads=lambda run: {
            "density": run.pretrained("density.npz"),
            "resolution": f"{run.results}/resolution.json",
        },
        sections=("reward", "objective", "grid", "methods"),
        of=_is_tail,
        needs=Needs((1500, 1500), (15, 15), group="exact", always=True, threaded=True),
    ),
)


CHAPTERS = (
    Chapter(
        "Experiments on a tail",
        "An `experiments/{name}.yaml` with `domain: planar` whose `objective` has a `tail`: the mean of a "
        "reward's worst or best values in the plane. Coordinates of the plane have no unit; the reward's "
        "unit is the landscape's.",
        TailExperiment,
        "on a tail",
    ),
    Chapter(
        "Experiments on a functional",
        "An `experiments/{name}.yaml` with `domain: planar` whose `objective` has a `utility`: any pair of a "
        "utility and a divergence in the plane. Sections that are not listed here are those of experiments "
        "on a tail.",
        FunctionalExperiment,
        "on a functional",
        functionals=True,
    ),
)


class Planar(BaseDomain):
    """The domain; see :class:`flowtilt.pipeline.domain.Domain`."""

    name = "planar"
    words = "in the plane"
    stages: Sequence[Stage] = STAGES
    verify = f"{_HERE}.terms:check_experiment"
    workbench = f"{_HERE}.bench:PlanarBench"
    process = f"{_HERE}.process:process"
    report = f"{_HERE}.tables"
    captions = str(Path(__file__).with_name("captions"))
    assessment = ("measure",)

    def schema(self, data: Mapping[str, Any]) -> type[PlanarExperiment]:
        """On any functional where the objective has a utility, else on a tail."""
        objective = data.get("objective")
        functional = isinstance(objective, Mapping) and "utility" in objective
        return FunctionalExperiment if functional else TailExperiment

    def check(self, files: Mapping[str, Mapping[str, Experiment]]) -> None:
        """Refuse functionals and parameters that nobody knows."""
        for name, cases in files.items():
            for case in cases.values():
                if isinstance(case, FunctionalExperiment):
                    check_terms(name, case)

    def figures(self, experiments: Sequence[Experiment], table: str | None) -> Mapping[str, str]:
        """One figure of a study; of an experiment its densities, and what it is judged by."""
        if table is not None:
            return {"": "study"}
        kinds: tuple[str, ...] = ("landscape", "densities", "histograms")
        if not isinstance(experiments[0], TailExperiment):
            kinds = ("densities", "metrics")
        return {f"_{kind}": kind for kind in kinds}

    def read_by_table(self, run: Run, table: str | None) -> list[str]:
        """A run's metrics, and where solvers are compared what they cost."""
        costs = table == "solvers" and run.kind != "pretrained"
        return [run.file("metrics.json"), *([run.file("history.csv")] if costs else [])]

    describe = staticmethod(describe)
    chapters = CHAPTERS


DOMAIN = Planar()
