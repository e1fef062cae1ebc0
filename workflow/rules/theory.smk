# The papers' guarantees in numbers: each study is run once, then put into a table and a figure.


rule theory:
    input:
        lambda wildcards: theory_file(wildcards.theory),
    output:
        "<results>/theory/{theory}.json",
    log:
        "<logs>/theory/{theory}.log",
    benchmark:
        "<benchmarks>/theory/{theory}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=30,
        gpu=0,
    params:
        overrides=theory_overrides,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt theory {input} --override {params.overrides:q} "
        "--output {output} > {log} 2>&1"


rule theory_report:
    input:
        "<results>/theory/{theory}.json",
    output:
        csv=report(
            "<results>/tables/theory_{theory}.csv",
            caption="../report/theory_table.rst",
            category="Tables",
            labels={"experiment": "theory, {theory}"},
        ),
        md="<results>/tables/theory_{theory}.md",
        tex="<results>/tables/theory_{theory}.tex",
        figure=report(
            "<results>/figures/theory_{theory}.png",
            caption="../report/theory_figure.rst",
            category="Figures",
            labels={"experiment": "theory, {theory}", "figure": "theory"},
        ),
    log:
        "<logs>/theory_report/{theory}.log",
    benchmark:
        "<benchmarks>/theory_report/{theory}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        prefix=lambda wildcards, output: output.csv.removesuffix(".csv"),
    shell:
        "OMP_NUM_THREADS={threads} flowtilt theory-report {input} --output-prefix {params.prefix} "
        "--figure {output.figure} > {log} 2>&1"
