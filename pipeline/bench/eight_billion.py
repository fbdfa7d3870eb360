"""Measures quantizing, export and serving at the size of Llama 3.1 8B, on a checkpoint of its shapes.

    make bench-8b

Beside each figure stands what limits it: the disk's and the search's rate for quantizing, memory's for decoding.
Needs 30 GB of disk. With --evaluate the quality gate reads 8192 tokens as well, which takes half an hour. The last
line is JSON.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model.artifact import read_json
from model.cpu import available_cores, family
from model.scale_search import search_scales
from pipeline.bench.measured import measured
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries, say

SERVE = """
import json, statistics, sys, time
start = time.time()
import torch
from pathlib import Path
from model.engine import Engine
from pipeline.bandwidth import read_bandwidth
torch.set_num_threads(int(sys.argv[2]))
begin = time.time()
engine = Engine.load(Path(sys.argv[1]))
loaded = time.time()
tokens = engine.greedy(engine.tokenizer.encode("Hello"), 9)
next(tokens)
first = time.time()
for _ in tokens:
    pass
rounds = []
for _ in range(5):
    bandwidth = read_bandwidth()
    engine.forget()
    tokens = engine.greedy(engine.tokenizer.encode("Hello"), 17)
    next(tokens)
    before = time.perf_counter()
    count = sum(1 for _ in tokens)
    rounds.append((count / (time.perf_counter() - before), bandwidth))
print(json.dumps({
    "import_s": begin - start, "load_s": loaded - begin, "first_token_s": first - loaded,
    "bytes_per_token": engine.bytes_per_token, "rounds": rounds,
}))
"""
"""Opens the engine, and decodes in turn with reading memory."""
STREAM = "--set fetch.sha256=none --set fetch.streamed=false".split()
UNJUDGED = [
    part
    for limit in ("kl_mean_max=1000", "same_top1_min=0", "perplexity_ratio_max=1000", "windows_max=32", "text=own")
    for part in ("--set", f"gate_quality.{limit}")
]
"""Noise is no language: how far int4 is from it says nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what it measures as it goes, and JSON as its last line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.eight_billion", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build/8b-shaped", help="made when it is missing")
    parser.add_argument("--build", type=Path, default=ROOT / "build/8b", help="build folder")
    parser.add_argument("--evaluate", action="store_true", help="run the quality gate on 8192 tokens too")
    options = parser.parse_args(arguments)
    quiet_libraries()
    if not options.checkpoint.exists():
        measured([sys.executable, "-m", "pipeline.bench.synthetic", str(options.checkpoint)], ROOT, os.environ)
    source = [*STREAM, "--set", f"fetch.source=folder:{options.checkpoint}"]
    common = ["--config", "llama31-8b", "--build", str(options.build), *source, *UNJUDGED]
    _stage("fetch", options.build, common)
    result: dict[str, object] = {"cpu": family(), "threads": available_cores()}
    result["limits"] = _show("limits", {
        "disk_mb_s": _disk_rate(next(options.checkpoint.glob("*.safetensors"))) / 1e6,
        "search_mweights_s": _search_rate() / 1e6,
    })  # fmt: skip
    size = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    quantize = _stage("quantize", options.build, common, "--force")
    result["quantize"] = _show("quantize", {**quantize, "read_mb_s": size / 1e6 / quantize["seconds"]})
    if options.evaluate:
        result["evaluate"] = _show("evaluate 8192 tokens", _stage("gate_quality", options.build, common, "--force"))
    result["export"] = _show("export", _stage("export", options.build, common))
    result["serve"] = _show("serve", _serve(options.build))
    print(json.dumps(result))
    return 0


def _stage(name: str, build: Path, common: Sequence[str], *extra: str) -> dict[str, float]:
    """Runs a stage; the seconds it took, and the most memory of the process."""
    say(f"{name} …")
    ended = measured([sys.executable, "-m", "pipeline", "run", name, *common, *extra], ROOT, os.environ)
    receipt = read_json(build / f".receipts/{name}.json")
    return {"seconds": receipt["seconds"], "peak_gib": ended.peak_mb * 1e6 / 2**30}


def _serve(build: Path) -> dict[str, float]:
    """The second of two starts, so that the weights are in the page cache."""
    command = [sys.executable, "-c", SERVE, str(build / "engine"), str(available_cores())]
    measured(command, ROOT, os.environ)
    ended = measured(command, ROOT, os.environ)
    found = json.loads(re.findall(r"^\{.*\}$", ended.text, re.MULTILINE)[-1])
    shares = [speed * found["bytes_per_token"] / bandwidth for speed, bandwidth in found["rounds"]]
    return {
        **{name: found[name] for name in ("import_s", "load_s", "first_token_s", "bytes_per_token")},
        "decode_tokens_s": statistics.median(speed for speed, _ in found["rounds"]),
        "read_bandwidth_gb_s": statistics.median(bandwidth for _, bandwidth in found["rounds"]) / 1e9,
        "of_bandwidth": statistics.median(shares),
        "of_bandwidth_least": min(shares),
        "of_bandwidth_most": max(shares),
        "peak_gib": ended.peak_mb * 1e6 / 2**30,
    }


def _disk_rate(file: Path, size: int = 2 << 30) -> float:
    """Bytes per second of reading a file that is not in the page cache."""
    with file.open("rb", buffering=0) as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer, start, left = bytearray(16 << 20), time.perf_counter(), size
        while left > 0 and (count := opened.readinto(buffer)):
            left -= count
    return (size - left) / (time.perf_counter() - start)


def _search_rate() -> float:
    """Weights per second of the scale search alone."""
    weight = torch.randn(1024, 4096)
    search_scales(weight, 32, 14)
    start = time.perf_counter()
    for _ in range(10):
        search_scales(weight, 32, 14)
    return 10 * weight.numel() / (time.perf_counter() - start)


def _show(title: str, figures: Mapping[str, float]) -> Mapping[str, float]:
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print(f"{title}: " + ", ".join(f"{name} {value:g}" for name, value in rounded.items()), flush=True)
    return rounded


if __name__ == "__main__":
    sys.exit(main())
