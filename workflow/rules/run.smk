# From pretraining to metrics: one rule for each stage of each domain, as the plan has them.


for stage in PLAN.rules:

    rule:
        name:
            stage.name
        input:
            unpack(read(stage)),
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
            path=on_path,
            digest=ask(stage.digest),
            command=command(stage),
        shell:
            "{params.path} {params.command} > {log:q} 2>&1"
