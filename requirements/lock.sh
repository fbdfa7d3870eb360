#!/bin/sh
# Pins every dependency of pyproject.toml for each platform. torch's own CUDA requirements are left out: its CPU build
# has none.
set -eu
cd "$(dirname "$0")"
for pair in x86_64:2.13.0 aarch64:2.10.0; do
    machine=${pair%%:*} constraint=$(mktemp) lock=$(mktemp)
    echo "torch==${pair##*:}" >"$constraint"
    uv pip compile --quiet ../pyproject.toml --extra pipeline --extra dev --python-version 3.11 \
        --python-platform "$machine-manylinux_2_28" --no-header --no-annotate --no-emit-index-url \
        --constraint "$constraint" --output-file "$lock"
    {
        echo "# Exact versions for Linux on $machine; made by \"make lock\" from pyproject.toml. torch is the CPU build."
        grep -vE '^(nvidia|cuda|triton)' "$lock"
    } >"linux-$machine.txt"
    rm -f "$constraint" "$lock"
done
