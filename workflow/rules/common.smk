"""What the rules ask the plan for: `flowtilt.pipeline.plan` knows the runs and files of a configuration."""

import os
import re

from flowtilt.pipeline.checks import check_folder, read_plan, runnable
from flowtilt.pipeline.configuration import ConfigError, workflow_config
from flowtilt.pipeline.plan import experiment_file, theory_file
from flowtilt.pipeline.resources import REPORT
from flowtilt.pipeline.starting import cure, start

FILES = [*SETTINGS.configfiles, CONFIG_FILE]
WHERE = ", ".join(os.path.relpath(file) for file in (workflow.configfiles if GIVEN else FILES))
if GIVEN:
    WHERE = f"the configuration that the module is given ({WHERE or 'of no file'})"

# Whether jobs run in the Python that runs Snakemake.
HERE = not (CONDA or APPTAINER)

# An error is one sentence, which says where to look.
try:
    check_folder()
    FOUND = dict(config) if GIVEN else workflow_config(FILES, SETTINGS, config)
    PLAN, LEFT_OUT = read_plan(FOUND, WHERE), []
    if HERE and not lacking():
        PLAN, LEFT_OUT = runnable(PLAN, WHERE)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

for said in LEFT_OUT:
    print(said, file=sys.stderr)
if HERE and lacking():
    print(f"Only planning works here: {cure()}", file=sys.stderr)


def begin() -> None:
    try:
        start(PLAN, HERE)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


if MODULE:
    when_started(begin)


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
