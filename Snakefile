# From pretraining to the tables beside the papers' numbers. Each stage's rules are in their own
# file; a rule calls one stage of the command `flowtilt`. config/config.yaml says what is run.
from snakemake.utils import min_version

min_version("9.17")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


# Validates the configuration and every experiment, before any job starts.
include: "workflow/rules/common.smk"
# In a file of its own: a Snakemake too old for path variables is refused above, before it reads this.
include: "workflow/rules/paths.smk"


onstart:
    check_cluster()
    write_configs()


wildcard_constraints:
    experiment=one_of(EXPERIMENTS),
    method=one_of(METHODS),
    name=one_of(FILES),
    seed=r"\d+",
    theory=one_of(THEORY),


localrules:
    resolution,
    table,
    compare,
    costs,
    experiment_figures,
    functional_figures,
    study_figure,
    theory_report,
    theory_page,
    provenance,
    page,
    overview,


include: "workflow/rules/pretrain.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/theory.smk"


if MOLECULE_FILES:

    include: "workflow/rules/molecules.smk"


if IMAGES:

    include: "workflow/rules/images.smk"


rule all:
    default_target: True
    input:
        TABLES,
        FIGURES,
        RUNS,
        PAGES,
        "<results>/provenance.json",


rule tables:
    input:
        TABLES,
        RUNS,


rule figures:
    input:
        FIGURES,
        RUNS,


rule pretrained_models:
    input:
        MODELS,


rule theories:
    input:
        [file for file in TABLES + FIGURES + RUNS if "theory" in file],


# Each experiment alone: snakemake --cores all risk_averse_2d
for name in config["experiments"]:

    rule:
        name:
            name
        input:
            tables_of(name),
            figures_of(name),
            run_files(name),


onerror:
    print(
        "The last line of a failed job's log says what to do. A log without such a line: the job was killed from "
        "outside, mostly for want of memory; give it more, --set-resources RULE:mem_mb=... What was finished is "
        "kept, and a training goes on where it stopped: mend the cause and give the same command again."
    )
