"""Compares our recipes with torchao's and llama.cpp's int4 on one float model, weights alone.

    make bench-quality

Only the decoder layers' matrices are rounded; embedding, head and activations are the reference's, so that nothing but
the rounding differs. Text and figures are the quality gate's, intervals of 95 %. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import gguf
import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

import pipeline.quantize
from model.checkpoint import EVERY, Checkpoint, SafetensorsCheckpoint
from model.networks import Int4Folder, float_network
from model.recipe import Recipe
from model.tokenizer import Tokenizer
from pipeline.configs import CONFIGS, named_config
from pipeline.fingerprint import ROOT
from pipeline.gate_quality import compare, quality_of, read_through
from pipeline.progress import quiet_libraries, say
from pipeline.statistics import Interval
from pipeline.windows import CALIBRATION_TEXT, GATE_TEXT, check_apart, text_windows

Rounding = Callable[[str, Tensor], Tensor]
"""A layer's matrix by its name and as it is to what its rounded form stands for, in float32."""
Scheme = Literal["int4-g32", "int4-channel"]
METHODS: tuple[Literal["search", "weighted-search", "gptq"], ...] = ("search", "weighted-search", "gptq")
CONFIDENCE = 0.95


class Subject(NamedTuple):
    """What is compared."""

    name: str
    scheme: Scheme
    rounding: Rounding
    seconds: float = 0.0
    """That it took before its matrices are read."""


class Rounded:
    """A checkpoint whose layers' matrices are rounded when they are read, which takes `seconds`."""

    def __init__(self, checkpoint: Checkpoint, rounding: Rounding) -> None:
        self.architecture, self.seconds = checkpoint.architecture, 0.0
        self._checkpoint, self._rounding = checkpoint, rounding

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        tensor = self._checkpoint.tensor(name, rows)
        start = time.perf_counter()
        if ".layers." in name and tensor.dim() == 2:
            tensor = self._rounding(name, tensor)
        self.seconds += time.perf_counter() - start
        return tensor


def torchao(algorithm: IntxChooseQParamsAlgorithm, group: int | None) -> Rounding:
    """torchao's int4 tensor; `group` None is a row."""

    def rounding(_name: str, weight_OI: Tensor) -> Tensor:
        block = (1, group or weight_OI.shape[1])
        int4 = torch.int4  # type: ignore[attr-defined]  # not in torch's stubs
        rounded = IntxUnpackedToInt8Tensor.from_hp(
            weight_OI.float(), block, int4, intx_choose_qparams_algorithm=algorithm
        )
        weight: Tensor = rounded.dequantize()
        return weight

    return rounding


def llama_cpp(_name: str, weight_OI: Tensor) -> Tensor:
    """llama.cpp's Q4_0, by its own Python package: groups of 32 with a float16 scale."""
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.dequantize(gguf.quants.quantize(weight_OI.float().numpy(), kind), kind))


def stored(folder: Path) -> Rounding:
    """One of ours."""
    int4 = Int4Folder(folder)
    return lambda name, _: int4.float_matrix(name)


def subjects(checkpoint: Path, scratch: Path) -> Iterator[Subject]:
    """Ours are quantized when they are asked for."""
    for scheme, group in zip(get_args(Scheme), (32, None), strict=True):
        for algorithm in IntxChooseQParamsAlgorithm:
            name = "round to nearest" if algorithm == IntxChooseQParamsAlgorithm.AFFINE else algorithm.value
            yield Subject(f"torchao, {name}", scheme, torchao(algorithm, group))
        if group:
            yield Subject("llama.cpp, Q4_0", scheme, llama_cpp)
        for method in METHODS:
            recipe = Recipe(scheme=scheme, embedding_bits=16, head_bits=16, method=method)
            folder, start = scratch / f"{scheme}-{method}", time.perf_counter()
            pipeline.quantize.run(recipe, ROOT / CALIBRATION_TEXT, checkpoint, folder, folder.with_suffix(".json"))
            yield Subject(f"ours, {method}", scheme, stored(folder), time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table to standard output and JSON as its last line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench_quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", choices=CONFIGS, default="embedded", help="whose windows of text to read")
    parser.add_argument("--checkpoint", type=Path, help="a fetched model (default: of build/CONFIG)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    folder = options.checkpoint or ROOT / "build" / options.config / "checkpoint"
    gate = named_config(options.config).gate_quality
    check_apart(ROOT / CALIBRATION_TEXT, ROOT / GATE_TEXT)
    windows = text_windows(ROOT / GATE_TEXT, Tokenizer.load(folder), gate.window_tokens)[: gate.windows_max]
    checkpoint = SafetensorsCheckpoint(folder)
    reference = float_network(checkpoint, torch.float32, streamed=True)
    states, rows = read_through(reference, windows), []
    print(f"{len(windows)} windows of {gate.window_tokens} tokens\n")
    print("| scheme | rounding | mean KL, nats | 99.9th percentile | same top-1 | perplexity ratio | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for name, scheme, rounding, seconds in subjects(folder, Path(scratch)):
            say(f"{scheme}: {name}")
            rounded = Rounded(checkpoint, rounding)
            network = float_network(rounded, torch.float32, streamed=True)
            quality = quality_of(compare(reference, states, network, windows), CONFIDENCE)
            seconds = seconds or rounded.seconds
            rows.append({"scheme": scheme, "rounding": name, "seconds": round(seconds, 1)} | _plain(quality._asdict()))
            shares = [f"{100 * share:.1f}" for share in quality.top1]
            cells = [_cell(quality.kl, 4), _cell(quality.kl_p999, 2), f"{shares[0]} % ({shares[1]} to {shares[2]})"]
            print("|", " | ".join([scheme, name, *cells, _cell(quality.ratio, 4), f"{seconds:.0f}"]), "|", flush=True)
    print(json.dumps({"checkpoint": str(folder.name), "rows": rows}))
    return 0


def _cell(interval: Interval, digits: int) -> str:
    value, lower, upper = (f"{one:.{digits}f}" for one in interval)
    return f"{value} ({lower} to {upper})"


def _plain(figures: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval.rounded() for name, interval in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
