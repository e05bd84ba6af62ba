#!/bin/sh
# Write constraints.txt: the newest versions that all extras agree on, for every platform, with jax held
# at JAX (what the accelerators we test on have). The file names no index, so any index can serve it.
set -eu
cd "$(dirname "$0")/.."

uv=${UV:-.venv/bin/uv}
held=$(mktemp)
trap 'rm -f "$held" constraints.txt.new' EXIT
echo "jax==${JAX:-0.11.2}" >"$held"

echo "# Written by \`make constraints\`: the versions that installs, tests and lint use here." >constraints.txt.new
"$uv" pip compile --quiet --universal --python-version 3.12 --all-extras --constraints "$held" \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml >>constraints.txt.new
mv constraints.txt.new constraints.txt
