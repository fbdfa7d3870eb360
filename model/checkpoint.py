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


class Checkpoint(Protocol):
    """Where float weights come from."""

    architecture: Architecture

    def tensor(self, name: str) -> Tensor:
        """The tensor of that Hugging Face name, read now. Raises InputError if it cannot be read."""


class SafetensorsCheckpoint:
    """A folder with config.json and one or several safetensors files, with or without an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture = Architecture.from_config_json(
            read_json(folder / "config.json"), str(folder / "config.json")
        )
        self._file_of = {name: file for file in self._files() for name in _tensor_names(file)}
        self._check_shapes()

    def tensor(self, name: str) -> Tensor:
        with _open(self._file_of[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def _files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            pickles = sorted(path.name for pattern in ("*.bin", "*.pth") for path in self.folder.glob(pattern))
            also = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
            raise InputError(f"{self.folder}: no safetensors file{also}; download the model's safetensors files")
        for name in names:
            if not (self.folder / name).exists():
                raise InputError(f"{self.folder / name}: missing, but {index.name} lists it; download it again")
        return [self.folder / name for name in names]

    def _check_shapes(self) -> None:
        config = self.folder / "config.json"
        for name, expected in self.architecture.tensor_shapes().items():
            if name not in self._file_of:
                raise InputError(f"{config} declares tensor {name}, and no file in {self.folder} holds it")
            with _open(self._file_of[name]) as file:
                found = tuple(file.get_slice(name).get_shape())
            if found != expected:
                raise InputError(
                    f"{self._file_of[name]}: tensor {name} is {list(found)}, but {config} says {list(expected)}; "
                    "use the config.json that belongs to these weights"
                )
        extra = sorted(name for name in self._file_of if name.endswith(".bias"))
        if extra:
            raise InputError(
                f"{self._file_of[extra[0]]}: tensor {extra[0]}: Llama has no biases; this is another network"
            )


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

    def tensor(self, name: str) -> Tensor:
        stored = self._tensors[self._gguf_name(name)]
        values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        heads = {"q_proj": self.architecture.heads, "k_proj": self.architecture.kv_heads}
        for projection, count in heads.items():
            if projection in name:
                values = _interleaved_to_halves(values, count)
        return values.to(torch.bfloat16)

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
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: Mapping[str, Any] = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f"{path.stat().st_size} bytes found, {8 + header_bytes + max(ends)} expected; "
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return ""


def _tensor_names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _interleaved_to_halves(weight_OI: Tensor, heads: int) -> Tensor:
    """llama.cpp stores rotary pairs (0, 1), (2, 3)…; Hugging Face stores (0, H/2), (1, H/2 + 1)…"""
    halves: Tensor = weight_OI.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return halves


def _shortest_float(value: float) -> float:
    """GGUF keeps float32; 9.99999974e-06 was written as 1e-05 and is that again."""
    return float(f"{value:.6g}")
