# Tables and figures of the experiments, the comparison with the papers, and where it all came from.


rule table:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: read_by_table(wildcards.name),
    output:
        csv=report(
            "<results>/tables/{name}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"experiment": "{name}"},
        ),
        md="<results>/tables/{name}.md",
        tex="<results>/tables/{name}.tex",
    log:
        "<logs>/table/{name}.log",
    benchmark:
        "<benchmarks>/table/{name}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.csv.removesuffix(".csv"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt table {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"


rule compare:
    input:
        files=[experiment_file(name) for name in config["experiments"]],
        metrics=for_all(lambda name: run_files(name, "metrics.json")),
        reported="config/reported_results.csv",
    output:
        comparison=report(
            "<results>/tables/comparison.csv",
            caption="../report/comparison.rst",
            category="Tables",
            labels={"experiment": "all, beside the papers"},
        ),
        by_seed="<results>/tables/by_seed.csv",
    log:
        "<logs>/compare/comparison.log",
    benchmark:
        "<benchmarks>/compare/comparison.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt compare {input.files} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output {output.comparison} "
        "--by-seed {output.by_seed} > {log} 2>&1"


# Nothing is run again for it: benchmarks come with the runs' files, and those that are not there leave
# cells empty.
rule costs:
    input:
        RUNS,
        files=[experiment_file(name) for name in config["experiments"]],
    output:
        csv=report(
            "<results>/tables/costs.csv",
            caption="../report/costs.rst",
            category="Tables",
            labels={"experiment": "all, time and memory"},
        ),
        md="<results>/tables/costs.md",
        tex="<results>/tables/costs.tex",
    log:
        "<logs>/costs/costs.log",
    benchmark:
        "<benchmarks>/costs/costs.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.csv.removesuffix(".csv"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt costs {input.files} --override {params.overrides:q} "
        "--benchmarks {params.results}/benchmarks --output-prefix {params.prefix} > {log} 2>&1"


rule experiment_figures:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: run_files(wildcards.name),
    output:
        landscape=report(
            "<results>/figures/{name}_landscape.png",
            caption="../report/landscape.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "landscape"},
        ),
        densities=report(
            "<results>/figures/{name}_densities.png",
            caption="../report/densities.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "densities"},
        ),
        histograms=report(
            "<results>/figures/{name}_histograms.png",
            caption="../report/histograms.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "histograms"},
        ),
    log:
        "<logs>/experiment_figures/{name}.log",
    benchmark:
        "<benchmarks>/experiment_figures/{name}.tsv"
    wildcard_constraints:
        name=one_of(name for name in FILES if name not in STUDIES and is_of(TailExperiment, name)),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.landscape.removesuffix("_landscape.png"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"


rule functional_figures:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: run_files(wildcards.name),
    output:
        densities=report(
            "<results>/figures/{name}_densities.png",
            caption="../report/densities.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "densities"},
        ),
        metrics=report(
            "<results>/figures/{name}_metrics.png",
            caption="../report/metrics.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "metrics"},
        ),
    log:
        "<logs>/functional_figures/{name}.log",
    benchmark:
        "<benchmarks>/functional_figures/{name}.tsv"
    wildcard_constraints:
        name=one_of(name for name in FUNCTIONAL_FILES if name not in STUDIES),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=10,
        gpu=0,
    params:
        overrides=OVERRIDES,
        results=results_folder,
        prefix=lambda wildcards, output: output.densities.removesuffix("_densities.png"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"


rule study_figure:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: read_by_table(wildcards.name),
        resolution="<results>/resolution.json",
    output:
        report(
            "<results>/figures/{name}.png",
            caption="../report/study.rst",
            category="Figures",
            labels={"experiment": "{name}", "figure": "study"},
        ),
    log:
        "<logs>/study_figure/{name}.log",
    benchmark:
        "<benchmarks>/study_figure/{name}.tsv"
    wildcard_constraints:
        name=one_of(name for name in STUDIES if name not in MOLECULE_FILES),
    conda:
        "../../envs/core.yaml"
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
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file} --override {params.overrides:q} "
        "--results {params.results} --reported {input.reported} --output-prefix {params.prefix} "
        "> {log} 2>&1"


rule provenance:
    input:
        TABLES,
        FIGURES,
    output:
        "<results>/provenance.json",
    log:
        "<logs>/provenance/provenance.log",
    benchmark:
        "<benchmarks>/provenance/provenance.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    params:
        hash=config_hash(),
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt provenance --config-hash {params.hash} "
        "--benchmarks {params.results}/benchmarks --output {output} > {log} 2>&1"
