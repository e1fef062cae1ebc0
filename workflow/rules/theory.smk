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
        mem_mb=growing(1500),
        runtime=growing(30),
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
        csv="<results>/tables/theory_{theory}.csv",
        md="<results>/tables/theory_{theory}.md",
        tex="<results>/tables/theory_{theory}.tex",
        figure=report(
            "<results>/figures/theory_{theory}.png",
            caption="../report/theory_figure.rst",
            category="Theory",
            subcategory="{theory}",
            labels={"shows": "bounds and what was measured"},
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


rule theory_page:
    input:
        "<results>/tables/theory_{theory}.md",
    output:
        report(
            "<results>/pages/theory_{theory}.html",
            caption="../report/theory_table.rst",
            category="Theory",
            subcategory="{theory}",
            labels={"shows": "table"},
        ),
    log:
        "<logs>/theory_page/{theory}.log",
    benchmark:
        "<benchmarks>/theory_page/{theory}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=5,
        gpu=0,
    shell:
        "OMP_NUM_THREADS={threads} flowtilt page {input} --title 'Theory: {wildcards.theory}' "
        "--output {output} > {log} 2>&1"
