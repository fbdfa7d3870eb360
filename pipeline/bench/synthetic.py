"""Writes a checkpoint of random weights with Llama 3.1 8B's shapes, for measuring at full size.

    python -m pipeline.bench.synthetic build/8b-shaped
    python -m pipeline run quantize --config llama31-8b --build build/8b \
        --set fetch.source=folder:build/8b-shaped --set fetch.sha256=none

Only the numbers are synthetic: names, shapes, types, four shards and their index are those on the hub. Like real ones,
weights have a few input channels that are much larger than the rest. The tokenizer is the embedded model's.
"""

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.architecture import Architecture, RopeScaling
from model.artifact import read_json, write_json
from pipeline.fingerprint import ROOT
from pipeline.progress import say, track

LLAMA31_8B = Architecture(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    mlp=14336,
    vocab=128256,
    context=131072,
    rope_theta=500000.0,
    norm_eps=1e-5,
    tied_head=False,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
)
"""From the model's config.json."""
SHARDS = 4
OUTLIERS = 0.005
"""Share of input channels that are ten times as large."""
ROWS = 4096
"""Of a matrix that are in memory at a time."""


def write_checkpoint(folder: Path, architecture: Architecture, tokenizer: Path, seed: int = 0) -> None:
    """Writes the folder; the same seed gives the same bytes. `tokenizer` is a Hugging Face-style folder."""
    folder.mkdir(parents=True)
    shapes = architecture.tensor_shapes()
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    most, random = -(-sum(sizes.values()) // SHARDS), torch.Generator().manual_seed(seed)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and len(shards) < SHARDS and sum(sizes[one] for one in shards[-1]) + sizes[name] > most:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    progress = iter(track(shapes, "writing tensors"))
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header, start = {}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, start + sizes[name]]}
            start += sizes[name]
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                next(progress)
                for rows in _random_rows(shapes[name], random):
                    out.write(rows.view(torch.uint8).numpy().data)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    ends = {name: value for name, value in read_json(tokenizer / "config.json").items() if name.endswith("_token_id")}
    write_json(folder / "config.json", {**architecture.to_config_json(), **ends})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)


def _random_rows(shape: tuple[int, ...], random: torch.Generator) -> Iterator[Tensor]:
    """A tensor of unit gain in bf16, some rows at a time."""
    inputs = shape[-1]
    large = torch.rand(inputs, generator=random) < OUTLIERS
    scale = torch.where(large, 10.0, 1.0)
    if len(shape) == 1:
        yield (scale * (1 + 0.1 * torch.randn(inputs, generator=random))).to(torch.bfloat16)
        return
    scale = scale / scale.square().sum().sqrt()
    for start in range(0, shape[0], ROWS):
        rows = torch.empty(min(ROWS, shape[0] - start), inputs).normal_(generator=random)
        yield rows.mul_(scale).to(torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes 16 GB in a few minutes."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.synthetic", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--layers", type=int, default=LLAMA31_8B.layers, help="fewer for a smaller file (default 32)")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "build/embedded/checkpoint",
                        help="folder with a tokenizer (default: the embedded configuration's checkpoint)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.folder.exists():
        parser.error(f"{options.folder} exists: remove it, or name another")
    if not (options.tokenizer / "tokenizer.json").exists():
        parser.error(
            f"no {options.tokenizer / 'tokenizer.json'}: run make pipeline first, or name one with --tokenizer"
        )
    write_checkpoint(options.folder, replace(LLAMA31_8B, layers=options.layers), options.tokenizer)
    say(f"  {options.folder}: {sum(file.stat().st_size for file in options.folder.iterdir()) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
