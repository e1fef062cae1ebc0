"""What most domains share: defaults of a domain's attributes, and the stages as they usually are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowtilt.pipeline.domain import Chapter, Files, Run, Stage
from flowtilt.pipeline.resources import Needs
from flowtilt.pipeline.sections import KEPT, TUNED

if TYPE_CHECKING:
    from flowtilt.pipeline.experiment import Experiment
    from flowtilt.pipeline.report.panels import Description

PRETRAINED = "runs/{experiment}/pretrained/seed{seed}"
"""Folder of the pretrained model of a seed, below the results."""

RUN = "runs/{experiment}/{method}/seed{seed}"
"""Folder of a run, below the results."""

Reads = Callable[[Run], Files]


class BaseDomain:
    """Defaults of a :class:`flowtilt.pipeline.domain.Domain`, of which a subclass must have the others.

    Those are ``name``, ``words``, ``stages``, ``workbench``, ``process`` and ``schema``.
    """

    environment = "core"
    packages: tuple[str, ...] = ()
    verify = ""
    report = "flowtilt.pipeline.report.plain"
    captions = ""
    assessment: tuple[str, ...] = ("sample", "evaluate")
    chapters: Sequence[Chapter] = ()

    def completed(self, data: Mapping[str, Any], file: Path) -> dict[str, Any]:
        """Nothing is kept in other files."""
        return dict(data)

    def check(self, files: Mapping[str, Mapping[str, Experiment]]) -> None:
        """All experiments can be run beside each other."""

    def figures(self, experiments: Sequence[Experiment], table: str | None) -> Mapping[str, str]:
        """One figure."""
        return {"": "figure"}

    def read_by_table(self, run: Run, table: str | None) -> list[str]:
        """A run's metrics."""
        return [run.file("metrics.json")]

    def describe(self, metric: str) -> Description | None:
        """No metric is its own."""
        return None


def takes_bank(run: Run) -> bool:
    """Whether a fine-tuning takes the offline batch for the bank that it starts from, as every method does
    that weighs samples of the pretrained model, if the batch has as many as its banks."""
    experiment, method = run.experiment, run.experiment.methods[run.method]
    if experiment.offline is None or not method.tuned:
        return False
    solver = experiment.solver_of(run.method)
    if solver.kind == "adjoint_matching":
        return getattr(method, "by", None) == "exponents"
    return experiment.offline.samples >= solver.bank


def offline_stage(reads: Reads, sections: tuple[str, ...], needs: Needs, **other: Any) -> Stage:
    """The offline batch of a seed's pretrained model, by :func:`flowtilt.pipeline.stages.offline`."""
    writes = {"offline": f"{PRETRAINED}/offline.npz"}
    action = "flowtilt.pipeline.stages:offline"
    return Stage("offline", action, writes, reads, sections, needs=needs, wanted=False, priority=20, **other)


def threshold_stage(reads: Reads, sections: tuple[str, ...], needs: Needs) -> Stage:
    """The thresholds of methods of kind tfft, by :func:`flowtilt.pipeline.thresholds.threshold`."""
    writes = {"threshold": f"{RUN}/threshold.json"}
    action = "flowtilt.pipeline.thresholds:threshold"
    return Stage("threshold", action, writes, reads, sections, ("tfft",), needs=needs, priority=20)


def finetune_stage(reads: Reads, sections: tuple[str, ...], needs: Needs) -> Stage:
    """The fine-tunings, by :func:`flowtilt.pipeline.stages.finetune`."""
    writes = {"model": f"{RUN}/model.safetensors", "history": f"{RUN}/history.csv"}
    return Stage(
        "finetune",
        "flowtilt.pipeline.stages:finetune",
        writes,
        reads,
        sections,
        TUNED,
        needs=needs,
        priority=10,
    )


def keep_stage(
    reads: Reads,
    sections: tuple[str, ...],
    needs: Needs,
    offline: Callable[[Run], str] = lambda run: run.file_of("pretrained", "offline.npz"),
    samples: str = "samples.npz",
    **other: Any,
) -> Stage:
    """The samples that methods which train nothing keep, by :func:`flowtilt.pipeline.keeping.keep`.

    Args:
        reads: what the workbench needs.
        offline: where the offline batch is.
        samples: name of the file, or the folder, that the runs' samples are in.
    """

    def read(run: Run) -> Files:
        bank = {"offline": offline(run)} if run.kind == "resampled" else {}
        return {**reads(run), **bank, **run.tilted_by()}

    writes = {"samples": f"{RUN}/kept_{samples}", "kept": f"{RUN}/kept.json"}
    action = "flowtilt.pipeline.keeping:keep"
    return Stage("keep", action, writes, read, sections, KEPT, needs=needs, priority=10, **other)


def usual_stages(module: str, flow: tuple[str, ...], pretraining: tuple[str, ...]) -> tuple[Stage, ...]:
    """All stages of a domain with short runs, each seed with a pretrained model of its own.

    Args:
        module: with the functions ``pretrain``, ``sample`` and ``evaluate``, each called with a
            :class:`flowtilt.pipeline.domain.Job`. They read and write, by role: ``pretrain`` writes ``model``
            and ``history``; ``sample`` reads ``model`` and writes ``samples``; ``evaluate`` reads
            ``samples``, of a fine-tuned run ``history`` and ``threshold``, and of one that trains nothing
            ``kept``, and writes ``metrics``.
        flow: keys of the experiment that the model is built by.
        pretraining: keys that it is trained by.
    """
    brief, training = Needs((1500, 8000), (10, 120)), Needs((1500, 8000), (30, 480), gpu=True)

    def pretrained(run: Run) -> dict[str, str]:
        return {"pretrained": run.pretrained("model.safetensors")}

    def sampled(run: Run) -> dict[str, str]:
        own = run.kind != "pretrained"
        return {"model": run.file("model.safetensors") if own else run.pretrained("model.safetensors")}

    return (
        Stage(
            "pretrain",
            f"{module}:pretrain",
            writes={"model": f"{PRETRAINED}/model.safetensors", "history": f"{PRETRAINED}/history.csv"},
            reads=lambda run: {},
            sections=("starts_from", *flow, *pretraining),
            needs=training,
            before=True,
            priority=20,
        ),
        offline_stage(pretrained, ("name", *flow, "reward", "offline", "solver"), training),
        threshold_stage(
            lambda run: {"offline": run.file_of("pretrained", "offline.npz")}, ("objective",), brief
        ),
        finetune_stage(
            lambda run: pretrained(run) | run.taken(),
            ("name", *flow, "reward", "objective", "offline", "solver"),
            training,
        ),
        keep_stage(
            pretrained,
            ("name", *flow, "reward", "objective", "offline", "solver", "evaluation"),
            training,
        ),
        Stage(
            "sample",
            f"{module}:sample",
            writes={"samples": f"{RUN}/samples.npz"},
            reads=sampled,
            sections=("name", *flow, "evaluation"),
            kinds=("pretrained", *TUNED),
            needs=training,
        ),
        Stage(
            "evaluate",
            f"{module}:evaluate",
            writes={"metrics": f"{RUN}/metrics.json"},
            reads=lambda run: {"samples": run.drawn("samples.npz")} | run.trained(),
            sections=("reward", "objective", "evaluation"),
            kinds=("pretrained", *TUNED, *KEPT),
            needs=brief,
        ),
    )
