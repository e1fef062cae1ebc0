# Every row of the tables: the networks' samples, and the same steps solved exactly on a grid.


# All runs of a file and a seed in one job: each takes less time than to start another.
for name in PLAN.files_of_kind(domains.PLANAR):

    rule:
        name:
            f"measure_{name}"
        input:
            PLAN.measured_runs(name),
        output:
            PLAN.measured_files(name),
        log:
            f"<logs>/measure/{name}/seed{{seed}}.log",
        benchmark:
            f"<benchmarks>/measure/{name}/seed{{seed}}.tsv"
        priority: 20
        group:
            PLAN.group("measure")
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=memory("measure"),
            runtime=minutes("measure"),
            gpu=PLAN.gpus("measure"),
        params:
            digest=PLAN.digests("measure", name),
            configs=ask_unseen(PLAN.config_files_of, name),
            results=PLAN.config.results,
        shell:
            "OMP_NUM_THREADS={threads} flowtilt measure {params.configs:q} --seed {wildcards.seed:q} "
            "--results {params.results:q} > {log:q} 2>&1"


rule resolution:
    input:
        samples=PLAN.resolution_runs("<results>/runs/{experiment}/{method}/seed{seed}/samples.npz"),
        densities=PLAN.resolution_runs("<results>/runs/{base}/pretrained/seed{seed}/density.npz"),
    output:
        "<results>/resolution.json",
    log:
        "<logs>/resolution/resolution.log",
    benchmark:
        "<benchmarks>/resolution/resolution.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("resolution"),
        runtime=minutes("resolution"),
        gpu=PLAN.gpus("resolution"),
    params:
        digest=PLAN.digests("exact", PLAN.config.resolution),
        configs=ask_unseen(PLAN.resolution_configs),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt resolution --config {params.configs:q} "
        "--samples {input.samples:q} --density {input.densities:q} --output {output:q} > {log:q} 2>&1"


rule exact:
    input:
        density=ask(PLAN.base_density),
        resolution="<results>/resolution.json",
    output:
        metrics="<results>/runs/{experiment}/exact/seed{seed}/metrics.json",
        laws="<results>/runs/{experiment}/exact/seed{seed}/laws.npz",
        resolved_metrics="<results>/runs/{experiment}/resolved/seed{seed}/metrics.json",
        resolved_laws="<results>/runs/{experiment}/resolved/seed{seed}/laws.npz",
    log:
        "<logs>/exact/{experiment}/exact/seed{seed}.log",
    benchmark:
        "<benchmarks>/exact/{experiment}/exact/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.TAIL)),
    group:
        PLAN.group("exact")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("exact"),
        runtime=minutes("exact"),
        gpu=PLAN.gpus("exact"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "exact"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt exact {params.config:q} --density {input.density:q} "
        "--output {output.metrics:q} --laws {output.laws:q} --resolution {input.resolution:q} "
        "--resolved-output {output.resolved_metrics:q} --resolved-laws {output.resolved_laws:q} "
        "> {log:q} 2>&1"
