# The pretrained models that everything starts from, and what is drawn from them once.


rule pretrain:
    output:
        model="<results>/runs/{experiment}/pretrained/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/pretrained/seed{seed}/history.csv",
    log:
        "<logs>/pretrain/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/pretrain/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLANAR),
    # First what is longest and what everything waits for, but for the short jobs that have come within
    # reach: each look at the queue takes time with its length.
    priority: 10
    group:
        short("pretrain")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500, 8000),
        runtime=growing(15, 120),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("pretrain"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt pretrain {params.config:q} --seed {wildcards.seed} "
        "--output {output.model} --history {output.history} > {log} 2>&1"


rule density:
    input:
        model="<results>/runs/{experiment}/pretrained/seed{seed}/model.safetensors",
    output:
        "<results>/runs/{experiment}/pretrained/seed{seed}/density.npz",
    log:
        "<logs>/density/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/density/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLANAR),
    priority: 20
    group:
        short("pretrain")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500, 8000),
        runtime=growing(10, 30),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("density"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt density {params.config:q} --model {input.model} "
        "--output {output} > {log} 2>&1"


rule offline:
    input:
        model=base_model,
    output:
        "<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    log:
        "<logs>/offline/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/offline/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLANAR),
    priority: 20
    group:
        short("pretrain")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=growing(1500, 8000),
        runtime=growing(10, 30),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("offline"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt offline {params.config:q} --seed {wildcards.seed} "
        "--model {input.model} --output {output} > {log} 2>&1"
