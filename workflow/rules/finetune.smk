# Fine-tuning: the threshold of the tail, then one run for each method and seed.


rule threshold:
    input:
        offline="<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/threshold.json",
    log:
        "<logs>/threshold/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/threshold/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLANAR),
    priority: 20
    group:
        "pretrain"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(5),
        gpu=0,
    params:
        config=config_file,
        digest=digest("threshold"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt threshold {params.config:q} --method {wildcards.method} "
        "--offline {input.offline} --output {output} > {log} 2>&1"


rule finetune:
    input:
        unpack(finetune_inputs),
        pretrained=base_model,
    output:
        model="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLANAR),
        method=one_of(method for method in METHODS if method != "pretrained"),
    priority: 10
    group:
        short("finetune")
    conda:
        "../../envs/core.yaml"
    threads: config["processes"]
    resources:
        mem_mb=growing(1500 * config["processes"], 8000 * config["processes"]),
        runtime=growing(10, 480),
        gpu=config["gpu"] * config["processes"],
    params:
        config=config_file,
        digest=digest("finetune"),
        options=options("start", "threshold"),
        together=TOGETHER,
        each=threads_of_each,
    shell:
        "OMP_NUM_THREADS={params.each} {params.together}flowtilt finetune {params.config:q} --method {wildcards.method} "
        "--seed {wildcards.seed} --pretrained {input.pretrained} {params.options} "
        "--output {output.model} --history {output.history} > {log} 2>&1"
