"""Judges the engine's speed against the unquantized model in the same run, interleaved, with the ceiling beside it.

Shared machines drift, so nothing is judged by an absolute time unless the configuration asks for it: each repetition
times both models on the same prompt, one after the other, and the bootstrap draws whole repetitions. The ceiling is
memory: a decoded token reads every weight once, so bytes per token over measured bandwidth is the least time it can
take.
"""

import time
from pathlib import Path

import torch

from model.artifact import manifest_digest
from model.checkpoint import SafetensorsCheckpoint
from model.cpu import available_cores
from model.engine import Engine
from model.networks import float_network
from model.tokenizer import Tokenizer
from pipeline.bandwidth import read_bandwidth
from pipeline.configs import GateLatencyConfig
from pipeline.gate_quality import text_windows
from pipeline.progress import track
from pipeline.statistics import Interval, bootstrap
from pipeline.verdict import Check, write_report


def run(config: GateLatencyConfig, text: Path, checkpoint: Path, engine_folder: Path, report: Path) -> list[Check]:
    """Writes the report and returns the checks."""
    torch.set_num_threads(config.threads or available_cores())
    engine = Engine.load(engine_folder)
    network = float_network(SafetensorsCheckpoint(checkpoint), torch.bfloat16)
    unquantized = Engine(network, Tokenizer.load(engine_folder), engine.context)
    prompts = [window.tolist() for window in text_windows(text, engine.tokenizer, config.prompt_tokens)]
    for warmed in (engine, unquantized):
        measure(warmed, prompts[0], 4)
    samples = [
        [value for model in (engine, unquantized) for value in measure(model, prompt, config.output_tokens)]
        for prompt in track([prompts[i % len(prompts)] for i in range(config.repetitions)], "timing both models")
    ]

    def interval(numerator: int, denominator: int | None = None) -> Interval:
        if denominator is None:
            return bootstrap(lambda mean: mean[..., numerator], samples, config.confidence)
        return bootstrap(lambda mean: mean[..., numerator] / mean[..., denominator], samples, config.confidence)

    ttft, tpot, plain_ttft, plain_tpot = (interval(column) for column in range(4))
    speedup, ttft_ratio = interval(3, 1), interval(0, 2)
    checks = [
        Check(
            name="decode speedup, lower limit", value=speedup.lower, limit=config.decode_speedup_min, bound="at least"
        ),
        Check(name="TTFT ratio, upper limit", value=ttft_ratio.upper, limit=config.ttft_ratio_max, bound="at most"),
    ]
    for name, seconds, limit in (("TTFT", ttft, config.ttft_ms_max), ("TPOT", tpot, config.tpot_ms_max)):
        if limit is not None:
            checks.append(
                Check(name=f"{name} ms, upper limit", value=1e3 * seconds.upper, limit=limit, bound="at most")
            )
    bytes_per_token, bandwidth = engine.bytes_per_token, read_bandwidth()
    write_report(
        report,
        "latency",
        checks,
        engine_manifest=manifest_digest(engine_folder),
        threads=torch.get_num_threads(),
        prompt_tokens=config.prompt_tokens,
        output_tokens=config.output_tokens,
        repetitions=config.repetitions,
        ttft_s=ttft.rounded(),
        tpot_s=tpot.rounded(),
        decode_tokens_per_s=round(1 / tpot.value, 2),
        unquantized={
            "what": "bf16, eager torch",
            "ttft_s": plain_ttft.rounded(),
            "tpot_s": plain_tpot.rounded(),
            "decode_tokens_per_s": round(1 / plain_tpot.value, 2),
        },
        decode_speedup=speedup.rounded(4),
        ttft_ratio=ttft_ratio.rounded(4),
        ceiling={
            "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
            "bytes_per_token": bytes_per_token,
            "decode_tokens_per_s": round(bandwidth / bytes_per_token, 1),
            "reached": round(bytes_per_token / tpot.value / bandwidth, 4),
        },
    )
    return checks


def measure(engine: Engine, prompt: list[int], output_tokens: int) -> tuple[float, float]:
    """Time to first token and time per output token, in seconds, of a greedy reply that ignores stop tokens."""
    engine.forget()
    tokens = list(prompt)
    start = time.perf_counter()
    tokens.append(int(engine.next_logits(tokens).argmax()))
    first = time.perf_counter()
    for _ in range(output_tokens - 1):
        tokens.append(int(engine.next_logits(tokens).argmax()))
    return first - start, (time.perf_counter() - first) / (output_tokens - 1)
