"""Measures the engine beside llama.cpp, the unquantized model and the machine's limit.

    python -m pipeline.bench.engine --build build/embedded        (make bench builds first)

Warm-up first, then every engine in turn, repetition by repetition, so that drift of a shared machine hits all alike;
medians with their spread, and ratios taken within a repetition. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import SafetensorsCheckpoint
from model.cpu import available_cores, family
from model.engine import Engine
from model.program import torch_version
from model.tokenizer import Tokenizer
from pipeline.bandwidth import read_bandwidth
from pipeline.bench.peer import LlamaCpp, peer_file
from pipeline.configs import CONFIGS
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries, say

CASES = ((1, 128), (1, 512), (8, 128))
"""Sequences that decode together, and tokens of each one's prompt."""
OUTPUT_TOKENS = 48
FIRST_TOKEN = """
import re, sys, time
from model.sampling import Sampling
from serving.answer import Storyteller
from serving.settings import Settings

storyteller = Storyteller(Settings(build=sys.argv[1]))
asked = [{"role": "user", "content": "I look up."}]
next(storyteller.reply(asked, Sampling(max_tokens=1), use_cache=False).pieces)
print(time.time())
weights = inside = 0
for line in open("/proc/self/smaps"):
    if re.match(r"[0-9a-f]+-", line):
        inside = "/engine/weights-" in line
    elif inside and line.startswith("Rss:"):
        weights += int(line.split()[1])
print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1], weights)
"""
"""Asks for one token; prints when it came, then the resident memory and the mapped weights' part of it, in kB."""

Measure = Callable[[int, int, int], Mapping[str, float]]
"""Sequences, prompt tokens, tokens: tokens per second of "prefill" and "decode"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables to standard output and JSON as its last line."""
    options = _options(arguments)
    quiet_libraries()  # before what imports them
    from model.networks import float_network

    torch.set_num_threads(options.threads)
    engines = {f"int4 ({build.name})": Engine.load(build / "engine", sequences=8) for build in options.build}
    first = next(iter(engines.values()))
    network = float_network(SafetensorsCheckpoint(options.build[0] / "checkpoint"), torch.bfloat16)
    plain = Engine(network, Tokenizer.load(options.build[0] / "engine"), first.context, sequences=8)
    with ExitStack() as stack:
        subjects: dict[str, Measure] = {name: _measure_engine(engine) for name, engine in engines.items()}
        subjects["bf16, eager torch"] = _measure_engine(plain)
        peer = stack.enter_context(LlamaCpp(options.gguf, options.threads)) if options.gguf else None
        if peer:
            subjects["llama.cpp"] = peer.measure
        say(f"measuring {', '.join(subjects)}: {options.repetitions} repetitions")
        cases = {f"{n} x {prompt}": _case(subjects, n, prompt, options.repetitions) for n, prompt in CASES}
        version = peer.version if peer else None
    starts = [_start(options.build[0]) for _ in range(options.repetitions + 1)][1:]
    bandwidth = read_bandwidth()
    result = {
        "machine": {"cpu": family(), "threads": options.threads, "python": platform.python_version()},
        "versions": {"torch": torch_version(), "llama-cpp-python": version},
        "model": first.model_id,
        "cases": cases,
        "start_to_first_token_s": spread([seconds for seconds, _, _ in starts]),
        "resident_mb": spread([resident for _, resident, _ in starts]),
        "resident_beyond_weights_mb": spread([resident - weights for _, resident, weights in starts]),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "ceilings": {name: _ceiling(engine, bandwidth, cases, name) for name, engine in engines.items()},
    }
    _print(result, list(subjects))
    print(json.dumps(result))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--build", type=Path, nargs="+", default=[ROOT / "build/embedded"],
                        help="build folders with an engine, the first with its checkpoint")  # fmt: skip
    parser.add_argument("--config", choices=CONFIGS, default="embedded", help="whose source, if GGUF, llama.cpp runs")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp runs instead")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: every core")
    options = parser.parse_args(arguments)
    options.gguf = options.gguf or peer_file(options.config)
    return options


def _measure_engine(engine: Engine) -> Measure:
    def measure(sequences: int, prompt_tokens: int, tokens: int) -> Mapping[str, float]:
        random = torch.Generator().manual_seed(0)
        prompts = torch.randint(1000, 10000, (sequences, prompt_tokens), generator=random).tolist()
        engine.forget()
        open_ = [engine.begin(prompt, prompt_tokens + tokens + 1) for prompt in prompts]
        start = time.perf_counter()
        for sequence in open_:
            _append(engine, [sequence])
        between = time.perf_counter()
        for _ in range(tokens):
            _append(engine, open_)
        end = time.perf_counter()
        for sequence in open_:
            engine.end(sequence)
        return {
            "prefill": sequences * prompt_tokens / (between - start),
            "decode": sequences * tokens / (end - between),
        }

    return measure


def _append(engine: Engine, sequences: list[Any]) -> None:
    """The likeliest token to each sequence."""
    for sequence, logits_V in zip(sequences, engine.advance(sequences), strict=True):
        assert logits_V is not None, "prompts are no longer than a step"
        sequence.tokens.append(int(logits_V.argmax()))


def _case(subjects: Mapping[str, Measure], sequences: int, prompt: int, repetitions: int) -> dict[str, Any]:
    """Every subject's speeds, the engines' ratios to the others, and of several sequences to one of them."""
    rounds: list[dict[str, Mapping[str, float]]] = []
    gains: dict[str, list[float]] = {name: [] for name in subjects if sequences > 1 and name.startswith("int4")}
    for _ in range(repetitions + 1):
        rounds.append({})
        for name, measure in subjects.items():
            rounds[-1][name] = measure(sequences, prompt, OUTPUT_TOKENS)
            if name in gains:
                alone = measure(1, prompt, OUTPUT_TOKENS)
                gains[name].append(rounds[-1][name]["decode"] / alone["decode"])
    rounds = rounds[1:]  # the first warms up
    speeds = {
        name: {step: spread([one[name][step] for one in rounds]) for step in ("prefill", "decode")} for name in subjects
    }
    ratios = {
        f"{name} / {other}": {
            step: spread([one[name][step] / one[other][step] for one in rounds]) for step in ("prefill", "decode")
        }
        for name in subjects
        for other in subjects
        if name.startswith("int4") and not other.startswith("int4")
    }
    return {"tokens_s": speeds, "ratios": ratios, "together": {name: spread(one[1:]) for name, one in gains.items()}}


def _ceiling(engine: Engine, bandwidth: float, cases: Mapping[str, Any], name: str) -> dict[str, float]:
    decode = cases["1 x 128"]["tokens_s"][name]["decode"]["median"]
    limit = bandwidth / engine.bytes_per_token
    return {
        "bytes_per_token": engine.bytes_per_token,
        "decode_tokens_s": round(limit, 1),
        "reached": round(decode / limit, 4),
    }


def _start(build: Path) -> tuple[float, float, float]:
    """Seconds from starting a process to its first token; then its resident memory, and the weights' part, in MB."""
    start = time.time()
    command = [sys.executable, "-c", FIRST_TOKEN, str(build)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    came, resident, weights = (float(number) for number in done.stdout.split())
    return came - start, resident / 1e3, weights / 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def _print(result: dict[str, Any], subjects: Sequence[str]) -> None:
    machine = result["machine"]
    print(f"{result['model']} on {machine['cpu']}, {machine['threads']} threads; medians (least to most)\n")
    for case, figures in result["cases"].items():
        print(f"{case} tokens of prompt")
        for name in subjects:
            _row(name, [figures["tokens_s"][name][step] for step in ("prefill", "decode")], "tokens/s", 0)
        for name, ratio in figures["ratios"].items():
            _row(name, [ratio["prefill"], ratio["decode"]], "ratio", 2)
        for name, gain in figures["together"].items():
            _row(f"{name}, together / one", [gain], "ratio of decoding", 2)
        print()
    _row("start to first token", [result["start_to_first_token_s"]], "s", 2)
    _row("resident memory", [result["resident_mb"]], "MB", 0)
    _row("beyond the mapped weights", [result["resident_beyond_weights_mb"]], "MB", 0)
    print(f"  read bandwidth {result['read_bandwidth_gb_s']} GB/s")
    for name, ceiling in result["ceilings"].items():
        print(
            f"  {name}: {ceiling['bytes_per_token'] / 1e6:.1f} MB per token, so at most {ceiling['decode_tokens_s']} "
            f"tokens/s; {ceiling['reached']:.0%} reached"
        )


def _row(name: str, spreads: Sequence[Mapping[str, float]], unit: str, digits: int) -> None:
    cells = [f"{one['median']:9.{digits}f} ({one['least']:.{digits}f} to {one['most']:.{digits}f})" for one in spreads]
    print(f"  {name:48} {'   '.join(cells)} {unit}")


if __name__ == "__main__":
    sys.exit(main())
