#!/usr/bin/env bash
# Snakemake runs this once in a new environment made from images.yaml, in the project's folder: the
# package itself is the one thing that no channel has.
set -euo pipefail
python -m pip install --no-deps --no-build-isolation --editable .
