"""The sentence embedder's matrix product, `y = x @ w.T` in 8 bits, and the packed bytes that `kernels.cpp` reads.

A question has some ten tokens, so what limits their products is arithmetic. Arm and x86-64 with VNNI have dot products
of bytes, which do in one instruction what takes four in float32; without VNNI it takes more instructions. Weights have
a scale for each group of inputs, and so have the activations of each token: a sentence's states have a few large
entries, and whatever shares a scale with one loses its digits.

Shape letters: T tokens, O outputs, I inputs, G groups per row.
"""

import torch
from torch import Tensor

from model.errors import InputError
from model.int4_linear import LANES
from model.quantization import quantize

GROUP = 64
"""Inputs that share a scale, as in `kernels.cpp`."""


def linear(x_TI: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """x [T, I] in float32 times the transposed weight [O, I] that was packed: [T, O]."""
    y_TO: Tensor = torch.ops.emerald.int8_linear(x_TI, packed, outputs)
    return y_TO


def pack(name: str, weight_OI: Tensor) -> Tensor:
    """Quantizes a weight and lays it out as `struct Int8` of kernels.cpp; missing outputs of the last block are zeros.

    Raises InputError naming the tensor if its inputs do not divide into groups, or if it holds a NaN or an infinity.
    """
    outputs, inputs = weight_OI.shape
    if inputs % GROUP:
        raise InputError(f"tensor {name}: {inputs} inputs do not divide into groups of {GROUP}; choose another model")
    quantized = quantize(name, weight_OI, bits=8, group=GROUP, search_steps=0)
    missing = (0, 0, 0, -outputs % LANES)
    values = torch.nn.functional.pad(quantized.values, missing).view(-1, LANES, inputs // GROUP, GROUP // 4, 4)
    scales = torch.nn.functional.pad(quantized.scales.float(), missing).view(-1, LANES, inputs // GROUP)
    parts = (
        values.permute(0, 2, 3, 1, 4).flatten(2),
        scales.transpose(1, 2),
        values.float().sum(dim=(3, 4)).transpose(1, 2),
    )
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=2).flatten()
