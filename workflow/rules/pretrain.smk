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
        experiment=one_of(PLAN.of_kind(domains.PLANAR)),
    # First what is longest and what everything waits for, but for the short jobs that have come within
    # reach: each look at the queue takes time with its length.
    priority: 10
    group:
        PLAN.group("pretrain")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("pretrain"),
        runtime=minutes("pretrain"),
        gpu=PLAN.gpus("pretrain"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "pretrain"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt pretrain {params.config:q} --seed {wildcards.seed:q} "
        "--output {output.model:q} --history {output.history:q} > {log:q} 2>&1"


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
        experiment=one_of(PLAN.of_kind(domains.PLANAR)),
    priority: 20
    group:
        PLAN.group("density")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("density"),
        runtime=minutes("density"),
        gpu=PLAN.gpus("density"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "density"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt density {params.config:q} --model {input.model:q} "
        "--output {output:q} > {log:q} 2>&1"


rule offline:
    input:
        model=ask(PLAN.base_model),
    output:
        "<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    log:
        "<logs>/offline/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/offline/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.PLANAR)),
    priority: 20
    group:
        PLAN.group("offline")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("offline"),
        runtime=minutes("offline"),
        gpu=PLAN.gpus("offline"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "offline"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt offline {params.config:q} --seed {wildcards.seed:q} "
        "--model {input.model:q} --output {output:q} > {log:q} 2>&1"
