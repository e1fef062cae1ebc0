# Tables and figures of the experiments, the comparison with the papers, and where it all came from.


rule table:
    input:
        file=lambda wildcards: local(experiment_file(wildcards.name)),
        reported=local(str(located("config/reported_results.csv"))),
        runs=ask(PLAN.read_by_table),
    output:
        csv="<results>/tables/{name}.csv",
        md="<results>/tables/{name}.md",
        tex="<results>/tables/{name}.tex",
    log:
        "<logs>/table/{name}.log",
    benchmark:
        "<benchmarks>/table/{name}.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["table"]),
        runtime=minutes(REPORT["table"]),
        gpu=0,
    params:
        path=on_path,
        overrides=PLAN.overrides,
        results=results(1),
        prefix=prefix(".csv"),
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt table {input.file:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
        "> {log:q} 2>&1"


rule compare:
    input:
        files=[local(experiment_file(name)) for name in PLAN.config.experiments],
        metrics=PLAN.for_all(lambda name: PLAN.run_files(name, "metrics.json")),
        reported=local(str(located("config/reported_results.csv"))),
    output:
        comparison="<results>/tables/comparison.csv",
        by_seed="<results>/tables/by_seed.csv",
    log:
        "<logs>/compare/comparison.log",
    benchmark:
        "<benchmarks>/compare/comparison.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["compare"]),
        runtime=minutes(REPORT["compare"]),
        gpu=0,
    params:
        path=on_path,
        overrides=PLAN.overrides,
        results=results(1),
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt compare {input.files:q} --override {params.overrides:q} "
        "--results {params.results:q} --reported {input.reported:q} --output {output.comparison:q} "
        "--by-seed {output.by_seed:q} > {log:q} 2>&1"


# Nothing is run again for it: benchmarks come with the runs' files, and those that are not there leave
# cells empty.
rule costs:
    input:
        PLAN.runs,
        files=[local(experiment_file(name)) for name in PLAN.config.experiments],
    output:
        csv="<results>/tables/costs.csv",
        md="<results>/tables/costs.md",
        tex="<results>/tables/costs.tex",
    log:
        "<logs>/costs/costs.log",
    benchmark:
        "<benchmarks>/costs/costs.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["costs"]),
        runtime=minutes(REPORT["costs"]),
        gpu=0,
    params:
        path=on_path,
        overrides=PLAN.overrides,
        results=results(1),
        prefix=prefix(".csv"),
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt costs {input.files:q} --override {params.overrides:q} "
        "--benchmarks {params.results:q}/benchmarks --output-prefix {params.prefix:q} > {log:q} 2>&1"


# Figures of each file, as many as its domain draws.
for name in PLAN.config.experiments:

    rule:
        name:
            f"figures_{name}"
        input:
            file=local(experiment_file(name)),
            reported=local(str(located("config/reported_results.csv"))),
            runs=PLAN.read_by_figures(name),
        output:
            *drawn(name),
        log:
            f"<logs>/figures/{name}.log",
        benchmark:
            f"<benchmarks>/figures/{name}.tsv"
        localrule: True
        conda:
            f"../../envs/{PLAN.environment(name)}.yaml"
        threads: 1
        resources:
            mem_mb=memory(REPORT["figures"]),
            runtime=minutes(REPORT["figures"]),
            gpu=0,
        params:
            path=on_path,
            overrides=PLAN.overrides,
            digest=PLAN.file_digest(name),
            results=results(1),
            name=name,
            prefix=figures_prefix(name),
        shell:
            "{params.path} OMP_NUM_THREADS={threads} flowtilt figures {input.file:q} --override {params.overrides:q} "
            "--results {params.results:q} --reported {input.reported:q} --output-prefix {params.prefix:q} "
            "> {log:q} 2>&1"


# Of environments that conda has made; without it all jobs run in one.
for environment in PLAN.environments if CONDA else []:

    rule:
        name:
            f"versions_{environment}"
        input:
            PLAN.tables,
            PLAN.figures,
        output:
            f"<results>/versions/{environment}.json",
        log:
            f"<logs>/versions/{environment}.log",
        benchmark:
            f"<benchmarks>/versions/{environment}.tsv"
        localrule: True
        conda:
            f"../../envs/{environment}.yaml"
        threads: 1
        resources:
            mem_mb=memory(REPORT["provenance"]),
            runtime=minutes(REPORT["provenance"]),
            gpu=0,
        params:
            path=on_path,
        shell:
            "{params.path} OMP_NUM_THREADS={threads} flowtilt versions --output {output:q} > {log:q} 2>&1"


rule provenance:
    input:
        PLAN.tables,
        PLAN.figures,
        environments=[f"<results>/versions/{name}.json" for name in PLAN.environments if CONDA],
    output:
        "<results>/provenance.json",
    log:
        "<logs>/provenance/provenance.log",
    benchmark:
        "<benchmarks>/provenance/provenance.tsv"
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["provenance"]),
        runtime=minutes(REPORT["provenance"]),
        gpu=0,
    params:
        path=on_path,
        hash=PLAN.config_hash(),
        results=results(0),
        snakemake=lambda wildcards, output: snakemake_version,
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt provenance --config-hash {params.hash:q} "
        "--benchmarks {params.results:q}/benchmarks --environment {input.environments:q} "
        "--snakemake {params.snakemake:q} --output {output:q} > {log:q} 2>&1"


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
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["page"]),
        runtime=minutes(REPORT["page"]),
        gpu=0,
    params:
        path=on_path,
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt page {input:q} --title {wildcards.name:q} --output {output:q} > {log:q} 2>&1"


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
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["overview"]),
        runtime=minutes(REPORT["overview"]),
        gpu=0,
    params:
        path=on_path,
        folder=lambda wildcards, output: Path(output.costs).parent,
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt overview {input:q} --output-folder {params.folder:q} > {log:q} 2>&1"
