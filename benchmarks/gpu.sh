#!/bin/sh
# What a GPU must show, in ten minutes: that every kind of layer is right there and never waits, and the benchmarks in
# which it differs from a CPU. Phi-3-mini's sizes are in linear.py, merged.py and training_step.py.
#
#     pip install -e ".[bench]" && sh benchmarks/gpu.sh [folder for the results]
#
# With `--check` in the place of the folder all of it runs on a CPU in its quick form, to see that it would run.
set -eu
cd "$(dirname "$0")/.."
scripts="linear merged experts bank training_step"

if [ "${1-}" = "--check" ]; then
    out=$(mktemp -d)
    python benchmarks/on_device.py --device cpu
    for script in $scripts; do
        python "benchmarks/$script.py" --quick --seconds 0.01 --out "$out"
    done
    rm -r "$out"
    exit
fi

out=${1-benchmarks/results/gpu}
mkdir -p "$out"
python benchmarks/on_device.py --device cuda
for script in $scripts; do
    python "benchmarks/$script.py" --device cuda --seconds 3 --out "$out"
done
