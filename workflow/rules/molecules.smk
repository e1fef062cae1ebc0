# Molecules: QM9 once, one pretrained model for all seeds, and then a chain of jobs for each run.
#
# A job's network runs on one thread, since its numbers must not depend on how many there are, and its
# energies in as many processes as the job has threads. By default each job has one of each, and two of them
# side by side keep two cores busy, where one with two processes would leave a core idle while its network
# runs, and wait for both cores to be free before it begins. With cores to spare, give `molecules_evaluate`
# more (`--set-threads molecules_evaluate=8`): energies and structures are the work of processes alone.


localrules:
    molecule_figures,
    levels_figure,


rule molecules_data:
    output:
        "<results>/data/qm9.npz",
    log:
        "<logs>/molecules_data/qm9.log",
    benchmark:
        "<benchmarks>/molecules_data/qm9.tsv"
    priority: 20
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(3000),
        runtime=growing(20),
        gpu=0,
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-data --output {output} > {log} 2>&1"


rule molecules_pretrain:
    input:
        checkpoint_of,
        molecules="<results>/data/qm9.npz",
    output:
        model="<results>/runs/{experiment}/pretrained/model.safetensors",
        record="<results>/runs/{experiment}/pretrained/training.json",
    log:
        "<logs>/molecules_pretrain/{experiment}.log",
    benchmark:
        "<benchmarks>/molecules_pretrain/{experiment}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    priority: 20
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(3000, 16000),
        runtime=growing(300, 1440),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("pretrain"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-pretrain {params.config:q} --molecules {input.molecules} "
        "--output {output.model} --record {output.record} > {log} 2>&1"


rule molecules_offline:
    input:
        model="<results>/runs/{experiment}/pretrained/model.safetensors",
    output:
        "<results>/runs/{experiment}/pretrained/seed{seed}/offline.npz",
    log:
        "<logs>/molecules_offline/{experiment}/pretrained/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_offline/{experiment}/pretrained/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    priority: 20
    group:
        short("molecules")
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(20, 120),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("offline"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-offline {params.config:q} --seed {wildcards.seed} "
        "--model {input.model} --output {output} --workers {threads} > {log} 2>&1"


rule molecules_threshold:
    input:
        offline=lambda wildcards: f"{shared_folder(wildcards)}/seed{wildcards.seed}/offline.npz",
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/threshold.json",
    log:
        "<logs>/molecules_threshold/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_threshold/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    priority: 20
    group:
        "molecules"
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(5),
        gpu=0,
    params:
        config=config_file,
        digest=digest("threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-threshold {params.config:q} --method {wildcards.method} "
        "--offline {input.offline} --output {output} > {log} 2>&1"


rule molecules_finetune:
    input:
        unpack(threshold_input),
        pretrained=lambda wildcards: f"{shared_folder(wildcards)}/model.safetensors",
    output:
        model="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/molecules_finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    priority: 10
    conda:
        "../../envs/molecules.yaml"
    threads: config["processes"]
    resources:
        mem_mb=growing(2000 * config["processes"], 16000 * config["processes"]),
        runtime=growing(60, 1440),
        gpu=config["gpu"] * config["processes"],
    params:
        config=config_file,
        digest=digest("finetune"),
        options=options("threshold"),
        together=TOGETHER,
        each=threads_of_each,
    shell:
        "OMP_NUM_THREADS=1 {params.together}flowtilt molecules-finetune {params.config:q} --method {wildcards.method} "
        "--seed {wildcards.seed} --pretrained {input.pretrained} {params.options} "
        "--output {output.model} --history {output.history} --workers {params.each} > {log} 2>&1"


rule molecules_sample:
    input:
        unpack(sample_molecules_inputs),
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/samples.npz",
    log:
        "<logs>/molecules_sample/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_sample/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    priority: 10
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 16000),
        runtime=growing(30, 120),
        gpu=config["gpu"],
    params:
        config=config_file,
        digest=digest("sample"),
        options=options("model", "molecules"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-sample {params.config:q} --method {wildcards.method} "
        "--seed {wildcards.seed} {params.options} --output {output} > {log} 2>&1"


rule molecules_evaluate:
    input:
        unpack(training_inputs),
        samples="<results>/runs/{experiment}/{method}/seed{seed}/samples.npz",
        molecules="<results>/data/qm9.npz",
    output:
        metrics="<results>/runs/{experiment}/{method}/seed{seed}/metrics.json",
        sdf="<results>/runs/{experiment}/{method}/seed{seed}/molecules.sdf",
        energies="<results>/runs/{experiment}/{method}/seed{seed}/energies.npz",
    log:
        "<logs>/molecules_evaluate/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_evaluate/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(MOLECULES),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000, 8000),
        runtime=growing(30, 720),
        gpu=0,
    params:
        config=config_file,
        digest=digest("evaluate"),
        options=options("history", "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-evaluate {params.config:q} --method {wildcards.method} "
        "--samples {input.samples} --molecules {input.molecules} {params.options} "
        "--output {output.metrics} --sdf {output.sdf} --energies {output.energies} "
        "--workers {threads} > {log} 2>&1"


rule molecule_figures:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: run_files(wildcards.name),
    output:
        energies=report(
            "<results>/figures/{name}_energies.png",
            caption="../report/energies.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "energies"},
        ),
        molecules=report(
            "<results>/figures/{name}_molecules.png",
            caption="../report/molecules.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "molecules"},
        ),
    log:
        "<logs>/molecule_figures/{name}.log",
    benchmark:
        "<benchmarks>/molecule_figures/{name}.tsv"
    wildcard_constraints:
        name=one_of(name for name in MOLECULE_FILES if name not in STUDIES),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.energies.removesuffix("_energies.png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"


rule levels_figure:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: read_by_table(wildcards.name),
    output:
        report(
            "<results>/figures/{name}.png",
            caption="../report/levels.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "levels"},
        ),
    log:
        "<logs>/levels_figure/{name}.log",
    benchmark:
        "<benchmarks>/levels_figure/{name}.tsv"
    wildcard_constraints:
        name=one_of(name for name in MOLECULE_FILES if name in STUDIES),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output[0].removesuffix(".png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"
