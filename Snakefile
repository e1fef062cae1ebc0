# From pretraining to the tables beside the papers' numbers. A rule calls one stage of the command `flowtilt`;
# config/config.yaml says what is run, and flowtilt.pipeline.plan which jobs that takes.
from snakemake.utils import min_version

min_version("9.17")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


# Validates the configuration and every experiment, before any job starts.
include: "workflow/rules/common.smk"
include: "workflow/rules/functions.smk"
# In a file of its own: a Snakemake too old for path variables is refused above, before it reads this.
include: "workflow/rules/paths.smk"


onstart:
    begin()


wildcard_constraints:
    name=one_of(PLAN.files),
    theory=one_of(PLAN.theory),


localrules:
    table,
    compare,
    costs,
    theory_report,
    theory_page,
    provenance,
    page,
    overview,


include: "workflow/rules/run.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/theory.smk"


rule all:
    default_target: True
    input:
        PLAN.tables,
        PLAN.figures,
        PLAN.runs,
        PLAN.pages,
        "<results>/provenance.json",


rule tables:
    input:
        PLAN.tables,
        PLAN.runs,


rule figures:
    input:
        PLAN.figures,
        PLAN.runs,


rule pretrained_models:
    input:
        PLAN.pretrained_models,


rule theories:
    input:
        PLAN.theories,


# Each experiment alone: snakemake --cores all risk_averse_2d
for name in PLAN.config.experiments:

    rule:
        name:
            name
        input:
            PLAN.tables_of(name),
            PLAN.figures_of(name),
            PLAN.run_files(name),


onerror:
    print(
        "The last line of a failed job's log says what to do. A log without such a line: the job was killed from "
        "outside, mostly for want of memory; give it more, --set-resources RULE:mem_mb=... What was finished is "
        "kept, and a training goes on where it stopped: mend the cause and give the same command again."
    )
