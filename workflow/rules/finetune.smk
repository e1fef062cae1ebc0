# Fine-tuning: the threshold of the tail, then one run for each method and seed.


rule threshold:
    input:
        config=ancient("<results>/configs/{experiment}.yaml"),
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
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        digest=digest("threshold"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt threshold {input.config} --method {wildcards.method} "
        "--offline {input.offline} --output {output} > {log} 2>&1"


rule finetune:
    input:
        unpack(finetune_inputs),
        config=ancient("<results>/configs/{experiment}.yaml"),
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
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=240,
        gpu=config["gpu"],
    params:
        digest=digest("finetune"),
        options=options("start", "threshold"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt finetune {input.config} --method {wildcards.method} "
        "--seed {wildcards.seed} --pretrained {input.pretrained} {params.options} "
        "--output {output.model} --history {output.history} > {log} 2>&1"
