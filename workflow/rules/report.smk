# Tables and figures of the experiments, the comparison with the papers, the theory's bounds, and where it all came from.

REPORTED = local(str(located("config/reported_results.csv")))
ALL_FILES = [local(experiment_file(name)) for name in PLAN.config.experiments]
PAGE = "../report/{}.rst"

made(
    "table",
    {"file": lambda w: local(experiment_file(w.name)), "reported": REPORTED, "runs": ask(PLAN.read_by_table)},
    table_files("{name}"),
    lambda w, i, o: ["table", i.file, *of_runs(i, o), *beside(o, w.name)],
    log="table/{name}",
    watched=[PLAN.overrides],
)
made(
    "compare",
    {
        "files": ALL_FILES,
        "metrics": PLAN.for_all(lambda name: PLAN.run_files(name, "metrics.json")),
        "reported": REPORTED,
    },
    ["<results>/tables/comparison.csv", "<results>/tables/by_seed.csv"],
    lambda w, i, o: ["compare", *i.files, *of_runs(i, o), "--output", o[0], "--by-seed", o[1]],
    log="compare/comparison",
    watched=[PLAN.overrides],
)
# Nothing is run again for it: benchmarks come with the runs' files, and those that are not there leave cells empty.
made(
    "costs",
    {"runs": PLAN.runs, "files": ALL_FILES},
    table_files("costs"),
    lambda w, i, o: [
        *("costs", *i.files, "--override", PLAN.overrides),
        *("--benchmarks", Path(o[0]).parents[1] / "benchmarks", *beside(o, "costs")),
    ],
    log="costs/costs",
    watched=[PLAN.overrides],
)
# Figures of each file, as many as its domain draws.
for name in PLAN.config.experiments:
    made(
        f"figures_{name}",
        {"file": local(experiment_file(name)), "reported": REPORTED, "runs": PLAN.read_by_figures(name)},
        drawn(name),
        lambda w, i, o, name=name: ["figures", i.file, *of_runs(i, o), *beside(o, name)],
        log=f"figures/{name}",
        needs="figures",
        environment=PLAN.environment(name),
        watched=[PLAN.overrides, PLAN.file_digest(name)],
    )
# Of environments that conda has made; without it all jobs run in one.
for name in PLAN.environments if CONDA else []:
    made(
        f"versions_{name}",
        {"made": [*PLAN.tables, *PLAN.figures]},
        [f"<results>/versions/{name}.json"],
        lambda w, i, o: ["versions", "--output", *o],
        log=f"versions/{name}",
        needs="provenance",
        environment=name,
    )
made(
    "provenance",
    {
        "made": [*PLAN.tables, *PLAN.figures],
        "environments": [f"<results>/versions/{name}.json" for name in PLAN.environments if CONDA],
    },
    ["<results>/provenance.json"],
    lambda w, i, o: [
        *(
            "provenance",
            "--config-hash",
            PLAN.config_hash(),
            "--benchmarks",
            Path(o[0]).parent / "benchmarks",
        ),
        *("--environment", *i.environments, "--snakemake", snakemake_version, "--output", *o),
    ],
    log="provenance/provenance",
    watched=[PLAN.config_hash()],
)
# Pages of what else is text, for the report: readable in it as they are, with nothing to load.
made(
    "page",
    {"table": "<results>/tables/{name}.md"},
    [
        shown(
            "<results>/pages/{name}.html", PAGE.format("table"), "Experiments", "table", subcategory="{name}"
        )
    ],
    lambda w, i, o: ["page", *i, "--title", w.name, "--output", *o],
    log="page/{name}",
)
made(
    "overview",
    {
        "comparison": "<results>/tables/comparison.csv",
        "costs": "<results>/tables/costs.md",
        "provenance": "<results>/provenance.json",
    },
    [
        shown(f"<results>/pages/{name}.html", PAGE.format(name), category, shows)
        for name, category, shows in (
            ("comparison", "Beside the papers", "reported values, ours, and verdicts"),
            ("costs", "Costs and provenance", "time and memory"),
            ("provenance", "Costs and provenance", "commit, versions, machine"),
        )
    ],
    lambda w, i, o: ["overview", *i, "--output-folder", Path(o[0]).parent],
    log="overview/overview",
)
# The papers' guarantees in numbers: each study is run once, then put into a table and a figure.
THEORY = {"category": "Theory", "subcategory": "{theory}"}
made(
    "theory",
    {"study": lambda w: local(theory_file(w.theory))},
    ["<results>/theory/{theory}.json"],
    lambda w, i, o: ["theory", *i, "--override", PLAN.theory_overrides(w.theory), "--output", *o],
    log="theory/{theory}",
    watched=[ask(PLAN.theory_overrides)],
)
FIGURE = "<results>/figures/theory_{theory}.png"
made(
    "theory_report",
    {"result": "<results>/theory/{theory}.json"},
    [
        *table_files("theory_{theory}"),
        shown(FIGURE, PAGE.format("theory_figure"), shows="bounds and what was measured", **THEORY),
    ],
    lambda w, i, o: ["theory-report", *i, *beside(o, f"theory_{w.theory}"), "--figure", o[3]],
    log="theory_report/{theory}",
)
made(
    "theory_page",
    {"table": "<results>/tables/theory_{theory}.md"},
    [shown("<results>/pages/theory_{theory}.html", PAGE.format("theory_table"), shows="table", **THEORY)],
    lambda w, i, o: ["page", *i, "--title", f"Theory: {w.theory}", "--output", *o],
    log="theory_page/{theory}",
)


for name, entry in REPORTS.items():

    rule:
        name:
            name
        input:
            **entry.inputs,
        output:
            *entry.outputs,
        log:
            f"<logs>/{entry.log}.log",
        benchmark:
            f"<benchmarks>/{entry.log}.tsv"
        localrule: entry.needs.local
        conda:
            f"../../envs/{entry.environment}.yaml"
        threads: 1
        resources:
            mem_mb=memory(entry.needs),
            runtime=minutes(entry.needs),
            gpu=0,
        params:
            *entry.watched,
            path=on_path,
            command=entry.command,
        shell:
            "{params.path} OMP_NUM_THREADS={threads} flowtilt {params.command} > {log:q} 2>&1"
