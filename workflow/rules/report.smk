# Tables and figures of the experiments, the comparison with the papers, and where it all came from.


rule table:
    input:
        file=lambda wildcards: experiment_file(wildcards.name),
        reported="config/reported_results.csv",
        runs=lambda wildcards: read_by_table(wildcards.name),
    output:
        csv="<results>/tables/{name}.csv",
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
        comparison="<results>/tables/comparison.csv",
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
        csv="<results>/tables/costs.csv",
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
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "landscape"},
        ),
        densities=report(
            "<results>/figures/{name}_densities.png",
            caption="../report/densities.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "densities"},
        ),
        histograms=report(
            "<results>/figures/{name}_histograms.png",
            caption="../report/histograms.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "histograms"},
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
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "densities"},
        ),
        metrics=report(
            "<results>/figures/{name}_metrics.png",
            caption="../report/metrics.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "metrics"},
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
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "study"},
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


# Pages of what else is text, for the report: readable in it as they are, with nothing to load.
rule page:
    input:
        "<results>/tables/{name}.md",
    output:
        report(
            "<results>/pages/{name}.html",
            caption="../report/table.rst",
            category="Experiments",
            subcategory="{name}",
            labels={"shows": "table"},
        ),
    log:
        "<logs>/page/{name}.log",
    benchmark:
        "<benchmarks>/page/{name}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt page {input} --title {wildcards.name} --output {output} > {log} 2>&1"


rule overview:
    input:
        comparison="<results>/tables/comparison.csv",
        costs="<results>/tables/costs.md",
        provenance="<results>/provenance.json",
    output:
        comparison=report(
            "<results>/pages/comparison.html",
            caption="../report/comparison.rst",
            category="Beside the papers",
            labels={"shows": "reported values, ours, and verdicts"},
        ),
        costs=report(
            "<results>/pages/costs.html",
            caption="../report/costs.rst",
            category="Costs and provenance",
            labels={"shows": "time and memory"},
        ),
        provenance=report(
            "<results>/pages/provenance.html",
            caption="../report/provenance.rst",
            category="Costs and provenance",
            labels={"shows": "commit, versions, machine"},
        ),
    log:
        "<logs>/overview/overview.log",
    benchmark:
        "<benchmarks>/overview/overview.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    params:
        folder=lambda wildcards, output: Path(output.costs).parent,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt overview {input} --output-folder {params.folder} > {log} 2>&1"
