# Every row of the tables: the networks' samples, and the same steps solved exactly on a grid.


# All runs of a file and a seed in one job: each takes less time than to start another.
for name in PLANAR_FILES:

    rule:
        name:
            f"measure_{name}"
        input:
            measured_runs(name),
        output:
            measured_files(name),
        log:
            f"<logs>/measure/{name}/seed{{seed}}.log",
        benchmark:
            f"<benchmarks>/measure/{name}/seed{{seed}}.tsv"
        priority: 20
        group:
            short("measure")
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=growing(1500, 8000),
            runtime=growing(15, 120),
            gpu=config["gpu"],
        params:
            digest=[stage_digest(experiment, "measure") for experiment in FILES[name].values()],
            configs=config_files_of(name),
            results=results_folder,
        shell:
            "OMP_NUM_THREADS={threads} flowtilt measure {params.configs:q} --seed {wildcards.seed} "
            "--results {params.results} > {log} 2>&1"


rule resolution:
    input:
        samples=resolution_runs("<results>/runs/{experiment}/{method}/seed{seed}/samples.npz"),
        densities=resolution_runs("<results>/runs/{base}/pretrained/seed{seed}/density.npz"),
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
        mem_mb=1500,
        runtime=30,
        gpu=0,
    params:
        digest=[stage_digest(experiment, "exact") for experiment in FILES[config["resolution"]].values()],
        configs=lambda wildcards, output: [CONFIG_FILES[name] for name in resolution_runs("{experiment}")],
    shell:
        "OMP_NUM_THREADS={threads} flowtilt resolution --config {params.configs:q} "
        "--samples {input.samples} --density {input.densities} --output {output} > {log} 2>&1"


rule exact:
    input:
        density=base_density,
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
        experiment=one_of(TAILS),
    group:
        "exact"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500),
        runtime=growing(15),
        gpu=0,
    params:
        config=config_file,
        digest=digest("exact"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt exact {params.config:q} --density {input.density} "
        "--output {output.metrics} --laws {output.laws} --resolution {input.resolution} "
        "--resolved-output {output.resolved_metrics} --resolved-laws {output.resolved_laws} "
        "> {log} 2>&1"
