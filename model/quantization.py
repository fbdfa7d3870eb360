"""Symmetric int4 and int8 weights: values, one scale per group, and how far they are from the weights they stand for.

Shape letters: O outputs, I inputs, G groups per row, E elements per group.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from model.errors import InputError
from model.int4_linear import EIGHT_BIT_RANGE
from model.scale_search import search_scales

CHUNK_ELEMENTS = 1 << 18
"""Matrices are worked on in rows of about this many weights together, so that the temporaries stay in cache."""


class Quantized(NamedTuple):
    """`values` int8 [O, I] and `scales` [O, G]; w ≈ values * scales, group by group."""

    values: Tensor
    scales: Tensor
    bits: int

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I] these values stand for."""
        weight_OI = torch.empty(self.values.shape, dtype=dtype)
        for rows in _row_chunks(*self.values.shape):
            values_OGE = self.values[rows].unflatten(1, (-1, self.group)).to(dtype)
            weight_OI[rows] = (values_OGE * self.scales[rows, :, None].to(dtype)).flatten(1)
        return weight_OI


class QuantizationError(NamedTuple):
    """Distance between a tensor and its quantized form."""

    relative_rms: float
    """‖w - ŵ‖ / ‖w‖."""
    sqnr_db: float
    """Signal to quantization noise, 20 * log10(1 / relative_rms)."""
    largest: float
    """max |w - ŵ|."""


def quantize(
    name: str, weight_OI: Tensor, bits: int, group: int, search_steps: int, energy_I: Tensor | None = None
) -> Quantized:
    """Quantizes `weight_OI` to 4 or 8 bits with one scale per `group` inputs, each weight to the nearest value.

    `energy_I` is the mean square of each input, where it is known: errors then count by what they do to the products.
    Scales are bf16 when grouped and float32 when there is one per row: the forms KleidiAI takes.
    Raises InputError naming the tensor if it holds a NaN or an infinity, or if the group does not fit its rows.
    """
    scales_OG = chosen_scales(name, weight_OI, bits, group, search_steps, energy_I)
    values_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    low, high = (-8, 7) if bits == 4 else EIGHT_BIT_RANGE
    for rows in _row_chunks(*weight_OI.shape):
        w_OGE = weight_OI[rows].float().unflatten(1, (-1, group))
        values_OI[rows] = (w_OGE / scales_OG[rows, :, None].float()).round_().clamp_(low, high).flatten(1)
    return Quantized(values_OI, scales_OG, bits)


def chosen_scales(
    name: str, weight_OI: Tensor, bits: int, group: int, search_steps: int, energy_I: Tensor | None = None
) -> Tensor:
    """The scales [O, G] that `quantize` uses, as they are stored."""
    outputs, inputs = weight_OI.shape
    if inputs % group or group % 2:
        raise InputError(f"tensor {name}: {inputs} inputs do not divide into groups of {group}; choose int4-channel")
    check_finite(name, weight_OI)
    scale_dtype = torch.bfloat16 if group < inputs else torch.float32
    scales_OG = torch.empty(outputs, inputs // group, dtype=scale_dtype)
    for rows in _row_chunks(outputs, inputs):
        chunk = weight_OI[rows].float()
        scale = _int8_scales(chunk, group) if bits == 8 else search_scales(chunk, group, search_steps, energy_I)
        scales_OG[rows] = _never_zero(scale.to(scale_dtype))
    return scales_OG


def check_finite(name: str, weight: Tensor) -> None:
    """Raises InputError naming the tensor if it holds a NaN or an infinity."""
    chunks = weight.flatten().split(CHUNK_ELEMENTS)
    if not all(math.isfinite(end) for chunk in chunks for end in chunk.aminmax()):
        bad = sum(int((~torch.isfinite(chunk)).sum()) for chunk in chunks)
        raise InputError(f"tensor {name}: {bad} of {weight.numel()} weights are NaN or infinite; fetch it again")


class ErrorSums:
    """Gathers the error of a matrix from its rows, some at a time."""

    def __init__(self) -> None:
        self._noise = self._signal = self._largest = 0.0

    def add(self, weight_OI: Tensor, quantized: Quantized) -> None:
        for rows in _row_chunks(*weight_OI.shape):
            exact = weight_OI[rows].float()
            stored = Quantized(quantized.values[rows], quantized.scales[rows], quantized.bits)
            difference = exact - stored.dequantize()
            self._noise += float(difference.square().sum(dtype=torch.float64))
            self._signal += float(exact.square().sum(dtype=torch.float64))
            self._largest = max(self._largest, float(difference.abs().max()))

    def total(self) -> QuantizationError:
        relative = math.sqrt(self._noise / self._signal) if self._signal else 0.0
        return QuantizationError(relative, math.inf if relative == 0 else -20 * math.log10(relative), self._largest)


def quantization_error(weight_OI: Tensor, quantized: Quantized) -> QuantizationError:
    """How far `quantized` is from the weight it was made of."""
    sums = ErrorSums()
    sums.add(weight_OI, quantized)
    return sums.total()


def pack_nibbles(values_OI: Tensor) -> Tensor:
    """int4 values to the portable form on disk: bytes [O, I/2] of value + 8, element 2i in the low nibble."""
    packed = torch.empty(len(values_OI), values_OI.shape[1] // 2, dtype=torch.uint8)
    for rows in _row_chunks(*values_OI.shape):
        nibbles = (values_OI[rows] + 8).view(torch.uint8).unflatten(1, (-1, 2))
        packed[rows] = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return packed


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: int8 [O, I]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def _int8_scales(weight_OI: Tensor, group: int) -> Tensor:
    scales: Tensor = choose_qparams_affine(weight_OI, MappingType.SYMMETRIC, (1, group), torch.int8, *EIGHT_BIT_RANGE)[
        0
    ]
    return scales.view(weight_OI.shape[0], -1)


def _never_zero(scales: Tensor) -> Tensor:
    """An all-zero group gets scale 1: its values are zero whatever the scale, and nothing divides by zero."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _row_chunks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // inputs)
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))
