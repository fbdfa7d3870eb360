"""The Llama network as its paper's equations, top-down; one decoder layer serves every layer, eager or compiled.

Touvron et al. 2023 (Llama 2) and Grattafiori et al. 2024 (Llama 3): pre-norm residual blocks, rotary positions,
grouped-query attention, SwiGLU. Weights are arguments, so that one compiled layer serves all layers, and each weight
may be float or quantized (`model.int4_linear`).

Shape letters: T tokens, D hidden width, N query heads, K key-value heads, Q queries per key-value head,
H head dim, S cache slots, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.architecture import Architecture
from model.int4_linear import Weight, linear


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
    x: Tensor = x_TD.float()
    scale_T1: Tensor = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale_T1).to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def rotate(x_TNH: Tensor, rotary_T2H: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention of Hugging Face checkpoints."""
    cos, sin = rotary_T2H[:, None, 0], rotary_T2H[:, None, 1]
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin


def attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, positions_T: Tensor) -> Tensor:
    """Causal grouped-query attention: token t sees the cache slots 0..positions[t]. Returns [T, N*H]."""
    T, N, H = q_TNH.shape
    K = k_SKH.shape[1]
    q_KTQH = q_TNH.view(T, K, N // K, H).transpose(0, 1)
    q_KMH = q_KTQH.reshape(K, T * (N // K), H)
    scores_KMS = (q_KMH @ k_SKH.permute(1, 2, 0)).float() * H**-0.5
    scores_KTQS = scores_KMS.view(K, T, N // K, -1)
    slots_S = torch.arange(k_SKH.shape[0], device=k_SKH.device)
    hidden_T1S = slots_S > positions_T[:, None, None]
    weights_KTQS = scores_KTQS.masked_fill(hidden_T1S, -math.inf).softmax(dim=-1).to(v_SKH.dtype)
    out_KMH: Tensor = weights_KTQS.view(K, T * (N // K), -1) @ v_SKH.transpose(0, 1)
    return out_KMH.view(K, T, N // K, H).transpose(0, 1).reshape(T, N * H)


def decoder_layer(
    x_TD: Tensor,
    rotary_T2H: Tensor,
    positions_T: Tensor,
    k_cache_SKH: Tensor,
    v_cache_SKH: Tensor,
    weights: LayerWeights,
    eps: float,
) -> Tensor:
    """One layer over T new tokens; writes their keys and values into the cache at `positions`. Returns [T, D]."""
    T, (_, K, H) = x_TD.shape[0], k_cache_SKH.shape
    qkv_TNH = linear(rms_norm(x_TD, weights.attention_norm, eps), weights.qkv).view(T, -1, H)
    q_TNH, k_TKH, v_TKH = qkv_TNH.split([qkv_TNH.shape[1] - 2 * K, K, K], dim=1)
    k_cache_SKH.index_copy_(0, positions_T, rotate(k_TKH, rotary_T2H).to(k_cache_SKH.dtype))
    v_cache_SKH.index_copy_(0, positions_T, v_TKH.to(v_cache_SKH.dtype))
    mixed_TD = attention(rotate(q_TNH, rotary_T2H), k_cache_SKH, v_cache_SKH, positions_T)
    x_TD = x_TD + linear(mixed_TD.to(x_TD.dtype), weights.output)
    gate_TF, up_TF = linear(rms_norm(x_TD, weights.mlp_norm, eps), weights.gate_up).chunk(2, dim=-1)
    return x_TD + linear(torch.nn.functional.silu(gate_TF) * up_TF, weights.down)


def output_head(x_TD: Tensor, norm_D: Tensor, head: Weight, eps: float) -> Tensor:
    """Final norm and vocabulary projection: logits [T, V]."""
    return linear(rms_norm(x_TD, norm_D, eps), head)


class KVCache(NamedTuple):
    """Keys and values of one layer, [S, K, H] each; slots are filled in order of position."""

    keys: Tensor
    values: Tensor


class Model(Protocol):
    """One forward pass in three steps, eager (`Network`) or compiled (`model.program.CompiledModel`)."""

    architecture: Architecture
    dtype: torch.dtype
    bytes_per_token: int

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Embeddings [T, D]."""

    def layer(self, index: int, x_TD: Tensor, rotary_T2H: Tensor, positions_T: Tensor, cache: KVCache) -> Tensor:
        """Decoder layer `index` over T new tokens; writes to `cache` at `positions_T`. Returns [T, D]."""

    def head(self, x_1D: Tensor) -> Tensor:
        """Logits [1, V] of one token."""


class Network:
    """All weights of one model, in any mixture of float and quantized forms, computed eagerly."""

    def __init__(
        self, architecture: Architecture, embedding: Tensor, layers: Sequence[LayerWeights], norm: Tensor, head: Weight
    ) -> None:
        self.architecture = architecture
        self.dtype = embedding.dtype
        self._embedding, self._layers, self._norm, self._head = embedding, layers, norm, head
        self.bytes_per_token = sum(tensor.nbytes for tensor in _tensors([*layers, norm, head]))

    def embed(self, tokens_T: Tensor) -> Tensor:
        return self._embedding[tokens_T]

    def layer(self, index: int, x_TD: Tensor, rotary_T2H: Tensor, positions_T: Tensor, cache: KVCache) -> Tensor:
        weights, eps = self._layers[index], self.architecture.norm_eps
        return decoder_layer(x_TD, rotary_T2H.to(x_TD.dtype), positions_T, *cache, weights, eps)

    def head(self, x_TD: Tensor) -> Tensor:
        return output_head(x_TD, self._norm, self._head, self.architecture.norm_eps)


def sequence_logits(model: Network, tokens_T: Tensor) -> Tensor:
    """Logits [T, V] at every position of one sequence, computed in a single pass."""
    arch, T = model.architecture, tokens_T.shape[0]
    positions_T, rotary_T2H = torch.arange(T), rotary_table(arch, T)
    x_TD = model.embed(tokens_T)
    for index in range(arch.layers):
        cache = KVCache(*torch.zeros(2, T, arch.kv_heads, arch.head_dim, dtype=model.dtype))
        x_TD = model.layer(index, x_TD, rotary_T2H, positions_T, cache)
    return model.head(x_TD)


def _tensors(tree: object) -> list[Tensor]:
    """All tensors of nested weights."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, (list, tuple)) else []
