#!/usr/bin/env bash
# The configuration llama31-8b, whole, on a checkpoint of Llama 3.1 8B's shapes that a hub on 127.0.0.1 serves, in 16 GB of
# memory (a control group) and 14 GB of disk (a file with a file system). Only the numbers in the weights are synthetic.
#
#     tests/eight_billion/run.sh [arguments of "python -m pipeline run"]        needs root; some 40 GB for the checkpoint
#
# Ends with the most memory and disk that were in use.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
served=build/8b-shaped
disk=build/8b-disk
group=emerald-8b-$$
model=meta-llama/Llama-3.1-8B-Instruct
revision=$($python -c 'from pipeline.configs import llama31_8b; print(llama31_8b().fetch.source.partition("@")[2])')
port=${PORT:-8085}

[ -d $served ] || $python -m pipeline.bench.synthetic $served
if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
    cgroup=/sys/fs/cgroup/$group limit=memory.max peak=memory.peak
else
    cgroup=/sys/fs/cgroup/memory/$group limit=memory.limit_in_bytes peak=memory.max_usage_in_bytes
fi
hub='' watcher=''
finish() {
    # shellcheck disable=SC2086
    { kill $hub $watcher && wait $hub $watcher; } 2>/dev/null || true
    echo "most memory in the control group, page cache included: $(cat "$cgroup/$peak") bytes of 16000000000"
    echo "most disk: $(cat $disk.most) KiB of $((14000000000 / 1024))"
    rmdir "$cgroup" || true
    umount $disk || true
    rm -f $disk.img $disk.most
}
trap finish EXIT
echo 0 >$disk.most
mkdir -p $disk
truncate -s 14000000000 $disk.img
mkfs.ext4 -q -F -m 0 $disk.img
mount -o loop $disk.img $disk

mkdir "$cgroup"
echo 16000000000 >"$cgroup/$limit"

$python -m tests.hub $served --repository $model --revision "$revision" --port "$port" 2>/dev/null &
hub=$!
most=0
while sleep 1; do
    used=$(df -k --output=used $disk | tail -1)
    if [ "$used" -gt "$most" ]; then most=$used && echo "$most" >$disk.most; fi
done &
watcher=$!

# Random weights are no language: how far int4 is from them says nothing, and no limit is set to it.
lax="--set gate_quality.kl_mean_max=1000 --set gate_quality.same_top1_min=0 --set gate_quality.perplexity_ratio_max=1000"
# What a hub serves besides models is not here.
lax="$lax --set gate_quality.text=own"
export HF_ENDPOINT=http://127.0.0.1:$port HF_HOME=$disk/hub HF_HUB_DISABLE_XET=1 TMPDIR=$PWD/$disk/tmp
mkdir -p "$TMPDIR"
# shellcheck disable=SC2086,SC2016
bash -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$cgroup" \
    $python -m pipeline run --config llama31-8b --build $disk/build $lax "$@"
cat $disk/build/reports/summary.md
