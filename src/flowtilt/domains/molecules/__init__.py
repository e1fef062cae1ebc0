"""Molecules of QM9: an equivariant flow, and minus the GFN1-xTB energy as the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtilt.domains.molecules.experiment import MoleculeExperiment, check_shared, describe
from flowtilt.pipeline.domain import Chapter, Files, Run, Stage
from flowtilt.pipeline.experiment import Experiment, has_budget
from flowtilt.pipeline.places import located
from flowtilt.pipeline.resources import Needs
from flowtilt.pipeline.sections import KEPT, TUNED
from flowtilt.pipeline.usual import (
    RUN,
    BaseDomain,
    finetune_stage,
    keep_stage,
    offline_stage,
    takes_bank,
    threshold_stage,
)

_HERE = "flowtilt.domains.molecules"
_FLOW = ("subset", "units", "network")
_SOLVED = (*_FLOW, "time_power")
_DATA = "data/qm9.npz"


def _data(run: Run) -> str:
    return f"{run.results}/{_DATA}"


def _pretrain_reads(run: Run) -> Files:
    """The data, and the shipped weights and their record, if the pretrained model is taken from them."""
    checkpoint: Any = run.experiment.checkpoint  # type: ignore[attr-defined]
    if checkpoint.retrain:
        return {"molecules": _data(run)}
    files = (Path(checkpoint.path), Path(checkpoint.path).with_suffix(".json"))
    # One that is nowhere too: planning names it.
    return {"molecules": _data(run), "shipped": [str(located(file)) for file in files]}


def _sample_reads(run: Run) -> Files:
    """What the molecules of a run are drawn from: data, the pretrained model, or the run's own."""
    if run.kind == "data":
        return {"molecules": _data(run)}
    return {
        "model": run.shared("model.safetensors")
        if run.kind == "pretrained"
        else run.file("model.safetensors")
    }


STAGES = (
    Stage(
        "data",
        f"{_HERE}.data:prepare_job",
        writes={"molecules": _DATA},
        reads=lambda run: {},
        sections=(),
        needs=Needs((3000, 3000), (20, 20)),
        wanted=False,
        priority=20,
    ),
    Stage(
        "pretrain",
        f"{_HERE}.pretraining:pretrain",
        writes={
            "model": "runs/{experiment}/pretrained/model.safetensors",
            "record": "runs/{experiment}/pretrained/training.json",
        },
        reads=_pretrain_reads,
        sections=("starts_from", "model", *_FLOW, "pretrain", "checkpoint"),
        needs=Needs((3000, 16000), (300, 1440), gpu=True),
        before=True,
        priority=20,
    ),
    offline_stage(
        reads=lambda run: {"pretrained": run.shared("model.safetensors")},
        sections=("starts_from", "model", *_SOLVED, "reward", "offline", "solver"),
        needs=Needs((2000, 16000), (20, 120), gpu=True, group="molecules"),
        before=True,
    ),
    threshold_stage(
        reads=lambda run: {"offline": run.pretrained("offline.npz")},
        sections=("objective", "solver"),
        needs=Needs((1000, 1000), (5, 5), group="molecules", always=True),
    ),
    finetune_stage(
        reads=lambda run: (
            {"pretrained": run.shared("model.safetensors")}
            | run.taken()
            | ({"offline": run.pretrained("offline.npz")} if takes_bank(run) else {})
        ),
        sections=("name", "model", *_SOLVED, "reward", "objective", "offline", "solver"),
        needs=Needs((2000, 16000), (60, 1440), gpu=True, shared=True),
    ),
    keep_stage(
        reads=lambda run: {"pretrained": run.shared("model.safetensors")},
        sections=("name", "model", *_SOLVED, "reward", "objective", "offline", "solver", "evaluation"),
        needs=Needs((2000, 16000), (240, 1440), gpu=True),
        offline=lambda run: run.pretrained("offline.npz"),
    ),
    Stage(
        "sample",
        f"{_HERE}.sampling:sample",
        writes={"samples": f"{RUN}/samples.npz"},
        reads=_sample_reads,
        sections=("starts_from", "model", *_SOLVED, "evaluation"),
        kinds=("data", "pretrained", *TUNED),
        needs=Needs((2000, 16000), (30, 120), gpu=True),
        priority=10,
    ),
    Stage(
        "evaluate",
        f"{_HERE}.evaluation:evaluate",
        writes={
            "metrics": f"{RUN}/metrics.json",
            "sdf": f"{RUN}/molecules.sdf",
            "energies": f"{RUN}/energies.npz",
        },
        reads=lambda run: (
            {"samples": run.drawn("samples.npz"), "molecules": _data(run)}
            | run.trained()
            | run.reference("energies.npz")
        ),
        sections=("subset", "reward", "objective", "evaluation"),
        kinds=("data", "pretrained", *TUNED, *KEPT),
        needs=Needs((2000, 8000), (30, 720)),
    ),
)


class MoleculesDomain(BaseDomain):
    """The domain; see :class:`flowtilt.pipeline.domain.Domain`."""

    name = "molecules"
    words = "on molecules"
    environment = "molecules"
    packages = ("qm9pack", "rdkit", "tblite")
    stages: Sequence[Stage] = STAGES
    workbench = f"{_HERE}.bench:MoleculesBench"
    process = f"{_HERE}.model:process"
    report = f"{_HERE}.tables"
    captions = str(Path(__file__).with_name("captions"))

    def schema(self, data: Mapping[str, Any]) -> type[MoleculeExperiment]:
        return MoleculeExperiment

    check = staticmethod(check_shared)

    def figures(self, experiments: Sequence[Experiment], table: str | None) -> Mapping[str, str]:
        if table is not None:
            return {"": "masses"}
        frontier = {"_frontier": "frontier"} if has_budget(experiments[0]) else {}
        return {**frontier, "_energies": "energies", "_molecules": "molecules"}

    def read_by_table(self, run: Run, table: str | None) -> list[str]:
        """A run's metrics; for a study of masses also its costs, and what its cases are compared with."""
        if table is None:
            return [run.file("metrics.json")]
        case: Any = run.experiment
        others = {"pretrained": ["metrics.json"], "am": ["metrics.json", "history.csv"]}
        others |= {method: ["metrics.json", "history.csv"] for method in case.also}
        own = [run.file("metrics.json"), *(file for role, file in run.trained().items() if role == "history")]
        return own + [run.file_of(m, file, case.starts_from) for m, files in others.items() for file in files]

    describe = staticmethod(describe)
    chapters = (
        Chapter(
            "Experiments on molecules",
            "An `experiments/{name}.yaml` with `domain: molecules`: low energies of QM9's molecules. "
            "`docs/molecules.md` says what is done, and why.",
            MoleculeExperiment,
            "on molecules",
        ),
    )


DOMAIN = MoleculesDomain()
