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
from model.networks import EMBEDDING, HEAD, NORM, source_of


class Rotated:
    """A checkpoint's network with its residual stream and heads' values turned, in float32; its head is not tied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.architecture = replace(checkpoint.architecture, tied_head=False)

    def tensor(self, name: str, rows: slice = EVERY) -> Tensor:
        arch = self._checkpoint.architecture
        if name.endswith("norm.weight"):
            return torch.ones(arch.hidden)[rows]
        source = source_of(name, arch)
        layer, _, part = name.removesuffix(".weight").rpartition(".self_attn." if "self_attn" in name else ".mlp.")
        writes = part in ("o_proj", "down_proj")
        weight_OI = self._checkpoint.tensor(source, EVERY if writes or part == "v_proj" else rows).float()
        if part in ("q_proj", "k_proj", "v_proj"):
            weight_OI = self._after_norm(f"{layer}.input_layernorm.weight", weight_OI)
        elif part in ("gate_proj", "up_proj"):
            weight_OI = self._after_norm(f"{layer}.post_attention_layernorm.weight", weight_OI)
        elif name == HEAD:
            weight_OI = self._after_norm(NORM, weight_OI)
        elif name == EMBEDDING:
            weight_OI = turned(weight_OI)
        elif part == "o_proj":
            weight_OI = turned(weight_OI, arch.head_dim)
        if part == "v_proj":
            return turned(weight_OI.T, arch.head_dim).T[rows]
        return turned(weight_OI.T).T[rows] if writes else weight_OI

    def _after_norm(self, norm: str, weight_OI: Tensor) -> Tensor:
        return turned(weight_OI * self._checkpoint.tensor(norm).float())


def turned(x: Tensor, block: int | None = None) -> Tensor:
    """The last dimension times an orthogonal matrix, whole or block by block.

    The matrix is a Kronecker product: Hadamard's for the power of two in the size, cosines for the rest.
    """
    size = block or x.shape[-1]
    power = size & -size
    half = 1 << (power.bit_length() - 1) // 2
    factors = (_cosines(size // power), _hadamard(power // half), _hadamard(half))
    parts = x.unflatten(-1, (-1, *map(len, factors)))
    for axis, matrix in zip((-3, -2, -1), factors, strict=True):
        parts = (parts.movedim(axis, -1) @ matrix).movedim(-1, axis)
    result: Tensor = parts.flatten(-4)
    return result


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
