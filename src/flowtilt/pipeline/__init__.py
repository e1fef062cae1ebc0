"""From one checked configuration to the files of its runs; it plans without Snakemake, numpy or torch."""
