"""Measures the engine: decode, prefill, start-up and memory, beside the unquantized model and the machine's limit.

    python -m pipeline.bench --build build/embedded        (make bench builds first)

Warm-up first, then both models in turn, repetition by repetition, so that drift of a shared machine hits both; medians
with their spread. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import SafetensorsCheckpoint
from model.cpu import available_cores, family
from model.engine import Engine
from model.program import torch_version
from model.tokenizer import Tokenizer
from pipeline.bandwidth import read_bandwidth
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries

PROMPTS = (128, 512)
OUTPUT_TOKENS = 64
FIRST_TOKEN = """
import re, sys
from serving.__main__ import main
main(sys.argv[1:])
print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
"""Asks for one token, then prints the process's resident memory in kB, mapped weights included."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table to standard output and JSON as its last line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build/embedded", help="a build folder with engine and checkpoint"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: every core")
    options = parser.parse_args(arguments)
    quiet_libraries()  # before what imports them
    from model.networks import float_network

    torch.set_num_threads(options.threads)
    engine = Engine.load(options.build / "engine")
    network = float_network(SafetensorsCheckpoint(options.build / "checkpoint"), torch.bfloat16)
    plain = Engine(network, Tokenizer.load(options.build / "engine"), engine.context)
    figures = {f"prompt_{count}": _speeds(engine, plain, count, options.repetitions) for count in PROMPTS}
    starts = [_start(options.build) for _ in range(options.repetitions)]
    bandwidth = read_bandwidth()
    ceiling = bandwidth / engine.bytes_per_token
    result = {
        "machine": {
            "cpu": family(),
            "threads": options.threads,
            "python": platform.python_version(),
            "torch": torch_version(),
        },
        "model": engine.model_id,
        **figures,
        "start_to_first_token_s": _spread([seconds for seconds, _ in starts]),
        "resident_mb": _spread([resident for _, resident in starts]),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "bytes_per_token": engine.bytes_per_token,
        "decode_ceiling_tokens_s": round(ceiling, 1),
        "ceiling_reached": round(figures["prompt_128"]["engine"]["decode_tokens_s"]["median"] / ceiling, 4),
    }
    _print_table(result)
    print(json.dumps(result))
    return 0


def _speeds(engine: Engine, plain: Engine, prompt_tokens: int, repetitions: int) -> dict[str, Any]:
    from pipeline.gate_latency import measure

    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, 10000, (repetitions + 1, prompt_tokens), generator=random).tolist()
    timed = [[measure(model, prompt, OUTPUT_TOKENS) for model in (engine, plain)] for prompt in prompts][1:]

    def figures(which: int) -> dict[str, Any]:
        return {
            "prefill_tokens_s": _spread([prompt_tokens / pair[which][0] for pair in timed]),
            "decode_tokens_s": _spread([1 / pair[which][1] for pair in timed]),
        }

    ratio = _spread([pair[1][1] / pair[0][1] for pair in timed])
    return {"engine": figures(0), "unquantized_bf16_eager": figures(1), "decode_ratio": ratio}


def _start(build: Path) -> tuple[float, float]:
    """Wall seconds from starting a process to its first generated token, and its resident memory then, in MB."""
    asked = ["ask", "I look up.", "--no-cache", "--max-tokens", "1", "--build", str(build)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", FIRST_TOKEN, *asked], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1e3


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['model']} on {result['machine']['cpu']}, {result['machine']['threads']} threads")
    for count in PROMPTS:
        for model, figures in result[f"prompt_{count}"].items():
            for figure, spread in figures.items() if model != "decode_ratio" else [("", figures)]:
                name = f"prompt {count:4}  {model} {figure}"
                print(f"  {name:60} {spread['median']:9.2f}   ({spread['least']:.2f} to {spread['most']:.2f})")
    start = result["start_to_first_token_s"]
    spread = f"({start['least']:.2f} to {start['most']:.2f})"
    print(f"  {'process start to first token, s':60} {start['median']:9.2f}   {spread}")
    print(f"  {'its resident memory, mapped weights included, MB':60} {result['resident_mb']['median']:9.1f}")
    print(f"  {'memory limit of decoding, tokens/s':60} {result['decode_ceiling_tokens_s']:9.1f}")
    print(f"  {'share of it reached':60} {result['ceiling_reached']:9.1%}")


if __name__ == "__main__":
    sys.exit(main())
