# Tables and figures of the experiments, the comparison with the papers, and where it all came from.


rule table:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.read_by_table),
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
        mem_mb=memory("table"),
        runtime=minutes("table"),
        gpu=PLAN.gpus("table"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix(".csv"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt table {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule compare:
    input:
        files=[experiment_file(name) for name in PLAN.config.experiments],
        metrics=PLAN.for_all(lambda name: PLAN.run_files(name, "metrics.json")),
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
        mem_mb=memory("compare"),
        runtime=minutes("compare"),
        gpu=PLAN.gpus("compare"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt compare {input.files:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output {output.comparison:q} "
        "--by-seed {output.by_seed:q} > {log:q} 2>&1"


# Nothing is run again for it: benchmarks come with the runs' files, and those that are not there leave
# cells empty.
rule costs:
    input:
        PLAN.runs,
        files=[experiment_file(name) for name in PLAN.config.experiments],
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
        mem_mb=memory("costs"),
        runtime=minutes("costs"),
        gpu=PLAN.gpus("costs"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix(".csv"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt costs {input.files:q} --override {params.overrides:q} "
        "--benchmarks {params.results:q}/benchmarks --output-prefix {params.prefix:q} > {log:q} 2>&1"


rule experiment_figures:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.run_files),
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
        name=one_of(name for name in PLAN.files_of_kind(domains.TAIL) if name not in PLAN.studies),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("experiment_figures"),
        runtime=minutes("experiment_figures"),
        gpu=PLAN.gpus("experiment_figures"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix("_landscape.png"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule functional_figures:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.run_files),
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
        name=one_of(name for name in PLAN.files_of_kind(domains.FUNCTIONAL) if name not in PLAN.studies),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("functional_figures"),
        runtime=minutes("functional_figures"),
        gpu=PLAN.gpus("functional_figures"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix("_densities.png"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule study_figure:
    input:
        file=ask(experiment_file),
        reported="config/reported_results.csv",
        runs=ask(PLAN.read_by_table),
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
        name=one_of(name for name in PLAN.files_of_kind(domains.PLANAR) if name in PLAN.studies),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory("study_figure"),
        runtime=minutes("study_figure"),
        gpu=PLAN.gpus("study_figure"),
    params:
        overrides=PLAN.overrides,
        results=PLAN.config.results,
        prefix=prefix(".png"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt figures {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule provenance:
    input:
        PLAN.tables,
        PLAN.figures,
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
        mem_mb=memory("provenance"),
        runtime=minutes("provenance"),
        gpu=PLAN.gpus("provenance"),
    params:
        hash=PLAN.config_hash(),
        results=PLAN.config.results,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt provenance --config-hash {params.hash:q} "
        "--benchmarks {params.results:q}/benchmarks --output {output:q} > {log:q} 2>&1"


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
        mem_mb=memory("page"),
        runtime=minutes("page"),
        gpu=PLAN.gpus("page"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt page {input:q} --title {wildcards.name:q} --output {output:q} > {log:q} 2>&1"


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
        mem_mb=memory("overview"),
        runtime=minutes("overview"),
        gpu=PLAN.gpus("overview"),
    params:
        folder=lambda wildcards, output: Path(output.costs).parent,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt overview {input:q} --output-folder {params.folder:q} > {log:q} 2>&1"
