"""Many tensors in few safetensors files: written as a stream, read as a memory map."""

import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 256 << 20
"""A shard's size; also the most memory that writing holds."""


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, stem: str = "weights") -> dict[str, str]:
    """Streams named tensors into `weights-00001.safetensors` and so on, after those that are there.

    A shard is whole or is not there. Returns each tensor's file name.
    """
    file_of: dict[str, str] = {}
    for index, shard in enumerate(_group(tensors), start=len(list(folder.glob(f"{stem}-*.safetensors"))) + 1):
        path = folder / f"{stem}-{index:05d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, partial, {"format": "pt"})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
        file_of |= dict.fromkeys(shard, path.name)
        del shard  # or it would be held until the next is full
    return file_of


def shard_files(folder: Path) -> list[Path]:
    """The shards of weights in a folder, in order."""
    return sorted(folder.glob("weights-*.safetensors"))


def stored_names(folder: Path) -> dict[str, Path]:
    """The file of every tensor in a folder's shards."""
    file_of: dict[str, Path] = {}
    for path in shard_files(folder):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    return file_of


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's shards, memory-mapped: pages are read when first touched."""
    tensors: dict[str, Tensor] = {}
    for path in shard_files(folder):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    return tensors


def _group(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
        if held >= SHARD_BYTES:
            yield shard
            shard, held = {}, 0
    if shard:
        yield shard
