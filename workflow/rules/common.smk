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


def memory(needs):
    return lambda wildcards, attempt: needs.memory(PLAN.config) * attempt


def minutes(needs):
    return lambda wildcards, attempt: needs.minutes(PLAN.config) * attempt
