"""What the plan says, as rules take it: functions of wildcards, outputs and attempts."""


def command(stage):
    """The command of a job; no job is run again for it, as for a parameter that takes outputs."""
    return lambda wildcards, output, threads: stage.command(threads, **wildcards)


def written(stage):
    """What a job of a stage writes, some of it folders."""
    folders = stage.stage.folders
    return {role: directory(file) if role in folders else file for role, file in stage.outputs.items()}


def results_folder(wildcards) -> str:
    return PLAN.config.results


def prefix(end: str):
    """The path of a job's first output without its end."""
    return lambda wildcards, output: output[0].removesuffix(end)


def figures_prefix(name: str):
    """The path of a file's figures without their endings."""
    return lambda wildcards: f"{PLAN.config.results}/figures/{name}"


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
