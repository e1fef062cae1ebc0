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
        mem_mb=memory("molecules_data"),
        runtime=minutes("molecules_data"),
        gpu=PLAN.gpus("molecules_data"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-data --output {output:q} > {log:q} 2>&1"


rule molecules_pretrain:
    input:
        ask(PLAN.checkpoint_of),
        molecules="<results>/data/qm9.npz",
    output:
        model="<results>/runs/{experiment}/pretrained/model.safetensors",
        record="<results>/runs/{experiment}/pretrained/training.json",
    log:
        "<logs>/molecules_pretrain/{experiment}.log",
    benchmark:
        "<benchmarks>/molecules_pretrain/{experiment}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    priority: 20
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecules_pretrain"),
        runtime=minutes("molecules_pretrain"),
        gpu=PLAN.gpus("molecules_pretrain"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "pretrain"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-pretrain {params.config:q} --molecules {input.molecules:q} "
        "--output {output.model:q} --record {output.record:q} > {log:q} 2>&1"


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
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    priority: 20
    group:
        PLAN.group("molecules_offline")
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecules_offline"),
        runtime=minutes("molecules_offline"),
        gpu=PLAN.gpus("molecules_offline"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "offline"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-offline {params.config:q} --seed {wildcards.seed:q} "
        "--model {input.model:q} --output {output:q} --workers {threads} > {log:q} 2>&1"


rule molecules_threshold:
    input:
        offline=ask(PLAN.shared_offline),
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/threshold.json",
    log:
        "<logs>/molecules_threshold/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_threshold/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    priority: 20
    group:
        PLAN.group("molecules_threshold")
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecules_threshold"),
        runtime=minutes("molecules_threshold"),
        gpu=PLAN.gpus("molecules_threshold"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-threshold {params.config:q} --method {wildcards.method:q} "
        "--offline {input.offline:q} --output {output:q} > {log:q} 2>&1"


rule molecules_finetune:
    input:
        unpack(ask(PLAN.threshold_input)),
        pretrained=ask(PLAN.shared_model),
    output:
        model="<results>/runs/{experiment}/{method}/seed{seed}/model.safetensors",
        history="<results>/runs/{experiment}/{method}/seed{seed}/history.csv",
    log:
        "<logs>/molecules_finetune/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_finetune/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    priority: 10
    conda:
        "../../envs/molecules.yaml"
    threads: PLAN.config.processes
    resources:
        mem_mb=memory("molecules_finetune"),
        runtime=minutes("molecules_finetune"),
        gpu=PLAN.gpus("molecules_finetune"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "finetune"),
        options=options("threshold"),
        together=PLAN.together,
        each=lambda wildcards, threads: PLAN.threads_of_each(threads),
    shell:
        "OMP_NUM_THREADS=1 {params.together}flowtilt molecules-finetune {params.config:q} --method {wildcards.method:q} "
        "--seed {wildcards.seed:q} --pretrained {input.pretrained:q} {params.options} "
        "--output {output.model:q} --history {output.history:q} --workers {params.each} > {log:q} 2>&1"


rule molecules_sample:
    input:
        unpack(ask(PLAN.molecules_sample_inputs)),
    output:
        "<results>/runs/{experiment}/{method}/seed{seed}/samples.npz",
    log:
        "<logs>/molecules_sample/{experiment}/{method}/seed{seed}.log",
    benchmark:
        "<benchmarks>/molecules_sample/{experiment}/{method}/seed{seed}.tsv"
    wildcard_constraints:
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    priority: 10
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecules_sample"),
        runtime=minutes("molecules_sample"),
        gpu=PLAN.gpus("molecules_sample"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "sample"),
        options=options("model", "molecules"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-sample {params.config:q} --method {wildcards.method:q} "
        "--seed {wildcards.seed:q} {params.options} --output {output:q} > {log:q} 2>&1"


rule molecules_evaluate:
    input:
        unpack(ask(PLAN.training_inputs)),
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
        experiment=one_of(PLAN.of_kind(domains.MOLECULES)),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecules_evaluate"),
        runtime=minutes("molecules_evaluate"),
        gpu=PLAN.gpus("molecules_evaluate"),
    params:
        config=ask_unseen(PLAN.config_file),
        digest=ask(PLAN.digest, "evaluate"),
        options=options("history", "threshold"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt molecules-evaluate {params.config:q} --method {wildcards.method:q} "
        "--samples {input.samples:q} --molecules {input.molecules:q} {params.options} "
        "--output {output.metrics:q} --sdf {output.sdf:q} --energies {output.energies:q} "
        "--workers {threads} > {log:q} 2>&1"


rule molecule_figures:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.run_files),
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
        name=one_of(name for name in PLAN.files_of_kind(domains.MOLECULES) if name not in PLAN.studies),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("molecule_figures"),
        runtime=minutes("molecule_figures"),
        gpu=PLAN.gpus("molecule_figures"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix("_energies.png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule levels_figure:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.read_by_table),
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
        name=one_of(name for name in PLAN.files_of_kind(domains.MOLECULES) if name in PLAN.studies),
    conda:
        "../../envs/molecules.yaml"
    threads: 1
    resources:
        mem_mb=memory("levels_figure"),
        runtime=minutes("levels_figure"),
        gpu=PLAN.gpus("levels_figure"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix(".png"),
    shell:
        "OMP_NUM_THREADS=1 flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"
