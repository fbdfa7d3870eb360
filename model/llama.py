"""The Llama network as its paper's equations, top-down; one decoder layer serves every layer, eager or compiled.

Touvron et al. 2023 (Llama 2) and Grattafiori et al. 2024 (Llama 3): pre-norm residual blocks, rotary positions,
grouped-query attention, SwiGLU. Weights are arguments, so that one compiled layer serves all layers, and each weight
may be float or quantized (`model.int4_linear`).

Shape letters: T tokens, D hidden width, N query heads, K key-value heads, Q queries per key-value head,
H head dim, S cache slots, B sequences, P pages of a sequence, F MLP width, V vocabulary.

In float32, norms, attention and SwiGLU are computed in float64 and rounded once. Kernels round activations to 8 bits, a
difference in the seventh digit can tip such a rounding over, and all that follows sees it; correctly rounded results
are the same results whoever computes them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.architecture import Architecture
from model.int4_linear import Weight, linear
from model.kv_cache import PAGE, KVCache, Place, new_caches, single_sequence


class LayerWeights(NamedTuple):
    """One decoder layer. `qkv` and `gate_up` are projections fused along their outputs."""

    attention_norm: Tensor
    qkv: Weight
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight
    down: Weight


def rotary_table(architecture: Architecture, positions: int) -> Tensor:
    """[positions, 2, H] in float32: cosines and sines of every position's rotation angles."""
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float64) / architecture.head_dim
    frequencies = _scaled_frequencies(architecture.rope_theta**-exponents, architecture)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=1).repeat(1, 1, 2).float()


def _scaled_frequencies(frequencies: Tensor, architecture: Architecture) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x: Tensor = x_TD.double()
    scale_T1: Tensor = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale_T1).to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return (torch.nn.functional.silu(_exact(gate_TF)) * _exact(up_TF)).to(gate_TF.dtype)


def _exact(x: Tensor) -> Tensor:
    """Float32 in float64; others as they are."""
    return x.double() if x.dtype == torch.float32 else x


def rotate(x_TNH: Tensor, rotary_T2H: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention of Hugging Face checkpoints."""
    cos, sin = rotary_T2H[:, None, 0], rotary_T2H[:, None, 1]
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin


def attention(qkv_TX: Tensor, place: Place, cache: KVCache) -> Tensor:
    """Causal grouped-query attention of T tokens over the pages of their sequences; returns [T, N*H].

    `qkv` [T, (N + 2K) * H] holds queries, keys and values before rotation; keys and values are written to the cache.
    """
    rotary_C2H, positions_T, rows_T, tables_BP = place
    rotary_T2H = rotary_C2H[positions_T].to(qkv_TX.dtype)
    K, H = cache.keys.shape[1:3]
    qkv_TNH = qkv_TX.view(len(qkv_TX), -1, H)
    q_TNH, k_TKH, v_TKH = qkv_TNH.split([qkv_TNH.shape[1] - 2 * K, K, K], dim=1)
    pages_T, slots_T = tables_BP[rows_T, positions_T // PAGE].long(), positions_T % PAGE
    cache.keys[pages_T, :, :, slots_T] = rotate(k_TKH, rotary_T2H).to(cache.keys.dtype)
    cache.values[pages_T, :, slots_T] = v_TKH.to(cache.values.dtype)
    q_TNH = rotate(q_TNH, rotary_T2H)
    mixed_TX = torch.empty(len(q_TNH), q_TNH.shape[1] * H, dtype=q_TNH.dtype)
    for row in rows_T.unique().tolist():
        own_T = rows_T == row
        seen = tables_BP[row, : int(positions_T[own_T].max()) // PAGE + 1].long()
        k_SKH = cache.keys[seen].permute(0, 3, 1, 2).flatten(0, 1)
        v_SKH = cache.values[seen].permute(0, 2, 1, 3).flatten(0, 1)
        q, k, v = (_exact(part.to(q_TNH.dtype)) for part in (q_TNH[own_T], k_SKH, v_SKH))
        mixed_TX[own_T] = attend(q, k, v, positions_T[own_T]).to(q_TNH.dtype)
    return mixed_TX


def attend(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, positions_T: Tensor) -> Tensor:
    """Softmax attention within one sequence: token t sees the slots 0..positions[t]. Returns [T, N*H]."""
    T, N, H = q_TNH.shape
    K = k_SKH.shape[1]
    q_KMH = q_TNH.view(T, K, N // K, H).transpose(0, 1).reshape(K, T * (N // K), H)
    scores_KMS = q_KMH @ k_SKH.permute(1, 2, 0)
    scores_KMS = scores_KMS.to(torch.promote_types(scores_KMS.dtype, torch.float32)) * H**-0.5
    scores_KTQS = scores_KMS.view(K, T, N // K, -1)
    hidden_T1S = torch.arange(len(k_SKH)) > positions_T[:, None, None]
    weights_KTQS = scores_KTQS.masked_fill(hidden_T1S, -math.inf).softmax(dim=-1).to(v_SKH.dtype)
    out_KMH: Tensor = weights_KTQS.view(K, T * (N // K), -1) @ v_SKH.transpose(0, 1)
    return out_KMH.view(K, T, N // K, H).transpose(0, 1).reshape(T, N * H)


Attention = Callable[[Tensor, Place, KVCache], Tensor]


def decoder_layer(
    x_TD: Tensor, place: Place, cache: KVCache, weights: LayerWeights, eps: float, attention: Attention = attention
) -> Tensor:
    """One layer over T new tokens; writes their keys and values into the cache. Returns [T, D]."""
    qkv_TX = linear(rms_norm(x_TD, weights.attention_norm, eps), weights.qkv)
    x_TD = x_TD + linear(attention(qkv_TX, place, cache), weights.output)
    gate_TF, up_TF = linear(rms_norm(x_TD, weights.mlp_norm, eps), weights.gate_up).chunk(2, dim=-1)
    return x_TD + linear(swiglu(gate_TF, up_TF), weights.down)


def output_head(x_TD: Tensor, norm_D: Tensor, head: Weight, eps: float) -> Tensor:
    """Final norm and vocabulary projection: logits [T, V]."""
    return linear(rms_norm(x_TD, norm_D, eps), head)


class Model(Protocol):
    """One forward pass in three steps, eager (`Network`) or compiled (`model.program.CompiledModel`)."""

    architecture: Architecture
    kv_dtype: torch.dtype
    """Of the KV cache."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads."""

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Embeddings [T, D]."""

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        """Decoder layer `index` over T new tokens; writes their keys and values to `cache`. Returns [T, D]."""

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits [T, V]."""


class HeadWeights(NamedTuple):
    """The output head, or some rows of it."""

    norm: Tensor
    weight: Weight


class Network:
    """One model, computed eagerly.

    `layers` and the parts of `head`, stacked along the vocabulary, may be sequences that read a weight when asked for
    it: then a layer's weights are all that is in memory at once.
    """

    def __init__(
        self,
        architecture: Architecture,
        embed: Callable[[Tensor], Tensor],
        layers: Sequence[LayerWeights],
        head: Sequence[HeadWeights],
        kv_dtype: torch.dtype,
    ) -> None:
        self.architecture = architecture
        self.kv_dtype = kv_dtype
        self.layers, self.head_parts = layers, head
        self._embed = embed

    @property
    def bytes_per_token(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors([*self.layers, *self.head_parts]))

    def embed(self, tokens_T: Tensor) -> Tensor:
        return self._embed(tokens_T)

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        return decoder_layer(x_TD, place, cache, self.layers[index], self.architecture.norm_eps)

    def head(self, x_TD: Tensor) -> Tensor:
        parts = [output_head(x_TD, *part, self.architecture.norm_eps) for part in self.head_parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def sequence_logits(model: Network, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] at every position of one sequence, computed in a single pass."""
    x_TD = model.embed(tokens_T)
    for weights in model.layers:
        x_TD = through_layer(model, weights, x_TD)
    return model.head(x_TD)


def through_layer(model: Network, weights: LayerWeights, x_TD: Tensor) -> Tensor:
    """One decoder layer over a whole sequence."""
    return decoder_layer(x_TD, *layer_place(model, len(x_TD)), weights, model.architecture.norm_eps)


def layer_place(model: Network, tokens: int) -> tuple[Place, KVCache]:
    """Where one layer works on a whole sequence, and an empty cache for it."""
    place = single_sequence(rotary_table(model.architecture, tokens), tokens)
    (cache,) = new_caches(replace(model.architecture, layers=1), place.tables_BP.shape[1], model.kv_dtype)
    return place, cache


def _tensors(tree: object) -> list[Tensor]:
    """All tensors of nested weights."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []
