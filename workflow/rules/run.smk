# From pretraining to metrics: one rule for each stage of each domain, as the plan has them.


def command(stage):
    """The command of a job; no job is run again for it, as for a parameter that takes outputs."""
    return lambda wildcards, output, threads: stage.command(threads, **wildcards)


def written(stage):
    """What a job of a stage writes, some of it folders."""
    folders = stage.stage.folders
    return {role: directory(file) if role in folders else file for role, file in stage.outputs.items()}


for stage in PLAN.rules:

    rule:
        name:
            stage.name
        input:
            unpack(ask(stage.inputs)),
        output:
            **written(stage),
        log:
            f"<logs>/{stage.name}/{stage.log()}.log",
        benchmark:
            f"<benchmarks>/{stage.name}/{stage.log()}.tsv"
        wildcard_constraints:
            **stage.constraints,
        priority: stage.stage.priority
        group:
            stage.stage.needs.group_in(PLAN.config)
        localrule: stage.stage.needs.local
        conda:
            f"../../envs/{stage.domain.environment}.yaml"
        threads: stage.stage.needs.processes(PLAN.config)
        resources:
            mem_mb=memory(stage.stage.needs),
            runtime=minutes(stage.stage.needs),
            gpu=stage.stage.needs.gpus(PLAN.config),
        params:
            digest=ask(stage.digest),
            command=command(stage),
        shell:
            "{params.command} > {log:q} 2>&1"
