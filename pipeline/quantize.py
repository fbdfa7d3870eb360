"""Quantizes the float model to int4, by its weights alone or fitted to text, and reports the error of every tensor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.artifact import read_json, write_json, write_manifest
from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from model.networks import EMBEDDING, HEAD, source_of
from model.quantization import Quantized, check_finite, pack_nibbles, quantization_error, quantize
from model.recipe import Recipe
from model.shards import write_shards
from model.tokenizer import Tokenizer
from pipeline.calibration import WINDOW, calibrated_layers
from pipeline.progress import track
from pipeline.windows import text_windows


def run(config: Recipe, text: Path, checkpoint_folder: Path, int4: Path, report: Path) -> None:
    """Writes the portable int4 folder (kind "int4") and the report of errors. `text` is for recipes that calibrate."""
    checkpoint = SafetensorsCheckpoint(checkpoint_folder)
    layers: Iterator[dict[str, Quantized]] = iter(())
    if config.method != "search":
        windows = text_windows(text, Tokenizer.load(checkpoint_folder), WINDOW)
        if not windows:
            raise InputError(f"{text}: not one window of {WINDOW} tokens to calibrate with; give more text")
        layers = calibrated_layers(checkpoint, config, windows)
    int4.mkdir()
    errors: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        write_shards(_quantized(checkpoint, config, layers, errors), int4)
    for name in ("tokenizer.json", "chat.json"):
        shutil.copyfile(checkpoint_folder / name, int4 / name)
    source = read_json(checkpoint_folder / "source.json")
    stored = sum(path.stat().st_size for path in int4.glob("*.safetensors"))
    weights = sum(torch.Size(shape).numel() for shape in checkpoint.architecture.tensor_shapes().values())
    facts = {**source, "recipe": vars(config), "bits_per_weight": round(8 * stored / weights, 4)}
    write_manifest(int4, "int4", facts)
    write_json(report, {"recipe": vars(config), "bits_per_weight": facts["bits_per_weight"], "tensors": errors})


def _quantized(
    checkpoint: SafetensorsCheckpoint,
    recipe: Recipe,
    layers: Iterator[dict[str, Quantized]],
    errors: dict[str, dict[str, float]],
) -> Iterator[tuple[str, Tensor]]:
    """The stream of stored tensors; fills `errors` on the way. `layers`: those that are fitted to text, in order."""
    fitted: dict[str, Quantized] = {}
    arch = checkpoint.architecture
    names = [*arch.tensor_shapes(), *([HEAD] if arch.tied_head else [])]
    for name in track(names, "quantizing"):
        weight = checkpoint.tensor(source_of(name, arch))
        bits = {EMBEDDING: recipe.embedding_bits, HEAD: recipe.head_bits}.get(name, 4)
        if weight.dim() == 1 or bits == 16:
            check_finite(name, weight)
            yield name, weight
            continue
        if name in (EMBEDDING, HEAD) or recipe.method == "search":
            quantized = quantize(name, weight, bits, recipe.group(weight.shape[1]), recipe.search_steps)
        else:
            fitted = fitted or next(layers)
            quantized = fitted.pop(name)
        errors[name] = quantization_error(weight, quantized)._asdict()
        yield f"{name}.values", pack_nibbles(quantized.values) if bits == 4 else quantized.values
        yield f"{name}.scales", quantized.scales
