#!/bin/sh
# What both images hold, in a Debian with Python: the packages that jobs need, pinned, and Snakemake; of flowtilt
# nothing, since jobs run the sources of the clone. Run in a folder with pyproject.toml and envs/constraints.txt;
# TORCH_INDEX is an index with other builds of torch, such as those for the CPU alone.
set -eu
apt-get update
# Beside git what the packages link to: libgomp torch, the others RDKit, which draws with them.
apt-get install --yes --no-install-recommends git libexpat1 libgomp1 libx11-6 libxext6 libxrender1
rm -rf /var/lib/apt/lists/*
pins="-c $PWD/envs/constraints.txt"
if [ -n "${TORCH_INDEX:-}" ]; then
	python3 -m pip install --no-cache-dir $pins --index-url "$TORCH_INDEX" torch torchvision
fi
# The package itself has to be there for its extras to be named: an empty one, taken away at once.
empty=$(mktemp -d)
sed '/^readme/d; /^license/d' pyproject.toml >"$empty/pyproject.toml"
mkdir -p "$empty/src/flowtilt"
cd "$empty"
python3 -m pip install --no-cache-dir $pins '.[workflow,molecules,parallel,images]'
python3 -m pip uninstall --yes flowtilt
cd /
rm -rf "$empty"
