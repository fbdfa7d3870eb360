#!/bin/sh
# Pins every dependency of pyproject.toml for each platform, in versions that every Python we run on installs without
# building them: the newest that the oldest Python takes, then tried with the others. torch's own CUDA requirements are
# left out: its CPU build has none.
set -eu
cd "$(dirname "$0")"
pin() { # MACHINE PYTHON FILE OPTIONS...
    machine=$1 python=$2 file=$3
    shift 3
    uv pip compile --quiet ../pyproject.toml --extra pipeline --extra dev --python-version "$python" \
        --python-platform "$machine-manylinux_2_28" --only-binary :all: --no-header --no-annotate --no-emit-index-url \
        --output-file "$file" "$@"
}
for pair in x86_64:2.13.0 aarch64:2.10.0; do
    machine=${pair%%:*} torch=$(mktemp) lock=$(mktemp) other=$(mktemp)
    echo "torch==${pair##*:}" >"$torch"
    pin "$machine" 3.11 "$lock" --constraint "$torch"
    for python in 3.12 3.13 3.14; do
        pin "$machine" $python "$other" --constraint "$lock"
        cmp -s "$lock" "$other" || { diff "$lock" "$other" >&2; echo "error: Python $python needs other packages" >&2; exit 1; }
    done
    {
        echo "# Exact versions for Linux on $machine; made by \"make lock\" from pyproject.toml. torch is the CPU build."
        grep -vE '^(nvidia|cuda|triton)' "$lock"
    } >"linux-$machine.txt"
    rm -f "$torch" "$lock" "$other"
done
