"""What jobs ask for, on this machine and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowtilt.pipeline.config import WorkflowConfig


@dataclass(frozen=True)
class Needs:
    """What a job asks for.

    Attributes:
        mb: memory of each of its processes in MB, where jobs are short, and long.
        time: in minutes, where jobs are short, and long.
        gpu: whether it trains or samples a network, and so takes the GPUs of the configuration.
        shared: whether the processes of the configuration share it.
        group: whose jobs share a submission to a cluster while they are short and without a GPU.
        always: whether they share it in any case, since they take seconds.
        local: whether it runs where Snakemake does, and is never submitted.
        threaded: whether the job's threads are for linear algebra; else they are for processes of its own,
            and its numbers do not depend on how many there are.
    """

    mb: tuple[int, int]
    time: tuple[int, int]
    gpu: bool = False
    shared: bool = False
    group: str | None = None
    always: bool = False
    local: bool = False
    threaded: bool = False

    def memory(self, config: WorkflowConfig) -> int:
        """Memory in MB."""
        return self.mb[config.job_length == "long"] * self.processes(config)

    def minutes(self, config: WorkflowConfig) -> int:
        """Time in minutes."""
        return self.time[config.job_length == "long"]

    def processes(self, config: WorkflowConfig) -> int:
        """Processes that share it."""
        return config.processes if self.shared else 1

    def gpus(self, config: WorkflowConfig) -> int:
        """GPUs of all of them."""
        return config.gpu * self.processes(config) if self.gpu else 0

    def group_in(self, config: WorkflowConfig) -> str | None:
        """The group, if its jobs have one: long jobs, and those with a GPU, have a submission each."""
        alone = config.job_length == "long" or config.gpu > 0
        return None if alone and not self.always else self.group


def _brief(mb: int, minutes: int) -> Needs:
    """A job that is the same wherever it runs."""
    return Needs((mb, mb), (minutes, minutes), local=True)


REPORT: Mapping[str, Needs] = {
    "theory": Needs((1500, 1500), (30, 30)),
    "theory_report": _brief(1000, 10),
    "theory_page": _brief(500, 5),
    "table": _brief(1000, 10),
    "compare": _brief(1000, 10),
    "costs": _brief(1000, 10),
    "figures": _brief(1500, 10),
    "provenance": _brief(500, 5),
    "page": _brief(500, 5),
    "overview": _brief(500, 5),
}
"""Of the rules that put results into tables, figures and pages."""

TARGETS = ("all", "tables", "figures", "pretrained_models", "theories")
"""Rules that only name what others make."""
