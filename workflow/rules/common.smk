"""What the rules ask the plan for: `flowtilt.pipeline.plan` knows the runs and files of a configuration."""

import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

try:
    from flowtilt.pipeline.checks import check_folder, read_plan
    from flowtilt.pipeline.configuration import ConfigError, workflow_config
    from flowtilt.pipeline.plan import experiment_file, theory_file
    from flowtilt.pipeline.resources import REPORT
    from flowtilt.pipeline.starting import start
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"{error}: the environment that runs Snakemake must hold the package flowtilt; "
        "make one with `make env`, or run `pip install -e .` in your own"
    ) from None

# Jobs call the command of the environment that runs Snakemake, whether it is activated or not.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


# An error is one sentence, which says where to look.
try:
    check_folder()
    FOUND = workflow_config(workflow.configfiles, getattr(workflow, "config_settings", None), config)
    PLAN = read_plan(FOUND, ", ".join(os.path.relpath(path) for path in workflow.configfiles))
except ConfigError as error:
    raise WorkflowError(str(error)) from None


def begin() -> None:
    try:
        start(PLAN)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def one_of(names) -> str:
    """A regular expression that matches just the given names, or nothing if there are none."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def ask(function, *arguments):
    """What the plan answers to the wildcards of a job."""
    return lambda wildcards: function(*arguments, **wildcards)


def command(stage):
    """The command of a job; no job is run again for it, as for a parameter that takes outputs."""
    return lambda wildcards, output, threads: stage.command(threads, **wildcards)


def written(stage):
    """What a job of a stage writes, some of it folders."""
    folders = stage.stage.folders
    return {role: directory(file) if role in folders else file for role, file in stage.outputs.items()}


def drawn(name: str):
    """The figures of a file, for the report."""
    shown = report  # at the front of a line it would be Snakemake's keyword
    return [
        shown(
            f"{PLAN.config.results}/figures/{name}{ending}.png",
            caption=PLAN.caption_file(name, shows),
            category="Experiments",
            subcategory=name,
            labels={"shows": shows},
        )
        for ending, shows in PLAN.captions(name).items()
    ]


def memory(needs):
    return lambda wildcards, attempt: needs.memory(PLAN.config) * attempt


def minutes(needs):
    return lambda wildcards, attempt: needs.minutes(PLAN.config) * attempt


def prefix(end: str):
    """The path of a job's first output without its end."""
    return lambda wildcards, output: output[0].removesuffix(end)
