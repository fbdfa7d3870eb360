#!/usr/bin/env bash
# Prints how many instructions a decoded token costs on emulated Arm, see count_instructions.py. Builds the root first.
set -euo pipefail
cd "$(dirname "$0")/../.."

tests/arm64/run.sh max true
command -v qemu-aarch64 >/dev/null || apt-get install -qq -y qemu-user >/dev/null # the static one takes no plugins
plugin=$(mktemp --suffix=.so)
trap 'rm -f "$plugin"' EXIT
gcc -O2 -shared -fPIC tests/arm64/count.c -o "$plugin"
QEMU_CPU=max qemu-aarch64 -L build/arm64/root -E PYTHONPATH=/packages -plugin "$plugin" \
    build/arm64/root/usr/bin/python3 tests/arm64/count_instructions.py
