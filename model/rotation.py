"""Hadamard rotation folded into the weights (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456).

The residual stream may be turned by any orthogonal matrix Q: what writes to it is turned, what reads from it is turned
back, and the network is the same, with outliers spread over all channels. RMSNorm commutes with a turn once its weights
are folded into the matrices that read after it. Nothing is left to do when serving. Values within a head are turned
likewise, between `v_proj` and `o_proj`.

Shape letters: O outputs, I inputs.
"""

import math
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from model.checkpoint import EVERY, Checkpoint

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}


class Rotated:
    """A checkpoint's network with its residual stream and its heads' values turned; its head is never tied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.architecture = replace(checkpoint.architecture, tied_head=False)

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        read, arch = self._checkpoint.tensor, self._checkpoint.architecture
        if name.endswith("norm.weight"):
            return torch.ones_like(read(name))
        if name == EMBEDDING:
            return turned(read(name, rows).float()).bfloat16()
        if name == HEAD:
            weight_OI = read(EMBEDDING if arch.tied_head else HEAD, rows).float()
            return turned(weight_OI * read(NORM).float()).bfloat16()
        prefix, _, part = name.removesuffix(".weight").rpartition("layers.")
        layer, _, part = part.partition(".")
        weight_OI = read(name).float()
        if part in NORM_BEFORE:
            weight_OI = turned(weight_OI * read(f"{prefix}layers.{layer}.{NORM_BEFORE[part]}.weight").float())
        if part == "self_attn.v_proj":
            weight_OI = turned(weight_OI.T, arch.head_dim).T
        if part == "self_attn.o_proj":
            weight_OI = turned(weight_OI, arch.head_dim)
        if part in ("self_attn.o_proj", "mlp.down_proj"):
            weight_OI = turned(weight_OI.T).T
        return weight_OI[rows].bfloat16()


def turned(x: Tensor, block: int | None = None) -> Tensor:
    """The last dimension times `orthogonal`, whole or block by block."""
    size = block or x.shape[-1]
    odd, power = _factors(size)
    parts = x.unflatten(-1, (-1, odd, power))
    result: Tensor = (torch.einsum("...ij,ik,jl->...kl", parts, _cosines(odd), _hadamard(power))).flatten(-3)
    return result


def _factors(size: int) -> tuple[int, int]:
    """An odd number and a power of two."""
    power = size & -size
    return size // power, power


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, orthonormal; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


@cache
def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), for the odd part of a size."""
    angle = torch.outer(torch.arange(size) + 0.5, torch.arange(size)) * math.pi / size
    matrix = angle.cos() * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix
