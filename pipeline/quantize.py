"""Quantizes the float model to int4, by its weights alone or fitted to text, and reports the error of every tensor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.artifact import read_json, write_json, write_manifest
from model.checkpoint import EVERY, Checkpoint
from model.errors import InputError
from model.networks import EMBEDDING, HEAD, layer_names, source_of
from model.quantization import (
    ErrorSums,
    QuantizationError,
    Quantized,
    check_finite,
    pack_nibbles,
    quantization_error,
    quantize,
)
from model.recipe import Recipe
from model.rotation import Rotated
from model.shards import stored_names, write_shards
from model.tokenizer import Tokenizer
from pipeline.calibration import WINDOW, calibrated_layers
from pipeline.hub_checkpoint import open_checkpoint
from pipeline.licences import copy_licences
from pipeline.progress import track
from pipeline.windows import Text, text_windows

BLOCK_ROWS = 16384
"""Of a matrix that are read at a time."""


def run(config: Recipe, text: Path, checkpoint_folder: Path, int4: Path, report: Path) -> None:
    """Writes the portable int4 folder (kind "int4") and the report of errors. `text` is for recipes that calibrate.

    Goes on from the shards that an earlier run has left in `int4`.
    """
    windows = [] if config.method == "search" else _calibration(config, text, checkpoint_folder)
    int4.mkdir(exist_ok=True)
    errors = _Errors(report.with_suffix(".partial.json"))
    with open_checkpoint(checkpoint_folder) as opened, torch.inference_mode():
        checkpoint = Rotated(opened) if config.rotation == "hadamard" else opened
        tensors = _Tensors(config, checkpoint, frozenset(stored_names(int4)), errors)
        if windows:
            tensors.layers = calibrated_layers(checkpoint, config, windows, tensors.first_layer, report.parent)
        write_shards(tensors.stream(), int4)
    for name in ("tokenizer.json", "chat.json"):
        shutil.copyfile(checkpoint_folder / name, int4 / name)
    copy_licences(checkpoint_folder, int4)
    source = read_json(checkpoint_folder / "source.json")
    stored = sum(path.stat().st_size for path in int4.glob("*.safetensors"))
    weights = sum(torch.Size(shape).numel() for shape in checkpoint.architecture.tensor_shapes().values())
    facts = {
        **source,
        "architecture": checkpoint.architecture.to_dict(),
        "recipe": vars(config),
        "bits_per_weight": round(8 * stored / weights, 4),
    }
    write_manifest(int4, "int4", facts)
    write_json(report, {"recipe": vars(config), "bits_per_weight": facts["bits_per_weight"], "tensors": errors.found})


def _calibration(recipe: Recipe, text: Path, tokenizer: Path) -> list[Tensor]:
    windows = text_windows(Text.read(text), Tokenizer.load(tokenizer), WINDOW)
    if not windows:
        raise InputError(f"{text}: not one window of {WINDOW} tokens to calibrate with; give more text")
    return windows[: max(1, recipe.calibration_tokens // WINDOW)]


class _Errors:
    """The error of every tensor, kept in a file for a run that resumes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.found: dict[str, dict[str, float]] = read_json(file) if file.exists() else {}

    def add(self, name: str, error: QuantizationError) -> None:
        self.found[name] = error._asdict()
        write_json(self._file, self.found)


class _Tensors:
    """What is still to be stored, one tensor after the other in the order of the network."""

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, done: frozenset[str], errors: _Errors) -> None:
        self._recipe, self._checkpoint, self._errors = recipe, checkpoint, errors
        arch = checkpoint.architecture
        self._names = [*arch.tensor_shapes(), *([HEAD] if arch.tied_head else [])]
        self._done = done
        self._fitted: dict[str, Quantized] = {}
        self.layers: Iterator[dict[str, Quantized]] = iter(())
        """Those that are fitted to text, from the first that is not done."""

    @property
    def first_layer(self) -> int:
        """The first of which something is missing."""
        layers = range(self._checkpoint.architecture.layers)
        names = {layer: [name for parts in layer_names(layer).values() for name in parts] for layer in layers}
        return next((layer for layer in layers if any(self._missing(name) for name in names[layer])), len(layers))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name in track(self._names, "quantizing"):
            if self._missing(name):
                yield from ((part, tensor) for part, tensor in self._stored(name) if part not in self._done)

    def _missing(self, name: str) -> bool:
        return not (name in self._done or {f"{name}.values", f"{name}.scales"} <= self._done)

    def _stored(self, name: str) -> list[tuple[str, Tensor]]:
        recipe = self._recipe
        bits = {EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}.get(name, 4)
        if name.endswith("norm.weight") or bits == 16:
            weight = self._rows(name, EVERY)
            check_finite(name, weight)
            return [(name, weight.bfloat16() if weight.dtype == torch.float32 and weight.dim() == 2 else weight)]
        if name in (EMBEDDING, HEAD) or recipe.method == "search":
            values, scales = self._searched(name, bits)
        else:
            values, scales = self._calibrated(name)
        return [(f"{name}.values", values), (f"{name}.scales", scales)]

    def _searched(self, name: str, bits: int) -> tuple[Tensor, Tensor]:
        """Values and scales as stored, from some rows of the matrix at a time: a head of 8B is a gigabyte."""
        sums, parts = ErrorSums(), []
        for rows in self._blocks(name):
            weight_OI = self._rows(name, rows)
            quantized = quantize(
                name, weight_OI, bits, self._recipe.group(weight_OI.shape[1]), self._recipe.search_steps
            )
            sums.add(weight_OI, quantized)
            parts.append((pack_nibbles(quantized.values) if bits == 4 else quantized.values, quantized.scales))
        self._errors.add(name, sums.total())
        values, scales = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(scales)

    def _calibrated(self, name: str) -> tuple[Tensor, Tensor]:
        while name not in self._fitted:
            self._fitted = next(self.layers)
        quantized = self._fitted.pop(name)
        self._errors.add(name, quantization_error(self._rows(name, EVERY), quantized))
        return pack_nibbles(quantized.values), quantized.scales

    def _rows(self, name: str, rows: slice) -> Tensor:
        return self._checkpoint.tensor(source_of(name, self._checkpoint.architecture), rows)

    def _blocks(self, name: str) -> list[slice]:
        arch = self._checkpoint.architecture
        count = arch.tensor_shapes()[source_of(name, arch)][0]
        return [slice(first, first + BLOCK_ROWS) for first in range(0, count, BLOCK_ROWS)]
