"""Float checkpoints, read lazily by tensor name: a Hugging Face-style folder or a GGUF file.

Both give the same names (Hugging Face's) and bf16-ready tensors, so nothing downstream knows where a model came
from. Opening checks the whole header (names, shapes, sizes) and no weights. Pickled checkpoints are never read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.architecture import Architecture
from model.artifact import read_json
from model.errors import InputError

INDEX = "model.safetensors.index.json"

EVERY = slice(None)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Of safetensors' types, those that float weights have."""


class Checkpoint(Protocol):
    """Where float weights come from."""

    architecture: Architecture

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        """The tensor of that Hugging Face name, or some of its rows, read now. Raises InputError if it cannot be."""


class SafetensorsCheckpoint:
    """A folder with config.json and one or several safetensors files, with or without an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture = declared_architecture(folder)
        self._file_of = {name: file for file in self._files() for name in _tensor_names(file)}
        check_names(folder, self.architecture, {name: str(file) for name, file in self._file_of.items()})
        for file in sorted(set(self._file_of.values())):
            check_shapes(file, folder, self.architecture)

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        return read_tensor(self._file_of[name], name, rows)

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        names = sorted(set(weight_map(index).values() if index.exists() else self._found()))
        if not names:
            pickles = sorted(path.name for pattern in ("*.bin", "*.pth") for path in self.folder.glob(pattern))
            also = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
            raise InputError(f"{self.folder}: no safetensors file{also}; download the model's safetensors files")
        for name in names:
            if not (self.folder / name).exists():
                raise InputError(f"{self.folder / name}: missing, but {index.name} lists it; download it again")
        return [self.folder / name for name in names]

    def _found(self) -> list[str]:
        return [path.name for path in self.folder.glob("*.safetensors")]


def declared_architecture(folder: Path) -> Architecture:
    """What config.json says."""
    config = folder / "config.json"
    return Architecture.from_config_json(read_json(config), str(config))


def weight_map(index: Path) -> dict[str, str]:
    """Every tensor's file, from a model.safetensors.index.json."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise InputError(f"{index}: no weight_map of tensors to files; fetch it again")
    return found


def check_names(folder: Path, architecture: Architecture, file_of: Mapping[str, str]) -> None:
    """Raises InputError unless the files of a folder hold every tensor of the architecture, and no bias."""
    for name in architecture.tensor_shapes():
        if name not in file_of:
            raise InputError(f"{folder / 'config.json'} declares tensor {name}, and no file in {folder} holds it")
    extra = sorted(name for name in file_of if name.endswith(".bias"))
    if extra:
        raise InputError(f"{file_of[extra[0]]}: tensor {extra[0]}: Llama has no biases; this is another network")


def check_shapes(file: Path, folder: Path, architecture: Architecture) -> None:
    """Raises InputError if a tensor in a file has not the shape that the folder's config.json gives it."""
    config, expected = folder / "config.json", architecture.tensor_shapes()
    with _open(file) as opened:
        held = set(opened.keys())
        found = {name: tuple(opened.get_slice(name).get_shape()) for name in expected if name in held}
    for name, shape in found.items():
        if shape != expected[name]:
            raise InputError(
                f"{file}: tensor {name} is {list(shape)}, but {config} says {list(expected[name])}; "
                "use the config.json that belongs to these weights"
            )


def read_tensor(file: Path, name: str, rows: slice = EVERY) -> Tensor:
    """One tensor of a safetensors file that was opened before, or some of its rows.

    Read and not mapped: a mapping would keep the space of a file that is deleted while a tensor is still in use.
    """
    start, header = _header(file)
    entry = header[name]
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor {name} is of type {entry['dtype']}; supported are {', '.join(DTYPES)}")
    first, last, _ = rows.indices(entry["shape"][0])
    shape, dtype = (max(last - first, 0), *entry["shape"][1:]), DTYPES[entry["dtype"]]
    tensor = torch.empty(shape, dtype=dtype)
    place = start + entry["data_offsets"][0] + first * dtype.itemsize * torch.Size(shape[1:]).numel()
    left = memoryview(tensor.view(torch.uint8).numpy().data).cast("B")
    with file.open("rb", buffering=0) as opened:
        opened.seek(place)
        while left:
            count = opened.readinto(left)
            if not count:
                raise InputError(f"{file}: ends within tensor {name}; fetch it again")
            left = left[count:]
    return tensor


class GgufCheckpoint:
    """A llama.cpp GGUF file of architecture `llama`; every tensor is dequantized when read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError) as fault:
            raise InputError(f"{path}: not a readable GGUF file ({fault}); fetch it again") from fault
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = self._architecture()
        self._check_shapes()

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        stored = self._tensors[self._gguf_name(name)]
        values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        heads = {"q_proj": self.architecture.heads, "k_proj": self.architecture.kv_heads}
        for projection, count in heads.items():
            if projection in name:
                values = interleaved_to_halves(values, count)
        return values[rows].to(torch.bfloat16)

    def _architecture(self) -> Architecture:
        kind = self.fields.get("general.architecture")
        if kind != "llama":
            raise InputError(f"{self.path}: a GGUF of architecture {kind!r}; only 'llama' is supported")
        if "rope_freqs.weight" in self._tensors or "llama.rope.scaling.type" in self.fields:
            raise InputError(f"{self.path}: scaled RoPE inside a GGUF is not supported; use the model's safetensors")
        heads, hidden = self._field("llama.attention.head_count"), self._field("llama.embedding_length")
        return Architecture(
            layers=self._field("llama.block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=self.fields.get("llama.attention.head_count_kv", heads),
            head_dim=self.fields.get("llama.attention.key_length", hidden // heads),
            mlp=self._field("llama.feed_forward_length"),
            vocab=len(self._field("tokenizer.ggml.tokens")),
            context=self._field("llama.context_length"),
            rope_theta=self.fields.get("llama.rope.freq_base", 10000.0),
            norm_eps=_shortest_float(self._field("llama.attention.layer_norm_rms_epsilon")),
            tied_head="output.weight" not in self._tensors,
        )

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise InputError(f"{self.path}: no metadata field {name}; the file is incomplete, fetch it again")
        return self.fields[name]

    def _check_shapes(self) -> None:
        for name, expected in self.architecture.tensor_shapes().items():
            stored = self._tensors.get(self._gguf_name(name))
            found = None if stored is None else tuple(int(size) for size in reversed(stored.shape))
            if found != expected:
                raise InputError(f"{self.path}: tensor {name} is {found}, expected {expected}; the file is damaged")

    def _gguf_name(self, name: str) -> str:
        fixed = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name in fixed:
            return fixed[name]
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_GGUF_PARTS[part.removesuffix('.weight')]}.weight"


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as fault:
        raise InputError(
            f"{path}: not a complete safetensors file ({fault}); {_size_found(path)}fetch it again"
        ) from fault


def _size_found(path: Path) -> str:
    """What the header promises against what is on disk, when the header can be read."""
    try:
        start, header = _header(path)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"{path.stat().st_size} bytes found, {start + max(ends)} expected; "
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return ""


def _header(path: Path) -> tuple[int, Mapping[str, Any]]:
    """Where a safetensors file's data starts, and what its header says of every tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _tensor_names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def interleaved_to_halves(weight_OI: Tensor, heads: int) -> Tensor:
    """Meta and llama.cpp store rotary pairs (0, 1), (2, 3)…; Hugging Face stores (0, H/2), (1, H/2 + 1)…"""
    halves: Tensor = weight_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves


def halves_to_interleaved(weight_OI: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved_to_halves`."""
    pairs: Tensor = weight_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return pairs


def _shortest_float(value: float) -> float:
    """GGUF keeps float32; 9.99999974e-06 was written as 1e-05 and is that again."""
    return float(f"{value:.6g}")
