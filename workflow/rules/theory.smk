# The papers' guarantees in numbers: each study is run once, then put into a table and a figure.


rule theory:
    input:
        lambda wildcards: local(theory_file(wildcards.theory)),
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
        mem_mb=memory(REPORT["theory"]),
        runtime=minutes(REPORT["theory"]),
        gpu=0,
    params:
        path=on_path,
        overrides=ask(PLAN.theory_overrides),
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt theory {input:q} --override {params.overrides:q} "
        "--output {output:q} > {log:q} 2>&1"


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
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["theory_report"]),
        runtime=minutes(REPORT["theory_report"]),
        gpu=0,
    params:
        path=on_path,
        prefix=prefix(".csv"),
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt theory-report {input:q} --output-prefix {params.prefix:q} "
        "--figure {output.figure:q} > {log:q} 2>&1"


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
    localrule: True
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=memory(REPORT["theory_page"]),
        runtime=minutes(REPORT["theory_page"]),
        gpu=0,
    params:
        path=on_path,
    shell:
        "{params.path} OMP_NUM_THREADS={threads} flowtilt page {input:q} --title 'Theory: '{wildcards.theory:q} "
        "--output {output:q} > {log:q} 2>&1"
