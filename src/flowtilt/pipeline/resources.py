"""What the jobs of each rule ask for, on this machine and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowtilt.pipeline.config import WorkflowConfig


@dataclass(frozen=True)
class Rule:
    """What a job of a rule asks for.

    Attributes:
        mb: memory of each of its processes in MB, where jobs are short, and long.
        time: in minutes, where jobs are short, and long.
        gpu: whether it trains or samples a network, and so takes the GPUs of the configuration.
        shared: whether the processes of the configuration share it.
        group: whose jobs share a submission to a cluster while they are short and without a GPU.
        always: whether they share it in any case, since they take seconds.
        local: whether it runs where Snakemake does, and is not submitted.
    """

    mb: tuple[int, int]
    time: tuple[int, int]
    gpu: bool = False
    shared: bool = False
    group: str | None = None
    always: bool = False
    local: bool = False

    def memory(self, config: WorkflowConfig) -> int:
        """Memory in MB."""
        return self.mb[config.job_length == "long"] * (config.processes if self.shared else 1)

    def minutes(self, config: WorkflowConfig) -> int:
        """Time in minutes."""
        return self.time[config.job_length == "long"]

    def gpus(self, config: WorkflowConfig) -> int:
        """GPUs."""
        return config.gpu * (config.processes if self.shared else 1) if self.gpu else 0

    def group_in(self, config: WorkflowConfig) -> str | None:
        """The group, if its jobs have one: long jobs, and those with a GPU, have a submission each."""
        alone = config.job_length == "long" or config.gpu > 0
        return None if alone and not self.always else self.group


def _brief(mb: int, minutes: int) -> Rule:
    """A job of seconds, that runs where Snakemake does."""
    return Rule((mb, mb), (minutes, minutes), local=True)


RULES: Mapping[str, Rule] = {
    "pretrain": Rule((1500, 8000), (15, 120), gpu=True, group="pretrain"),
    "density": Rule((1500, 8000), (10, 30), gpu=True, group="pretrain"),
    "offline": Rule((1500, 8000), (10, 30), gpu=True, group="pretrain"),
    "threshold": Rule((1000, 1000), (5, 5), group="pretrain", always=True),
    "finetune": Rule((1500, 8000), (10, 480), gpu=True, shared=True, group="finetune"),
    "measure": Rule((1500, 8000), (15, 120), gpu=True, group="measure"),
    "resolution": _brief(1500, 30),
    "exact": Rule((1500, 1500), (15, 15), group="exact", always=True),
    "theory": Rule((1500, 1500), (30, 30)),
    "theory_report": _brief(1000, 10),
    "theory_page": _brief(500, 5),
    "table": _brief(1000, 10),
    "compare": _brief(1000, 10),
    "costs": _brief(1000, 10),
    "experiment_figures": _brief(1500, 10),
    "functional_figures": _brief(1500, 10),
    "study_figure": _brief(1500, 10),
    "provenance": _brief(500, 5),
    "page": _brief(500, 5),
    "overview": _brief(500, 5),
    "molecules_data": Rule((3000, 3000), (20, 20)),
    "molecules_pretrain": Rule((3000, 16000), (300, 1440), gpu=True),
    "molecules_offline": Rule((2000, 16000), (20, 120), gpu=True, group="molecules"),
    "molecules_threshold": Rule((1000, 1000), (5, 5), group="molecules", always=True),
    "molecules_finetune": Rule((2000, 16000), (60, 1440), gpu=True, shared=True),
    "molecules_sample": Rule((2000, 16000), (30, 120), gpu=True),
    "molecules_evaluate": Rule((2000, 8000), (30, 720)),
    "molecule_figures": _brief(1500, 10),
    "levels_figure": _brief(1500, 10),
    "fetch_checkpoint": _brief(1000, 240),
    "images_pretrain": Rule((4000, 16000), (300, 1440), gpu=True),
    "images_model": Rule((2000, 16000), (10, 60), group="images"),
    "images_offline": Rule((2000, 16000), (20, 240), gpu=True, group="images"),
    "images_threshold": Rule((1000, 1000), (5, 5), group="images", always=True),
    "images_finetune": Rule((2000, 48000), (60, 5760), gpu=True, shared=True),
    "images_sample": Rule((2000, 16000), (30, 480), gpu=True),
    "images_evaluate": Rule((2000, 16000), (30, 240), gpu=True),
    "images_figures": _brief(1500, 10),
}
"""By the name of the rule; ``measure`` stands for those of all files."""

TARGETS = ("all", "tables", "figures", "pretrained_models", "theories")
"""Rules that only name what others make."""
