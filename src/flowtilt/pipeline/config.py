"""What is run: ``config/config.yaml`` and what overrides it, as one checked section."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from flowtilt.pipeline.configuration import Name, Section, ToldApart
from flowtilt.pipeline.experiment import Skip


def _folder(path: str) -> str:
    """The folder without what says nothing, such as a slash at its end."""
    normal = posixpath.normpath(path)
    if normal in (".", "..", "/", "//"):
        raise ValueError("must be a folder of its own, such as results")
    return normal


Names = Annotated[list[Name], ToldApart]
Changes = dict[str, dict[str, Any]]


class OverridesConfig(Section):
    """By the name of a domain, keys of experiment files that are merged into every one of it last; and those
    below."""

    model_config = ConfigDict(extra="allow", frozen=True)

    skip: dict[str, Skip] = Field(default_factory=dict)
    """By the name of an experiment file, its cases and methods that are left out."""

    files: Changes = Field(default_factory=dict)
    """By the name of an experiment file, keys that are merged into it as it is read."""


class WorkflowConfig(Section):
    """The workflow's configuration; experiments' own files are checked by flowtilt.pipeline.experiment."""

    results: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./][A-Za-z0-9_./-]*$"), AfterValidator(_folder)]
    """Folder that everything is written to; letters, digits and the signs _ . / - only, no - at its front."""

    experiments: Annotated[Names, Field(min_length=1)]
    """Names of one or more files config/experiments/{name}.yaml, each once."""

    resolution: Name | None = None
    """Name of the study whose Adjoint Matching runs measure the network's resolution; experiments of a domain
    that has rows at this resolution need it."""

    theory: Names = Field(default_factory=list)
    """Names of files config/theory/{name}.yaml, each once."""

    theory_overrides: Changes = Field(default_factory=dict)
    """By the name of a study of the theory, keys that are merged into it last."""

    overrides: OverridesConfig = OverridesConfig()
    """By the name of a domain, keys that are merged into every experiment of it last; and skip and files."""

    gpu: Annotated[int, Field(ge=0, strict=True)] = 0
    """GPUs of each job that trains or samples a network."""

    processes: Annotated[int, Field(ge=1, strict=True)] = 1
    """Processes on one machine that share each fine-tuning by Adjoint Matching, each with its own GPU."""

    job_length: Literal["short", "long"] = "short"
    """On a cluster, how long jobs take: seconds, so that several share a submission, or hours, so that each
    has its own, with more time and memory."""

    @property
    def changes(self) -> Mapping[str, Any]:
        """What is merged into experiments, as it was given."""
        return self.overrides.model_dump(exclude_unset=True)
