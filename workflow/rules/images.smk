# Pictures: a model that is fetched, trained or shipped, one for all seeds, and then a chain of jobs for each run.
#
# A job's network runs on one thread by default, since its numbers must not depend on how many there are.


localrules:
    fetch_checkpoint,
    images_figures,


rule fetch_checkpoint:
    output:
        "<results>/runs/{experiment}/pretrained/fetched.json",
    log:
        "<logs>/fetch_checkpoint/{experiment}.log",
    benchmark:
        "<benchmarks>/fetch_checkpoint/{experiment}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 30
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("fetch_checkpoint"),
        runtime=minutes("fetch_checkpoint"),
        gpu=PLAN.gpus("fetch_checkpoint"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "fetch"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt fetch-checkpoint {params.config:q} --output {output:q} > {log:q} 2>&1"


rule images_pretrain:
    output:
        directory("<results>/models/{model}/{part}/weights"),
    log:
        "<logs>/images_pretrain/{model}/{part}.log",
    benchmark:
        "<benchmarks>/images_pretrain/{model}/{part}.tsv"
    wildcard_constraints:
        model=one_of(PLAN.image_models),
        part="pipeline|alignment",
    priority: 30
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_pretrain"),
        runtime=minutes("images_pretrain"),
        gpu=PLAN.gpus("images_pretrain"),
    params:
        config=ask_unseen(PLAN.model_config_file),
        digest=ask(PLAN.model_digest),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-pretrain {params.config:q} --part {wildcards.part:q} "
        "--output {output:q} --gpu {resources.gpu} > {log:q} 2>&1"


rule images_model:
    input:
        unpack(ask(PLAN.image_model_inputs)),
    output:
        "<results>/runs/{experiment}/pretrained/model.json",
    log:
        "<logs>/images_model/{experiment}.log",
    benchmark:
        "<benchmarks>/images_model/{experiment}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 30
    group:
        PLAN.group("images_model")
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_model"),
        runtime=minutes("images_model"),
        gpu=PLAN.gpus("images_model"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "model"),
        options=options("pipeline", "alignment"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-model {params.config:q} {params.options} --output {output:q} > {log:q} 2>&1"


rule images_offline:
    input:
        model="<results>/runs/{experiment}/pretrained/model.json",
    output:
        "<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    log:
        "<logs>/images_offline/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_offline/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 20
    group:
        PLAN.group("images_offline")
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_offline"),
        runtime=minutes("images_offline"),
        gpu=PLAN.gpus("images_offline"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "offline"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-offline {params.config:q} --seed {wildcards.seed:q} "
        "--model {input.model:q} --output {output:q} --gpu {resources.gpu} > {log:q} 2>&1"


rule images_threshold:
    input:
        offline="<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/threshold.json",
    log:
        "<logs>/images_threshold/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_threshold/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 20
    group:
        PLAN.group("images_threshold")
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_threshold"),
        runtime=minutes("images_threshold"),
        gpu=PLAN.gpus("images_threshold"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-threshold {params.config:q} --method {wildcards.method:q} "
        "--offline {input.offline:q} --output {output:q} > {log:q} 2>&1"


rule images_finetune:
    input:
        unpack(ask(PLAN.threshold_input)),
        model="<results>/runs/{experiment}/pretrained/model.json",
    output:
        weights="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/images_finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 10
    conda:
        "../../envs/images.yaml"
    threads: PLAN.config.processes
    resources:
        mem_mb=memory("images_finetune"),
        runtime=minutes("images_finetune"),
        gpu=PLAN.gpus("images_finetune"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "finetune"),
        options=options("threshold"),
        together=PLAN.together,
        gpu=PLAN.config.gpu,
    shell:
        "OMP_NUM_THREADS=1 {params.together}flowtilt images-finetune {params.config:q} --method {wildcards.method:q} "
        "--seed {wildcards.seed:q} --model {input.model:q} {params.options} "
        "--output {output.weights:q} --history {output.history:q} --gpu {params.gpu:q} > {log:q} 2>&1"


rule images_sample:
    input:
        unpack(ask(PLAN.images_sample_inputs)),
        model="<results>/runs/{experiment}/pretrained/model.json",
    output:
        directory("<results>/runs/{experiment}/{method}/seed{seed}/pictures"),
    log:
        "<logs>/images_sample/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_sample/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    priority: 10
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_sample"),
        runtime=minutes("images_sample"),
        gpu=PLAN.gpus("images_sample"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "sample"),
        options=options("weights"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-sample {params.config:q} --method {wildcards.method:q} "
        "--seed {wildcards.seed:q} --model {input.model:q} {params.options} --output {output:q} "
        "--gpu {resources.gpu} > {log:q} 2>&1"


rule images_evaluate:
    input:
        unpack(ask(PLAN.training_inputs)),
        model="<results>/runs/{experiment}/pretrained/model.json",
        pictures="<results>/runs/{experiment}/{method}/seed{seed}/pictures",
    output:
        metrics="<results>/runs/{experiment}/{method}/seed{seed}/metrics.json",
        scores="<results>/runs/{experiment}/{method}/seed{seed}/scores.npz",
    log:
        "<logs>/images_evaluate/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_evaluate/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.IMAGES)),
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_evaluate"),
        runtime=minutes("images_evaluate"),
        gpu=PLAN.gpus("images_evaluate"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "evaluate"),
        options=options("history", "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-evaluate {params.config:q} --method {wildcards.method:q} "
        "--model {input.model:q} --pictures {input.pictures:q} {params.options} "
        "--output {output.metrics:q} --scores {output.scores:q} --gpu {resources.gpu} > {log:q} 2>&1"


rule images_figures:
    input:
        file=ask(experiment_file),
        model=ask(PLAN.image_model_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.run_files),
    output:
        pictures=report(
            "<results>/figures/{name}_pictures.png",
            caption="../report/pictures.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "pictures"},
        ),
        scores=report(
            "<results>/figures/{name}_scores.png",
            caption="../report/scores.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "scores"},
        ),
    log:
        "<logs>/images_figures/{name}.log",
    benchmark:
        "<benchmarks>/images_figures/{name}.tsv"
    wildcard_constraints:
        name=one_of(PLAN.of_kind(domains.IMAGES)),
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=memory("images_figures"),
        runtime=minutes("images_figures"),
        gpu=PLAN.gpus("images_figures"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix("_pictures.png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"
