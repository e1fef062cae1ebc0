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
        experiment=one_of(PLAN.of_kind(domains.PLANAR)),
    priority: 20
    group:
        PLAN.group("threshold")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("threshold"),
        runtime=minutes("threshold"),
        gpu=PLAN.gpus("threshold"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "threshold"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt threshold {params.config:q} --method {wildcards.method:q} "
        "--offline {input.offline:q} --output {output:q} > {log:q} 2>&1"


rule finetune:
    input:
        unpack(ask(PLAN.finetune_inputs)),
        pretrained=ask(PLAN.base_model),
    output:
        model="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.PLANAR)),
        method=one_of(method for method in PLAN.methods if method != "pretrained"),
    priority: 10
    group:
        PLAN.group("finetune")
    conda:
        "../../envs/core.yaml"
    threads: PLAN.config.processes
    resources:
        mem_mb=memory("finetune"),
        runtime=minutes("finetune"),
        gpu=PLAN.gpus("finetune"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "finetune"),
        options=options("start", "threshold"),
        together=PLAN.together,
        each=lambda wildcards, threads: PLAN.threads_of_each(threads),
    shell:
        "OMP_NUM_THREADS={params.each} {params.together}flowtilt finetune {params.config:q} --method {wildcards.method:q} "
        "--seed {wildcards.seed:q} --pretrained {input.pretrained:q} {params.options} "
        "--output {output.model:q} --history {output.history:q} > {log:q} 2>&1"
