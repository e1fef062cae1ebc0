"""What the rules ask the plan for: `flowtilt.pipeline.plan` knows the runs and files of a configuration."""

import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

try:
    from flowtilt.pipeline.configuration import ConfigError, workflow_config
    from flowtilt.pipeline import plan as domains
    from flowtilt.pipeline.checks import check_folder, read_plan
    from flowtilt.pipeline.plan import experiment_file, theory_file
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


def ask_unseen(function, *arguments):
    """The same for a parameter that no job is run again for, which to Snakemake is one that takes outputs."""
    return lambda wildcards, output: function(*arguments, **wildcards)


def memory(rule: str):
    return lambda wildcards, attempt: PLAN.memory(rule, attempt)


def minutes(rule: str):
    return lambda wildcards, attempt: PLAN.minutes(rule, attempt)


def prefix(end: str):
    """The path of a job's first output without its end."""
    return lambda wildcards, output: output[0].removesuffix(end)


def options(*names: str):
    """Command-line options for those of the named inputs that a job has."""
    return lambda wildcards, input: " ".join(
        f"--{name} {shlex.quote(str(input[name]))}" for name in names if name in input.keys()
    )
