"""Judges the engine's speed against the unquantized model in the same run, interleaved, with the ceiling beside it.

Shared machines drift, so nothing is judged by an absolute time unless the configuration asks for it: each repetition
times both models on the same prompt, one after the other, and the bootstrap draws whole repetitions. The ceiling is
memory: a decoded token reads every weight once, so bytes per token over measured bandwidth is the least time it can
take.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.architecture import Architecture
from model.artifact import manifest_digest
from model.checkpoint import EVERY
from model.cpu import available_cores
from model.engine import Engine
from model.llama import Network
from model.networks import float_network
from model.tokenizer import Tokenizer
from pipeline.bandwidth import read_bandwidth
from pipeline.configs import GateLatencyConfig
from pipeline.progress import track
from pipeline.statistics import Interval, bootstrap, column
from pipeline.verdict import Check, write_report
from pipeline.windows import Text, text_windows

HELD_BYTES = 4 << 30
"""Of an unquantized model: far more than any cache, and what a machine can spare beside the engine."""


class Compared(NamedTuple):
    """Both models' times in seconds and their ratios, with intervals."""

    ttft: Interval
    tpot: Interval
    plain_ttft: Interval
    plain_tpot: Interval
    speedup: Interval
    ttft_ratio: Interval


def run(config: GateLatencyConfig, text: Path, engine_folder: Path, report: Path) -> list[Check]:
    """Writes the report and returns the checks."""
    torch.set_num_threads(config.threads or available_cores())
    engine = Engine.load(engine_folder)
    network = unquantized_network(engine.architecture)
    unquantized = Engine(network, Tokenizer.load(engine_folder), engine.context)
    windows = text_windows(Text.read(text), engine.tokenizer, config.prompt_tokens)
    prompts = [window.tolist() for window in windows]
    compared = compare(engine, unquantized, prompts, config)
    checks = _checks(compared, config)
    facts = {
        "engine_manifest": manifest_digest(engine_folder),
        "threads": torch.get_num_threads(),
        "prompt_tokens": config.prompt_tokens,
        "output_tokens": config.output_tokens,
        "repetitions": config.repetitions,
    }
    write_report(report, "latency", checks, **facts, **_figures(compared, engine.bytes_per_token))
    return checks


def unquantized_network(architecture: Architecture) -> Network:
    """A bf16 network of that architecture, as good as the real one for timing: its weights are noise.

    Of a large model some layers are held, and each stands for several.
    """
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in architecture.tensor_shapes().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    others = sum(sizes.values()) - layer * architecture.layers
    held = min(architecture.layers, max(1, (HELD_BYTES - others) // layer))
    network = float_network(Noise(replace(architecture, layers=held)), torch.bfloat16)
    layers = [network.layers[index % held] for index in range(architecture.layers)]
    return Network(architecture, network.embed, layers, network.head_parts, torch.bfloat16)


class Noise:
    """A checkpoint of random weights."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._noise = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        shape = self.architecture.tensor_shapes()[name]
        times = -(-torch.Size(shape).numel() // len(self._noise))
        return self._noise.repeat(times)[: torch.Size(shape).numel()].view(shape)[rows]


def compare(engine: Engine, unquantized: Engine, prompts: list[list[int]], config: GateLatencyConfig) -> Compared:
    """Times both models on each prompt in turn, after a warm-up."""
    for warmed in (engine, unquantized):
        measure(warmed, prompts[0], 4)
    repeated = [prompts[index % len(prompts)] for index in range(config.repetitions)]
    samples = [
        [value for model in (engine, unquantized) for value in measure(model, prompt, config.output_tokens)]
        for prompt in track(repeated, "timing both models")
    ]

    statistics = (column(0), column(1), column(2), column(3), column(3, over=1), column(0, over=2))
    return Compared(*(bootstrap(statistic, samples, config.confidence) for statistic in statistics))


def _checks(compared: Compared, config: GateLatencyConfig) -> list[Check]:
    speedup, ratio = compared.speedup.lower, compared.ttft_ratio.upper
    checks = [
        Check(name="decode speedup, lower limit", value=speedup, limit=config.decode_speedup_min, bound="at least"),
        Check(name="TTFT ratio, upper limit", value=ratio, limit=config.ttft_ratio_max, bound="at most"),
    ]
    absolute = (("TTFT", compared.ttft, config.ttft_ms_max), ("TPOT", compared.tpot, config.tpot_ms_max))
    for name, seconds, limit in absolute:
        if limit is not None:
            milliseconds = 1e3 * seconds.upper
            checks.append(Check(name=f"{name} ms, upper limit", value=milliseconds, limit=limit, bound="at most"))
    return checks


def _figures(compared: Compared, bytes_per_token: int) -> dict[str, Any]:
    bandwidth = read_bandwidth()
    return {
        "ttft_s": compared.ttft.rounded(),
        "tpot_s": compared.tpot.rounded(),
        "decode_tokens_per_s": round(1 / compared.tpot.value, 2),
        "unquantized": {
            "what": "bf16, eager torch",
            "ttft_s": compared.plain_ttft.rounded(),
            "tpot_s": compared.plain_tpot.rounded(),
            "decode_tokens_per_s": round(1 / compared.plain_tpot.value, 2),
        },
        "decode_speedup": compared.speedup.rounded(4),
        "ttft_ratio": compared.ttft_ratio.rounded(4),
        "ceiling": {
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
            "bytes_per_token": bytes_per_token,
            "decode_tokens_per_s": round(bandwidth / bytes_per_token, 1),
            "reached": round(bytes_per_token / compared.tpot.value / bandwidth, 4),
        },
    }


def measure(engine: Engine, prompt: list[int], output_tokens: int) -> tuple[float, float]:
    """Time to first token and time per output token, in seconds, of a greedy reply that ignores stop tokens."""
    engine.forget()
    tokens = engine.greedy(prompt, output_tokens)
    start = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - start, (time.perf_counter() - first) / (output_tokens - 1)
