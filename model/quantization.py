"""Symmetric int4 and int8 weights: a search for scales, by the weights alone or by what their errors do to products.

Round-to-nearest with scale amax/7 wastes levels: most groups have one outlier and a mass near zero. Instead every
group tries scales s = ±f * amax / 7.5 for f in 0.5..1.15, rounds, refits s by least squares (s = Σwk / Σk²), and
keeps the s with the least squared error. A negative scale is worth trying because int4 is lopsided (-8..7): it
decides which tail gets the extra level.

Shape letters: O outputs, I inputs, G groups per row, E elements per group.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from model.errors import InputError
from model.int4_linear import EIGHT_BIT_RANGE

CHUNK_ELEMENTS = 1 << 20
"""Rows are quantized in chunks of about this many weights, so that the temporaries stay in cache."""


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
        values_OGE = self.values.unflatten(1, (-1, self.group)).to(dtype)
        weight: Tensor = (values_OGE * self.scales[:, :, None].to(dtype)).flatten(1)
        return weight


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
        scales = scales_OG[rows].float()
        zero = torch.zeros(scales.shape, dtype=torch.int32)
        values_OI[rows] = quantize_affine(weight_OI[rows].float(), (1, group), scales, zero, torch.int8, low, high)
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
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(f"tensor {name}: {bad} of {weight.numel()} weights are NaN or infinite; fetch it again")


def search_scales(weight_OI: Tensor, group: int, steps: int, energy_I: Tensor | None = None) -> Tensor:
    """The least-squares int4 scale of every group, [O, G] float32, possibly negative; see the module's text.

    After refitting, the squared error, weighted with h = `energy_I` or 1, is Σhw² - (Σhwk)² / Σhk², so the best
    candidate has the largest (Σhwk)² / Σhk².
    """
    w_OGE = weight_OI.unflatten(1, (-1, group))
    h_GE = None if energy_I is None else energy_I.float().view(-1, group)
    weighted_OGE = w_OGE if h_GE is None else w_OGE * h_GE
    reach_OG1 = w_OGE.abs().amax(dim=2, keepdim=True) / 7.5
    best_gain = torch.full(reach_OG1.shape[:2], -1.0)
    best_scale = torch.zeros(reach_OG1.shape[:2])
    for factor in torch.linspace(0.5, 1.15, steps).tolist():
        for sign in (1.0, -1.0):
            inverse_OG1 = torch.where(reach_OG1 > 0, sign / (factor * reach_OG1), 0.0)
            k_OGE = (w_OGE * inverse_OG1).round_().clamp_(-8, 7)
            dot = (weighted_OGE * k_OGE).sum(dim=2)
            squares_OGE = k_OGE.square_() if h_GE is None else k_OGE.square_().mul_(h_GE)
            energy = squares_OGE.sum(dim=2)
            gain = torch.where(energy > 0, dot.square() / energy, 0.0)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best_scale = torch.where(better & (energy > 0), dot / energy, best_scale)
    return best_scale


def quantization_error(weight_OI: Tensor, quantized: Quantized) -> QuantizationError:
    """How far `quantized` is from the weight it was made of."""
    noise = signal = largest = 0.0
    for rows in _row_chunks(*weight_OI.shape):
        exact = weight_OI[rows].float()
        stored = Quantized(quantized.values[rows], quantized.scales[rows], quantized.bits)
        difference = exact - stored.dequantize()
        noise += float(difference.square().sum(dtype=torch.float64))
        signal += float(exact.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max()))
    relative = math.sqrt(noise / signal) if signal else 0.0
    return QuantizationError(relative, math.inf if relative == 0 else -20 * math.log10(relative), largest)


def pack_nibbles(values_OI: Tensor) -> Tensor:
    """int4 values to the portable form on disk: bytes [O, I/2] of value + 8, element 2i in the low nibble."""
    nibbles: Tensor = (values_OI + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).contiguous()


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
