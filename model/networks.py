"""Networks from folders: the float reference, the canonical int4 folder, and the engine's packed weights.

The canonical folder (kind "int4") is portable: for each matrix `NAME.values` (bytes, see `quantization.pack_nibbles`,
or int8) and `NAME.scales`, for each norm the tensor itself. The head is always stored under its own name, even when
the checkpoint ties it to the embedding, because the two may have different widths.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from model.architecture import Architecture
from model.artifact import read_manifest
from model.checkpoint import EVERY, Checkpoint
from model.int4_linear import Dense, Packing, Weight, pack
from model.llama import HeadWeights, LayerWeights, Network
from model.quantization import Quantized, unpack_nibbles
from model.shards import stored_names

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
HEAD_ROWS = 16384
"""Of the output head that a streamed network holds at once."""
Rows = slice | Tensor


def source_of(name: str, architecture: Architecture) -> str:
    """The checkpoint's tensor behind a name: a tied head is the embedding."""
    return EMBEDDING if name == HEAD and architecture.tied_head else name


class Int4Folder:
    """A verified canonical folder; tensors are read lazily by name."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder, "int4")
        self.folder = folder
        self.architecture = Architecture.from_dict(self.manifest["architecture"])
        self._file_of = stored_names(folder)

    @property
    def names(self) -> frozenset[str]:
        """Every stored tensor; a quantized matrix has two, `NAME.values` and `NAME.scales`."""
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def matrix(self, name: str, rows: Rows = EVERY) -> Quantized | Tensor:
        """A matrix as stored: quantized, or the float tensor itself where the recipe keeps 16 bits."""
        if name in self._file_of:
            return self.tensor(name)[rows]
        values, scales = self.tensor(f"{name}.values")[rows], self.tensor(f"{name}.scales")[rows]
        return (
            Quantized(unpack_nibbles(values), scales, 4)
            if values.dtype == torch.uint8
            else Quantized(values, scales, 8)
        )

    def float_matrix(self, name: str, dtype: torch.dtype = torch.float32, rows: Rows = EVERY) -> Tensor:
        """The weight that the stored matrix stands for; exact in float64, values times float32 scales."""
        stored = self.matrix(name, rows)
        return stored.dequantize(dtype) if isinstance(stored, Quantized) else stored.to(dtype)


class _Weights(NamedTuple):
    """How an eager network's weights are read."""

    architecture: Architecture
    tensor: Callable[[str], Tensor]
    rows: Callable[[str, Rows], Tensor]
    """Of the embedding."""
    matrix: Callable[[str, Rows], Dense]


def float_network(checkpoint: Checkpoint, dtype: torch.dtype, *, streamed: bool = False) -> Network:
    """The unquantized network, computed eagerly in `dtype`: the reference of every gate.

    Streamed, weights are read when they are used and not kept.
    """
    arch = checkpoint.architecture

    def read(name: str, rows: Rows = EVERY) -> Tensor:
        source = source_of(name, arch)
        tensor = checkpoint.tensor(source, rows) if isinstance(rows, slice) else checkpoint.tensor(source)[rows]
        return tensor.to(dtype)

    return _eager_network(_Weights(arch, read, read, lambda name, rows: Dense(read(name, rows))), dtype, streamed)


def quantized_network(
    folder: Int4Folder, *, as_served: bool, products: torch.dtype = torch.float32, streamed: bool = False
) -> Network:
    """The quantized weights in float32 arithmetic; `as_served` adds the engine's int8 activations and bf16 KV cache.

    With products in float64, as on x86-64, it says what the engine says there, word for word.
    Streamed, weights are read when they are used and not kept.
    """

    def matrix(name: str, rows: Rows) -> Dense:
        int8 = as_served and name not in folder.names
        return Dense(folder.float_matrix(name, products if int8 else torch.float32, rows), int8_activations=int8)

    weights = _Weights(
        folder.architecture,
        lambda name: folder.tensor(name).float(),
        lambda name, rows: folder.float_matrix(name, rows=rows),
        matrix,
    )
    return _eager_network(weights, torch.bfloat16 if as_served else torch.float32, streamed)


def _eager_network(weights: _Weights, kv_dtype: torch.dtype, streamed: bool) -> Network:
    arch = weights.architecture
    layers = _Read(arch.layers, lambda layer: _layer(weights, layer))
    if streamed:
        parts = [slice(first, first + HEAD_ROWS) for first in range(0, arch.vocab, HEAD_ROWS)]
        head = _Read(len(parts), lambda part: HeadWeights(weights.tensor(NORM), weights.matrix(HEAD, parts[part])))
        return Network(arch, lambda tokens_T: weights.rows(EMBEDDING, tokens_T), layers, head, kv_dtype)
    table, whole = weights.rows(EMBEDDING, EVERY), HeadWeights(weights.tensor(NORM), weights.matrix(HEAD, EVERY))
    return Network(arch, table.__getitem__, list(layers), [whole], kv_dtype)


class _Read(Sequence[Any]):
    """Parts of a network, each read when it is asked for."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def _layer(weights: _Weights, layer: int) -> LayerWeights:
    def fused(names: list[str]) -> Dense:
        parts = [weights.matrix(name, EVERY) for name in names]
        return Dense(torch.cat([part.weight for part in parts]), parts[0].int8_activations) if names[1:] else parts[0]

    parts: dict[str, Any] = {
        field: weights.tensor(names[0]) if field.endswith("norm") else fused(names)
        for field, names in layer_names(layer).items()
    }
    return LayerWeights(**parts)


def layer_names(layer: int) -> dict[str, list[str]]:
    """The checkpoint's tensors behind each field of `LayerWeights`, in the order in which they are fused."""
    prefix = f"model.layers.{layer}."
    parts = {
        "attention_norm": ["input_layernorm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "output": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return {field: [f"{prefix}{part}.weight" for part in names] for field, names in parts.items()}


def packed_weights(
    folder: Int4Folder, packing: Packing, layers: Iterable[int] | None = None
) -> Iterator[tuple[str, Weight | Tensor]]:
    """The engine's weights by name, `layers.3.qkv` and so on, one matrix in memory at a time.

    `layers` are all layers' numbers, through something that shows progress, if wanted.
    A tied embedding is left out if the head holds the same rows: they are read from there.
    """
    embedding, head = folder.matrix(EMBEDDING), folder.matrix(HEAD)
    if not (folder.architecture.tied_head and _bits(embedding) == _bits(head)):
        yield "embedding", _packed(embedding, packing)
    yield "head", _packed(head, packing)
    yield "norm", folder.tensor(NORM).float()
    del embedding, head
    for layer in range(folder.architecture.layers) if layers is None else layers:
        for field, names in layer_names(layer).items():
            if field.endswith("norm"):
                yield f"layers.{layer}.{field}", folder.tensor(names[0]).float()
            else:
                yield f"layers.{layer}.{field}", _packed(_fuse([folder.matrix(name) for name in names]), packing)


def _bits(stored: Quantized | Tensor) -> int:
    return stored.bits if isinstance(stored, Quantized) else 8 * stored.itemsize


def _packed(stored: Quantized | Tensor, packing: Packing) -> Weight:
    return pack(stored.values, stored.scales, stored.bits, packing) if isinstance(stored, Quantized) else Dense(stored)


def _fuse(parts: list[Quantized | Tensor]) -> Quantized:
    """Matrices stacked along their outputs; exact, since groups run along the inputs."""
    quantized = [part for part in parts if isinstance(part, Quantized)]
    assert len(quantized) == len(parts), "decoder layers are always quantized"
    values, scales = [part.values for part in quantized], [part.scales for part in quantized]
    return Quantized(torch.cat(values), torch.cat(scales), quantized[0].bits)
