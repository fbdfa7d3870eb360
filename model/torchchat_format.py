"""torchchat's checkpoints, read and written: `model.pth`, tensors by Meta's names, and `params.json`, their sizes.

In Meta's layout the rows of a query or key head are rotary pairs side by side; Hugging Face has first halves, then
second halves. torchchat stores query, key and value as one matrix, and reads them apart as well.
"""

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.architecture import Architecture, RopeScaling
from model.artifact import read_json
from model.checkpoint import EVERY, Checkpoint, halves_to_interleaved, interleaved_to_halves
from model.errors import InputError

WEIGHTS = "model.pth"
PARAMS = "params.json"
OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
UNSUPPORTED = (
    "attention_bias",
    "feed_forward_bias",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
"""Parameters of other networks than Llama."""


class TorchchatCheckpoint:
    """A folder with model.pth, read as a memory map and without running pickled code, and params.json."""

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS
        self.architecture = architecture_of(read_json(folder / PARAMS, _HOW), str(folder / PARAMS))
        try:
            self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as fault:
            raise InputError(
                f"{path}: not a file of plain tensors ({str(fault).splitlines()[0]}); convert it with torchchat again"
            ) from fault
        for name, expected in self.architecture.tensor_shapes().items():
            found = self._found(name)
            if found is None or found.shape != expected:
                stored = "missing" if found is None else list(found.shape)
                raise InputError(f"{path}: {_name(name)} is {stored}, expected {list(expected)} by {PARAMS}")

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        tensor = self._found(name)
        assert tensor is not None, "checked when opened"
        heads = {"q_proj": self.architecture.heads, "k_proj": self.architecture.kv_heads}
        for projection, count in heads.items():
            if projection in name:
                tensor = interleaved_to_halves(tensor, count)
        return tensor[rows].to(torch.bfloat16)

    def _found(self, name: str) -> Tensor | None:
        stored = _name(name)
        tensor: Tensor | None = self._tensors.get(stored)
        prefix, dot, part = stored.rpartition("attention.w")
        fused: Tensor | None = self._tensors.get(f"{prefix}attention.wqkv.weight") if dot else None
        if tensor is None and fused is not None and part[0] in "qkv":
            arch = self.architecture
            sizes = [count * arch.head_dim for count in (arch.heads, arch.kv_heads, arch.kv_heads)]
            if sum(sizes) == len(fused):
                parts: tuple[Tensor, ...] = fused.split(sizes)
                return parts["qkv".index(part[0])]
        return tensor


_HOW = "copy the model's file from torchchat/model_params of your checkout there"


def architecture_of(params: Mapping[str, Any], origin: str) -> Architecture:
    """What a file of torchchat/model_params says; its defaults are those of `TransformerArgs` there."""
    other = next((name for name in UNSUPPORTED if params.get(name)), None)
    if other:
        raise InputError(f"{origin}: {other} is {params[other]!r}; only Llama 2, 3 and 3.1 are supported")
    if "text" in params:
        raise InputError(f"{origin}: torchtune's form of parameters; use the model's plain file, without -Tune")
    dim, heads = int(params.get("dim", 4096)), int(params.get("n_heads", 32))
    scaling = params.get("rope_scaling")
    if scaling is not None and not scaling.keys() >= set(SCALING):
        raise InputError(f"{origin}: rope_scaling has not the four fields of Llama 3.1: {', '.join(SCALING)}")
    return Architecture(
        layers=int(params.get("n_layers", 32)),
        hidden=dim,
        heads=heads,
        kv_heads=int(params.get("n_kv_heads", params.get("n_local_heads", heads))),
        head_dim=dim // heads,
        mlp=int(params.get("hidden_dim") or _mlp_width(dim, params)),
        vocab=int(params.get("vocab_size", 32000)),
        context=int(params.get("block_size", 2048)),
        rope_theta=float(params.get("rope_theta", params.get("rope_base", 10000.0))),
        norm_eps=float(params.get("norm_eps", 1e-5)),
        tied_head=bool(params.get("tie_word_embeddings", False)),
        rope_scaling=scaling
        and RopeScaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_context=int(scaling["original_max_position_embeddings"]),
        ),
    )


def _mlp_width(dim: int, params: Mapping[str, Any]) -> int:
    """Two thirds of four times the width, as Llama's code rounds it."""
    multiple = int(params.get("multiple_of", 256))
    width = int(float(params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * dim / 3))
    return math.ceil(width / multiple) * multiple


def params_of(architecture: Architecture) -> dict[str, Any]:
    """torchchat's parameters of a model whose tokenizer is a Hugging Face one."""
    scaling = architecture.rope_scaling
    values = scaling and (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context)
    return {
        "dim": architecture.hidden,
        "hidden_dim": architecture.mlp,
        "n_layers": architecture.layers,
        "n_heads": architecture.heads,
        "n_local_heads": architecture.kv_heads,
        "vocab_size": architecture.vocab,
        "norm_eps": architecture.norm_eps,
        "rope_base": architecture.rope_theta,
        "block_size": architecture.context,
        "max_seq_length": architecture.context,
        "tie_word_embeddings": architecture.tied_head,
        "use_hf_tokenizer": True,
        "tokenizer_prepend_bos": False,
    } | ({"rope_scaling": dict(zip(SCALING, values, strict=True))} if values else {})


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors as torchchat's own conversion stores them."""
    arch = checkpoint.architecture
    state = {_name(name): checkpoint.tensor(name) for name in arch.tensor_shapes()}
    for layer in range(arch.layers):
        prefix = f"layers.{layer}.attention."
        query, key, value = (state.pop(f"{prefix}w{part}.weight") for part in "qkv")
        parts = [halves_to_interleaved(query, arch.heads), halves_to_interleaved(key, arch.kv_heads), value]
        state[f"{prefix}wqkv.weight"] = torch.cat(parts)
    return state


def _name(name: str) -> str:
    """torchchat's name of a tensor."""
    if name in OUTER:
        return OUTER[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"layers.{layer}.{INNER[part.removesuffix('.weight')]}.weight"
