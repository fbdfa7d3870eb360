"""One matrix product, `y = x @ w.T`, for each form in which a weight can be held.

Decode reads every weight once per token, so the bytes of this layout set the tokens per second. A group's int4
values are split in halves: byte i of a group holds its element i in the low nibble and its element i + half in the
high nibble, so that both halves of the activation are read contiguously and Inductor vectorises the reduction.

Shape letters: T tokens, O outputs, I inputs, G groups per row, E elements per group (I = G * E).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Dense(NamedTuple):
    """A plain weight [O, I]; `int8_activations` emulates a kernel that quantizes activations per token."""

    weight: Tensor
    int8_activations: bool = False


class Int4(NamedTuple):
    """`packed` uint8 [O, G, E/2] in split halves, `scales` [O, G]; w = scale * (nibble - 8)."""

    packed: Tensor
    scales: Tensor


class Int8(NamedTuple):
    """`values` int8 [O, G, E], `scales` [O, G]; w = scale * value. For heads and embeddings of higher precision."""

    values: Tensor
    scales: Tensor


Weight = Dense | Int4 | Int8


def named_tensors(name: str, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """A weight's tensors under the names by which `weight_named` finds them."""
    for field, value in weight._asdict().items():
        if isinstance(value, Tensor):
            yield f"{name}.{field}", value


def weight_named(name: str, tensors: Mapping[str, Tensor]) -> Weight:
    """The weight of that name, in the form in which it was stored."""
    if f"{name}.packed" in tensors:
        return Int4(tensors[f"{name}.packed"], tensors[f"{name}.scales"])
    if f"{name}.values" in tensors:
        return Int8(tensors[f"{name}.values"], tensors[f"{name}.scales"])
    return Dense(tensors[f"{name}.weight"])


def linear(x_TI: Tensor, weight: Weight) -> Tensor:
    """x [T, I] times the transposed weight [O, I]: [T, O] in x's dtype."""
    if isinstance(weight, Dense):
        x_TI = quantize_activations(x_TI) if weight.int8_activations else x_TI
        return torch.nn.functional.linear(x_TI, weight.weight.to(x_TI.dtype))
    if x_TI.shape[0] == 1:
        return _vector_product(x_TI, weight)
    return x_TI @ dequantize(weight, x_TI.dtype).mT


def pack_halves(values_OGE: Tensor) -> Tensor:
    """int4 values -8..7 [O, G, E], E even, to bytes [O, G, E/2] in split halves."""
    low, high = (values_OGE + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).contiguous()


def unpack_halves(packed_OGE: Tensor) -> Tensor:
    """The inverse of `pack_halves`: int8 [O, G, E]."""
    return torch.cat([packed_OGE & 15, packed_OGE >> 4], dim=-1).to(torch.int8) - 8


def dequantize(weight: Int4 | Int8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [O, I] that the quantized form stands for."""
    values_OGE = unpack_halves(weight.packed) if isinstance(weight, Int4) else weight.values
    return (values_OGE.to(dtype) * weight.scales.to(dtype)[:, :, None]).flatten(1)


def quantize_activations(x_TI: Tensor) -> Tensor:
    """Per-token asymmetric int8 round trip, as KleidiAI's `qai8dx` left-hand-side packing does it.

    The range always includes zero, so that zero is exact; rounding is to nearest even.
    """
    low = x_TI.amin(dim=-1, keepdim=True).clamp(max=0)
    high = x_TI.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = torch.where(high == low, 1.0, (high - low) / 255)
    zero_point = torch.round(-128 - low / scale).clamp(-128, 127)
    return ((torch.round(x_TI / scale) + zero_point).clamp(-128, 127) - zero_point) * scale


def _vector_product(x_1I: Tensor, weight: Int4 | Int8) -> Tensor:
    """One token's product [1, O] as a single fused reduction over the stored bytes."""
    scales_OG1 = weight.scales.float()[:, :, None]
    x_GE = x_1I.view(scales_OG1.shape[1], -1)
    if isinstance(weight, Int8):
        return (weight.values.float() * x_GE * scales_OG1).sum(dim=(1, 2))[None]
    low_GE, high_GE = x_GE.chunk(2, dim=-1)
    low = ((weight.packed & 15).float() - 8) * low_GE
    high = ((weight.packed >> 4).float() - 8) * high_GE
    return ((low + high) * scales_OG1).sum(dim=(1, 2))[None]
