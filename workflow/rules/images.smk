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
        experiment=one_of(IMAGES),
    priority: 30
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=240,
        gpu=0,
    params:
        config=config_file,
        digest=digest("fetch"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt fetch-checkpoint {params.config:q} --output {output} > {log} 2>&1"


rule images_pretrain:
    output:
        directory("<results>/models/{model}/{part}/weights"),
    log:
        "<logs>/images_pretrain/{model}/{part}.log",
    benchmark:
        "<benchmarks>/images_pretrain/{model}/{part}.tsv"
    wildcard_constraints:
        model=one_of(PICTURE_MODELS),
        part="pipeline|alignment",
    priority: 30
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(4000, 16000),
        runtime=growing(300, 1440),
        gpu=config["gpu"],
    params:
        config=lambda wildcards, output: CONFIG_FILES[trained_for(wildcards.model)],
        digest=lambda wildcards: stage_digest(EXPERIMENTS[trained_for(wildcards.model)], "pretrain"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-pretrain {params.config:q} --part {wildcards.part} "
        "--output {output} --gpu {resources.gpu} > {log} 2>&1"


rule images_model:
    input:
        unpack(model_inputs),
    output:
        "<results>/runs/{experiment}/pretrained/model.json",
    log:
        "<logs>/images_model/{experiment}.log",
    benchmark:
        "<benchmarks>/images_model/{experiment}.tsv"
    wildcard_constraints:
        experiment=one_of(IMAGES),
    priority: 30
    group:
        short("images")
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(10, 60),
        gpu=0,
    params:
        config=config_file,
        digest=digest("model"),
        options=options("pipeline", "alignment"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-model {params.config:q} {params.options} --output {output} > {log} 2>&1"


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
        experiment=one_of(IMAGES),
    priority: 20
    group:
        short("images")
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(20, 240),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("offline"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-offline {params.config:q} --seed {wildcards.seed} "
        "--model {input.model} --output {output} --gpu {resources.gpu} > {log} 2>&1"


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
        experiment=one_of(IMAGES),
    priority: 20
    group:
        "images"
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(5),
        gpu=0,
    params:
        config=config_file,
        digest=digest("threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-threshold {params.config:q} --method {wildcards.method} "
        "--offline {input.offline} --output {output} > {log} 2>&1"


rule images_finetune:
    input:
        unpack(threshold_input),
        model="<results>/runs/{experiment}/pretrained/model.json",
    output:
        weights="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/images_finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(IMAGES),
    priority: 10
    conda:
        "../../envs/images.yaml"
    threads: config["processes"]
    resources:
        mem_mb=growing(2000 * config["processes"], 48000 * config["processes"]),
        runtime=growing(60, 5760),
        gpu=config["gpu"] * config["processes"],
    params:
        config=config_file,
        digest=digest("finetune"),
        options=options("threshold"),
        together=TOGETHER,
        gpu=config["gpu"],
    shell:
        "OMP_NUM_THREADS=1 {params.together}flowtilt images-finetune {params.config:q} --method {wildcards.method} "
        "--seed {wildcards.seed} --model {input.model} {params.options} "
        "--output {output.weights} --history {output.history} --gpu {params.gpu} > {log} 2>&1"


rule images_sample:
    input:
        unpack(sample_images_inputs),
        model="<results>/runs/{experiment}/pretrained/model.json",
    output:
        directory("<results>/runs/{experiment}/{method}/seed{seed}/pictures"),
    log:
        "<logs>/images_sample/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/images_sample/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(IMAGES),
    priority: 10
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(30, 480),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("sample"),
        options=options("weights"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-sample {params.config:q} --method {wildcards.method} "
        "--seed {wildcards.seed} --model {input.model} {params.options} --output {output} "
        "--gpu {resources.gpu} > {log} 2>&1"


rule images_evaluate:
    input:
        unpack(training_inputs),
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
        experiment=one_of(IMAGES),
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(30, 240),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("evaluate"),
        options=options("history", "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt images-evaluate {params.config:q} --method {wildcards.method} "
        "--model {input.model} --pictures {input.pictures} {params.options} "
        "--output {output.metrics} --scores {output.scores} --gpu {resources.gpu} > {log} 2>&1"


rule images_figures:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        model=lambda wildcards: model_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: run_files(wildcards.name),
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
        name=one_of(IMAGES),
    conda:
        "../../envs/images.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.pictures.removesuffix("_pictures.png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"
