"""What the plan says, as rules take it: functions of wildcards, outputs and attempts."""


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


def results(up: int):
    """The folder of the results, so many levels above a job's first output."""
    return lambda wildcards, output: str(Path(output[0]).parents[up])


def prefix(end: str):
    """The path of a job's first output without its end."""
    return lambda wildcards, output: output[0].removesuffix(end)


def figures_prefix(name: str):
    """The path of a file's figures without their endings."""
    return lambda wildcards, output: str(Path(output[0]).with_name(name))


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
