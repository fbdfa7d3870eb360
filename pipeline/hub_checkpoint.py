"""A checkpoint whose weights stay on the hub: one shard at a time is on the disk, while its tensors are read.

A fetched folder of this kind holds `hub.json` instead of weights. Shards lie in `.hub` beside the folder, so that a
download that was cut short is taken up by the next run; each is deleted when the next one is needed.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Size, Tensor

from model.artifact import read_json, write_json
from model.checkpoint import (
    EVERY,
    INDEX,
    Checkpoint,
    SafetensorsCheckpoint,
    check_names,
    check_shapes,
    declared_architecture,
    read_tensor,
    weight_map,
)
from model.errors import InputError
from pipeline.adapter import Adapted, Adapter
from pipeline.hub import HubModel, Shard
from pipeline.progress import say

HUB = "hub.json"
ADAPTER = Path("adapter/storyteller.safetensors")
"""In a folder of its own, so that nobody takes it for a part of the weights."""
KEPT_BYTES = 1 << 30
"""Most that is kept in memory of a layer that two shards share; a layer of Llama 3.1 8B has 436 MB."""


def leave_on_hub(model: HubModel, folder: Path) -> None:
    """Writes `hub.json` into a folder that holds the model's index and config: every shard, its size and SHA-256."""
    if not (folder / INDEX).exists():
        raise InputError(f"{model.repository} holds no {INDEX}: its weights are one file; set fetch.streamed=false")
    files = weight_map(folder / INDEX)
    check_names(folder, declared_architecture(folder), files)
    shards = {file: model.shard(file)._asdict() for file in sorted(set(files.values()))}
    write_json(folder / HUB, {**model._asdict(), "shards": shards})


@contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """A fetched or tuned checkpoint, wherever its weights are; an adapter beside them is merged into them.

    After an error, the next run finds what was downloaded.
    """
    adapter = Adapter.read(folder / ADAPTER) if (folder / ADAPTER).exists() else None

    def adapted(checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint if adapter is None else Adapted(checkpoint, adapter)

    if not (folder / HUB).exists():
        yield adapted(SafetensorsCheckpoint(folder))
        return
    checkpoint = HubCheckpoint(folder, folder.parent / ".hub")
    yield adapted(checkpoint)
    checkpoint.close()


class HubCheckpoint:
    """Downloads a shard into `scratch` when one of its tensors is asked for, and deletes it for the next.

    Read in the order of layers, every shard comes once: of a layer that two shards share, what the first holds is kept.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        facts = read_json(folder / HUB)
        self.architecture = declared_architecture(folder)
        self._folder, self._scratch = folder, scratch
        self._model = HubModel(facts["repository"], facts["revision"])
        self._shards = {file: Shard(**shard) for file, shard in facts["shards"].items()}
        self._file_of = weight_map(folder / INDEX)
        self._kept: dict[str, Tensor] = {}
        self._at_hand: str | None = None

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        file = self._file_of[name]
        if name in self._kept:
            return self._kept[name][rows]
        if file != self._at_hand:
            self._keep(_layer(name))
            self._download(file)
        return read_tensor(self._path(file), name, rows)

    def close(self) -> None:
        """Deletes what is on the disk."""
        self._at_hand = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _keep(self, layer: str) -> None:
        """Takes what the shard at hand holds of a layer into memory, if it is no more than a large layer would be."""
        of_layer = [name for name, file in self._file_of.items() if file == self._at_hand and _layer(name) == layer]
        shapes = self.architecture.tensor_shapes()
        small = 2 * sum(Size(shapes[name]).numel() for name in of_layer if name in shapes) <= KEPT_BYTES
        self._kept = {name: read_tensor(self._path(self._file_of[name]), name) for name in of_layer if small}

    def _download(self, file: str) -> None:
        """Deletes all other shards, and what there is of them; what there is of this one is taken up."""
        self._at_hand = None
        for other in self._scratch.glob("*"):
            if other.name != file:
                shutil.rmtree(other)
        shard = self._shards[file]
        say(f"  {file} from the hub: {shard.bytes / 1e9:.2f} GB")
        self._model.download(file, shard, self._path(file).parent)
        check_shapes(self._path(file), self._folder, self.architecture)
        self._at_hand = file

    def _path(self, file: str) -> Path:
        """Each in a folder of its own, with the client's notes about it."""
        return self._scratch / file / file


def _layer(name: str) -> str:
    """`model.layers.3`, or the tensor's own name outside of the layers."""
    return ".".join(name.split(".")[:3])
