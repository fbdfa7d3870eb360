#!/usr/bin/env bash
# The arm64 image on an x86-64 machine: its engine exported, its packages installed, its server run, all by QEMU.
#
# The programs are exported on an emulated Arm CPU (tests/arm64/run.sh) from the int4 weights of build/embedded, and the
# image is built and verified by an engine that starts arm64 programs with QEMU. What its model says has gone through
# KleidiAI: the server refuses an engine that is packed for anything else. Times mean nothing here.
set -euo pipefail
cd "$(dirname "$0")/../.."
made=${EMERALD_IMAGE_MADE:-build/embedded}
small=build/arm64/small-build

stamp() {
    cat requirements/linux-aarch64.txt tests/image/small_build.py model/*.py "$made"/int4/manifest.json \
        serving/{cache,certificate,embedder,guards,text}.py | sha256sum
}

if [ "$(cat $small/made-by 2>/dev/null)" != "$(stamp)" ]; then
    mkdir -p build/arm64
    tests/arm64/run.sh max python3 -m tests.image.small_build "$made" >$small.tar
    rm -rf $small
    mkdir $small
    tar --extract --file $small.tar --directory $small
    rm $small.tar
    stamp >$small/made-by
fi
tests/arm64/run.sh max cat /proc/cpuinfo >build/arm64/cpuinfo
export EMERALD_IMAGE_BUILD=$small EMERALD_IMAGE_CPUINFO=build/arm64/cpuinfo
exec tests/image/engine.sh arm64 .venv/bin/python -m pytest tests/image/test_image.py \
    -k "fit or labels or lie_below or flipped" "$@"
