"""Images of a text-to-image model: exploration, and the left tail of a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowtilt.domains.images.experiment import ImageExperiment, check_models, describe, with_model
from flowtilt.domains.images.prompts import with_prompts
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

_HERE = "flowtilt.domains.images"
_PRETRAINED = "runs/{experiment}/pretrained"
_MODEL = ("model", "retrain")
_FLOW = (*_MODEL, "adapter", "guidance", "schedule", "compute", "prompts")
_PARTS = ("pipeline", "alignment")


def _model_reads(run: Run) -> Files:
    """What the check of a model waits for: its training, its fetching, or the shipped files."""
    case: Any = run.experiment
    if case.retrain:
        return {part: f"{run.results}/models/{case.model.name}/{part}/weights" for part in _PARTS}
    sources = [case.model.pipeline, case.model.alignment, case.reward.weights]
    if any(source is not None and source.hub is not None for source in sources):
        return {"fetched": run.shared("fetched.json")}
    shipped = []
    for folder in (located(case.model.pipeline.path), located(case.model.alignment.path)):
        # A folder that is nowhere is asked for itself, so that planning names it.
        shipped += [file for file in sorted(folder.rglob("*.*")) if file.is_file()] or [folder]
    return {"shipped": [str(file) for file in shipped]}


def _base(run: Run) -> dict[str, str]:
    return {"pretrained": run.shared("model.json")}


def _sample_reads(run: Run) -> Files:
    """The weights of a fine-tuning, if the images are not the pretrained model's."""
    return _base(run) | ({} if run.kind == "pretrained" else {"model": run.file("model.safetensors")})


def _training(part: str) -> Stage:
    return Stage(
        f"pretrain-{part}",
        f"{_HERE}.models:train_{part}",
        writes={part: f"models/{{model}}/{part}/weights"},
        reads=lambda run: {},
        sections=_MODEL,
        needs=Needs((4000, 16000), (300, 1440), gpu=True),
        fields=lambda experiment: {"model": experiment.model.name},  # type: ignore[attr-defined]
        folders=(part,),
        wanted=False,
        priority=30,
    )


STAGES = (
    Stage(
        "fetch",
        f"{_HERE}.fetching:fetch_job",
        writes={"fetched": f"{_PRETRAINED}/fetched.json"},
        reads=lambda run: {},
        sections=("model", "reward"),
        needs=Needs((1000, 1000), (240, 240), local=True),
        wanted=False,
        priority=30,
    ),
    *(_training(part) for part in _PARTS),
    Stage(
        "model",
        f"{_HERE}.models:write_model",
        writes={"model": f"{_PRETRAINED}/model.json"},
        reads=_model_reads,
        sections=_MODEL,
        needs=Needs((2000, 16000), (10, 60), group="images"),
        before=True,
        priority=30,
    ),
    offline_stage(
        reads=_base,
        sections=("name", *_FLOW, "training_prompts", "reward", "offline", "solver"),
        needs=Needs((2000, 16000), (20, 240), gpu=True, group="images"),
    ),
    threshold_stage(
        reads=lambda run: {"offline": run.file_of("pretrained", "offline.npz")},
        sections=("objective", "solver"),
        needs=Needs((1000, 1000), (5, 5), group="images", always=True),
    ),
    finetune_stage(
        reads=lambda run: (
            _base(run)
            | run.taken()
            | ({"offline": run.file_of("pretrained", "offline.npz")} if takes_bank(run) else {})
        ),
        sections=("name", *_FLOW, "training_prompts", "reward", "objective", "offline", "solver"),
        needs=Needs((2000, 48000), (60, 5760), gpu=True, shared=True),
    ),
    keep_stage(
        reads=_base,
        sections=("name", *_FLOW, "reward", "objective", "offline", "solver", "evaluation"),
        needs=Needs((2000, 48000), (240, 5760), gpu=True),
        samples="images",
        folders=("samples",),
    ),
    Stage(
        "sample",
        f"{_HERE}.sampling:sample",
        writes={"images": f"{RUN}/images"},
        reads=_sample_reads,
        sections=("name", *_FLOW, "solver", "evaluation"),
        kinds=("pretrained", *TUNED),
        needs=Needs((2000, 16000), (30, 480), gpu=True),
        folders=("images",),
        priority=10,
    ),
    Stage(
        "evaluate",
        f"{_HERE}.evaluation:evaluate",
        writes={"metrics": f"{RUN}/metrics.json", "scores": f"{RUN}/scores.npz"},
        reads=lambda run: (
            _base(run) | {"images": run.drawn("images")} | run.trained() | run.reference("scores.npz")
        ),
        sections=("model", "prompts", "reward", "objective", "evaluation", "methods"),
        kinds=("pretrained", *TUNED, *KEPT),
        needs=Needs((2000, 16000), (30, 240), gpu=True),
    ),
)


class Images(BaseDomain):
    """The domain; see :class:`flowtilt.pipeline.domain.Domain`."""

    name = "images"
    words = "on images"
    environment = "images"
    packages = ("torchvision", "diffusers", "transformers", "peft", "open_clip_torch", "vendi-score")
    stages: Sequence[Stage] = STAGES
    workbench = f"{_HERE}.bench:ImagesBench"
    process = f"{_HERE}.schedule:process"
    report = f"{_HERE}.tables"
    captions = str(Path(__file__).with_name("captions"))

    def schema(self, data: Mapping[str, Any]) -> type[ImageExperiment]:
        return ImageExperiment

    def completed(self, data: Mapping[str, Any], file: Path) -> dict[str, Any]:
        """With the named model's file in the place of its name, and prompts in the place of theirs."""
        return with_prompts(with_model(data, file), file)

    def check(self, files: Mapping[str, Mapping[str, Experiment]]) -> None:
        """Refuse experiments of one model that would have it trained in two ways."""
        check_models(files)

    def figures(self, experiments: Sequence[Experiment], table: str | None) -> Mapping[str, str]:
        frontier = {"_frontier": "frontier"} if has_budget(experiments[0]) else {}
        return {**frontier, "_images": "images", "_scores": "scores"}

    describe = staticmethod(describe)
    chapters = (
        Chapter(
            "Experiments on images",
            "An `experiments/{name}.yaml` with `domain: images`: exploration, or the left tail of a "
            "reward, with a text-to-image model. Its key `model` is the name of a `models/{name}.yaml`, "
            "which holds what is below `model` here. `docs/images.md` says what is done, and why.",
            ImageExperiment,
            "on images",
        ),
    )


DOMAIN = Images()
