# Leads to the workflow, for whoever looks for it here; its profile is found from here by the link `profiles`.
include: "workflow/Snakefile"


workflow.default_target = "all"  # Snakemake forgets that of a file that is included
