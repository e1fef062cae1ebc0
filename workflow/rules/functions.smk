"""What the plan says, as rules take it: functions of wildcards, outputs and attempts."""

import shlex
from types import SimpleNamespace


def command(stage):
    """The command of a job; no job is run again for it, as for a parameter that takes outputs."""
    return lambda wildcards, output, threads: stage.command(threads, output[0], **wildcards)


def read(stage):
    """What a job of a stage reads."""
    return lambda wildcards: {role: placed(files) for role, files in stage.inputs(**wildcards).items()}


def placed(files):
    """Files of the workflow as they are, where those of the results may have the prefix of a module."""
    if not isinstance(files, str):
        return [placed(file) for file in files]
    return files if files.startswith(f"{PLAN.config.results}/") else local(files)


def written(stage):
    """What a job of a stage writes, some of it folders."""
    folders = stage.stage.folders
    return {role: directory(file) if role in folders else file for role, file in stage.outputs.items()}


def quoted(words):
    """The words of a job's command; no job is run again for them, as for a parameter that takes outputs."""
    return lambda wildcards, input, output: shlex.join(map(str, words(wildcards, input, output)))


def beside(output, name: str):
    """The argument for what the paths of all outputs begin with."""
    return ["--output-prefix", Path(output[0]).with_name(name)]


def of_runs(input, output):
    """The arguments for what is merged into experiments, for the results, a folder of which has the outputs, and for
    the papers' values."""
    results = Path(output[0]).parents[1]
    return ["--override", PLAN.overrides, "--results", results, "--reported", input.reported]


def table_files(name: str):
    """A table in each of its forms."""
    return [f"<results>/tables/{name}.{extension}" for extension in ("csv", "md", "tex")]


def shown(file: str, caption: str, category: str, shows: str, **more):
    """A file of Snakemake's report."""
    return report(file, caption=caption, category=category, labels={"shows": shows}, **more)


def drawn(name: str):
    """The figures of a file, for the report."""
    return [
        shown(
            f"<results>/figures/{name}{ending}.png",
            PLAN.caption_file(name, shows),
            "Experiments",
            shows,
            subcategory=name,
        )
        for ending, shows in PLAN.captions(name).items()
    ]


REPORTS = {}
"""Rules by name: what they need, what they read by role, what they write, and their command."""


def made(name: str, inputs, outputs, words, log: str, needs="", environment="core", watched=()):
    """Enter a rule: `words` are those of its command, from wildcards, inputs and outputs; see report.smk.

    `log` is the path of log and benchmark; a job is run again when what is `watched` changes.
    """
    REPORTS[name] = SimpleNamespace(
        inputs=inputs,
        outputs=outputs,
        command=quoted(words),
        log=log,
        needs=REPORT[needs or name],
        environment=environment,
        watched=list(watched),
    )
