"""Compares our recipes with torchao's and llama.cpp's int4 on one float model, weights alone.

    make bench-quality

First the decoder layers' matrices are rounded, and embedding, head and activations stay the reference's; then the
embedding or the head alone. So nothing but that rounding differs. Text and figures are the quality gate's, intervals of
95 %. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import gguf
import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

import pipeline.quantize
from model.architecture import Architecture
from model.checkpoint import EVERY, Checkpoint, SafetensorsCheckpoint
from model.networks import EMBEDDING, HEAD, Int4Folder, float_network, source_of
from model.quantization import quantize
from model.recipe import Method, Recipe, Rotation, Scheme
from model.rotation import Rotated
from model.tokenizer import Tokenizer
from pipeline.configs import CONFIGS, named_config
from pipeline.fingerprint import ROOT
from pipeline.gate_quality import compare, quality_of, read_through
from pipeline.progress import quiet_libraries, say
from pipeline.stages import CALIBRATION_TEXT, GATE_TEXT
from pipeline.statistics import Interval
from pipeline.windows import Text, check_apart, text_windows

Rounding = Callable[[str, Tensor], Tensor]
"""A layer's matrix by its name and as it is to what its rounded form stands for, in float32."""
STEPS = 14
"""Candidate scales of the data-free search: the recipes' default."""
CONFIDENCE = 0.95


class Subject(NamedTuple):
    """What is compared."""

    name: str
    scheme: Scheme
    rounding: Rounding
    rounds: Callable[[str], bool]
    """Whether a matrix of that name is rounded."""
    bits: float
    """Per rounded weight, scales included."""
    turned: bool = False
    """Whether the network is rotated first."""
    seconds: float = 0.0
    """That it took before its matrices are read."""


class Rounded:
    """A checkpoint of which a subject's matrices are rounded when they are read, which takes `seconds`."""

    def __init__(self, checkpoint: Checkpoint, subject: Subject) -> None:
        self._checkpoint = Rotated(checkpoint) if subject.turned else checkpoint
        self.architecture, self.seconds = replace(checkpoint.architecture, tied_head=False), 0.0
        self._subject = subject

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        tensor = self._checkpoint.tensor(source_of(name, self._checkpoint.architecture), rows)
        start = time.perf_counter()
        if tensor.dim() == 2 and self._subject.rounds(name):
            tensor = self._subject.rounding(name, tensor)
        self.seconds += time.perf_counter() - start
        return tensor


def in_layers(name: str) -> bool:
    """Whether a tensor belongs to a decoder layer."""
    return ".layers." in name


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


def searched(bits: int, scheme: Scheme) -> Rounding:
    """Our data-free rounding."""

    def rounding(name: str, weight_OI: Tensor) -> Tensor:
        group = Recipe(scheme=scheme, embedding_bits=8, head_bits=8).group(weight_OI.shape[1])
        return quantize(name, weight_OI, bits, group, STEPS).dequantize()

    return rounding


def subjects(checkpoint: Path, architecture: Architecture, scratch: Path) -> Iterator[Subject]:
    """Ours are quantized when they are asked for."""
    for scheme, group in zip(get_args(Scheme), (32, None), strict=True):
        bits = 4 + (16 / group if group else row_scale_bits(architecture))
        for algorithm in IntxChooseQParamsAlgorithm:
            name = "round to nearest" if algorithm == IntxChooseQParamsAlgorithm.AFFINE else algorithm.value
            yield Subject(f"torchao, {name}", scheme, torchao(algorithm, group), in_layers, bits)
        if group:
            yield Subject("llama.cpp, Q4_0", scheme, llama_cpp, in_layers, bits)
        for rotation in get_args(Rotation):
            for method in get_args(Method):
                recipe = Recipe(scheme=scheme, embedding_bits=16, head_bits=16, method=method, rotation=rotation)
                folder, start = scratch / f"{scheme}-{method}-{rotation}", time.perf_counter()
                folder.mkdir()
                text, report = ROOT / CALIBRATION_TEXT, folder / "report.json"
                pipeline.quantize.run(recipe, text, checkpoint, folder / "int4", report)
                turned, seconds = rotation == "hadamard", time.perf_counter() - start
                name = f"ours, {method}{', rotated' if turned else ''}"
                yield Subject(name, scheme, stored(folder / "int4"), in_layers, bits, turned, seconds)
    scheme = get_args(Scheme)[0]
    for part, names in (("embedding", {EMBEDDING}), ("head", {HEAD})):
        for bits in (8, 4):
            yield Subject(f"{part} in {bits} bits", scheme, searched(bits, scheme), names.__contains__, bits + 0.5)


def row_scale_bits(architecture: Architecture) -> float:
    """Bits per weight of one float32 scale for each row, over the layers' matrices."""
    shapes = [shape for name, shape in architecture.tensor_shapes().items() if in_layers(name) and len(shape) == 2]
    return 32 * sum(rows for rows, _ in shapes) / sum(rows * inputs for rows, inputs in shapes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table to standard output and JSON as its last line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", choices=CONFIGS, default="embedded", help="whose windows of text to read")
    parser.add_argument("--checkpoint", type=Path, help="a fetched model (default: of build/CONFIG)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    folder = options.checkpoint or ROOT / "build" / options.config / "checkpoint"
    gate = named_config(options.config).gate_quality
    text = Text.read(ROOT / GATE_TEXT)
    check_apart(Text.read(ROOT / CALIBRATION_TEXT), text)
    windows = text_windows(text, Tokenizer.load(folder), gate.window_tokens)[: gate.windows_max]
    checkpoint = SafetensorsCheckpoint(folder)
    reference = float_network(checkpoint, torch.float32, streamed=True)
    states, rows = read_through(reference, windows), []
    print(f"{len(windows)} windows of {gate.window_tokens} tokens\n")
    print("| scheme | rounding | bits | mean KL, nats | 99.9th percentile | same top-1 | perplexity ratio | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for subject in subjects(folder, checkpoint.architecture, Path(scratch)):
            say(f"{subject.scheme}: {subject.name}")
            rounded = Rounded(checkpoint, subject)
            network = float_network(rounded, torch.float32, streamed=True)
            quality = quality_of(compare(reference, states, network, windows), CONFIDENCE)
            seconds = subject.seconds or rounded.seconds
            row = {"scheme": subject.scheme, "rounding": subject.name, "bits": round(subject.bits, 3)}
            rows.append({**row, "seconds": round(seconds, 1), **_plain(quality._asdict())})
            shares = [f"{100 * share:.1f}" for share in quality.top1]
            cells = [_cell(quality.kl, 4), _cell(quality.kl_p999, 2), f"{shares[0]} % ({shares[1]} to {shares[2]})"]
            first = [subject.scheme, subject.name, f"{subject.bits:.2f}"]
            print("|", " | ".join([*first, *cells, _cell(quality.ratio, 4), f"{seconds:.0f}"]), "|", flush=True)
    print(json.dumps({"checkpoint": str(folder.name), "rows": rows}))
    return 0


def _cell(interval: Interval, digits: int) -> str:
    value, lower, upper = (f"{one:.{digits}f}" for one in interval)
    return f"{value} ({lower} to {upper})"


def _plain(figures: dict[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval.rounded() for name, interval in figures.items()}


if __name__ == "__main__":
    sys.exit(main())
