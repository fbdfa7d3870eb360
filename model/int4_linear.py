"""The model's matrix product, `y = x @ w.T` in 4 bits, and the packed bytes that its kernel reads.

Decode reads every weight once per token, so the bytes of this layout set the tokens per second. On aarch64 the kernel
is KleidiAI's, which torch reaches through `_dyn_quant_matmul_4bit`; on x86-64 it is `kernels.cpp`. Both take
activations in 8 bits, quantized per token, and multiply whole numbers.

Both know 4-bit weights only. An 8-bit matrix is two of them, one above the other: w = 16 * high + low, each -8..7, the
upper plane with 16 times the scale, and the two halves of the product are added. That is exact for -128..119.

Shape letters: T tokens, O outputs, I inputs, G groups per row, E elements per group (I = G * E).
"""

import platform
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.errors import InputError

Packing = Literal["kleidiai", "blocks"]
LANES = 16
"""Outputs of a block, see `struct Int4` in `kernels.cpp`."""
KLEIDIAI_ROWS = 8
"""Outputs of a tile in KleidiAI's layout; the last tile is filled up."""
EIGHT_BIT_RANGE = (-119, 119)
"""8-bit values that two 4-bit planes can hold, made symmetric."""


class Dense(NamedTuple):
    """A plain weight [O, I]; `int8_activations` emulates a kernel that quantizes activations per token.

    In float64 such a product is exact, rounded once to x's dtype, as `kernels.cpp` rounds it.
    """

    weight: Tensor
    int8_activations: bool = False


class Int4(NamedTuple):
    """A weight [outputs, inputs] in `planes` * 4 bits, packed for a kernel; w = scale * value."""

    packed: Tensor
    group: int
    inputs: int
    outputs: int
    planes: int = 1


Weight = Dense | Int4


def linear(x_TI: Tensor, weight: Weight) -> Tensor:
    """x [T, I] times the transposed weight [O, I]: [T, O] in x's dtype."""
    if isinstance(weight, Dense):
        if not weight.int8_activations:
            return torch.nn.functional.linear(x_TI, weight.weight.to(x_TI.dtype))
        whole_TI, factor_T1 = (part.to(weight.weight.dtype) for part in quantize_activations(x_TI))
        return (torch.nn.functional.linear(whole_TI, weight.weight) / factor_T1).to(x_TI.dtype)
    y_TO = _product(x_TI, weight.packed, weight.group, weight.inputs, weight.planes * weight.outputs)
    return y_TO if weight.planes == 1 else y_TO[:, : weight.outputs] + y_TO[:, weight.outputs :]


def kernel() -> Packing:
    """The layout that this machine's kernel reads."""
    return "kleidiai" if platform.machine() == "aarch64" else "blocks"


def pack(values_OI: Tensor, scales_OG: Tensor, bits: int, packing: Packing) -> Int4:
    """Packs values of 4 or 8 bits with their scales.

    Raises InputError for 8-bit values that two 4-bit planes cannot hold, and if KleidiAI is asked for and not reached.
    """
    outputs, inputs = values_OI.shape
    group = inputs // scales_OG.shape[1]
    if bits == 8:
        values_OI, scales_OG = _planes(values_OI, scales_OG)
    pack_as = {"kleidiai": _pack_kleidiai, "blocks": _pack_blocks}[packing]
    weight = Int4(pack_as(values_OI, scales_OG), group, inputs, outputs, bits // 4)
    check_packing("the packed weight", weight, packing)
    return weight


def check_packing(name: str, weight: Int4, packing: Packing) -> None:
    """Raises InputError unless the bytes are those of `packing`.

    Where ATen does not reach KleidiAI it packs for a slow fallback instead, silently, in another type and size.
    """
    found, expected = weight.packed, packed_bytes(weight, packing)
    if found.dtype != torch.uint8 or found.numel() != expected:
        hint = " where /sys is mounted (without it torch does not find KleidiAI)" if packing == "kleidiai" else ""
        raise InputError(
            f"{name}: {found.numel()} values of {found.dtype}, expected {expected} bytes of packing {packing!r}: "
            f'run "python -m pipeline run export"{hint}'
        )


def packed_bytes(weight: Int4, packing: Packing) -> int:
    """Exact size of a packed weight."""
    outputs, groups = weight.planes * weight.outputs, weight.inputs // weight.group
    if packing == "kleidiai":
        padded = -(-outputs // KLEIDIAI_ROWS) * KLEIDIAI_ROWS
        return padded * (weight.inputs // 2 + (12 if groups == 1 else 2 * groups + 8))
    return -(-outputs // LANES) * LANES * (weight.inputs // 2 + groups * (4 if groups == 1 else 2) + 8)


def rows(weight: Int4, rows_T: Tensor, packing: Packing) -> Tensor:
    """Some rows [T, I] of a packed weight in float32, rounded once: an embedding's lookup in a tied head."""
    read = {"kleidiai": _kleidiai_rows, "blocks": _block_rows}[packing]
    planes = [read(weight, rows_T + plane * weight.outputs) for plane in range(weight.planes)]
    return sum(planes[1:], planes[0]).float()


def quantize_activations(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token asymmetric int8, as both kernels do it: whole numbers [T, I] and factors [T, 1], x = whole / factor.

    As KleidiAI's `kai_lhs_quant_pack_qai8dxp_f32`: the range includes zero, the zero point is rounded on the side that
    errs less, values to nearest even.
    """
    low_T1 = x_TI.amin(dim=-1, keepdim=True).clamp(max=0)
    high_T1 = x_TI.amax(dim=-1, keepdim=True).clamp(min=0)
    factor_T1 = torch.full_like(low_T1, 255).div(high_T1 - low_T1)  # 255 / x would be 255 * (1 / x), rounded twice
    factor_T1 = torch.where(high_T1 == low_T1, 1.0, factor_T1)
    low_T1, high_T1 = low_T1 * factor_T1, high_T1 * factor_T1
    exact_T1 = torch.where((low_T1 - 128) + (high_T1 + 127) > 0, -128 - low_T1, 127 - high_T1)
    zero_T1 = exact_T1.clamp(-128, 127).round()
    return ((x_TI * factor_T1).round() + zero_T1).clamp(-128, 127) - zero_T1, factor_T1


def _product(x_TI: Tensor, packed: Tensor, group: int, inputs: int, outputs: int) -> Tensor:
    multiply = torch.ops.aten._dyn_quant_matmul_4bit if kernel() == "kleidiai" else torch.ops.emerald.int4_linear
    y_TO: Tensor = multiply(x_TI, packed, group, inputs, outputs)
    if kernel() == "kleidiai":
        y_TO = y_TO + 0 * x_TI.sum(dim=-1, keepdim=True)  # it makes numbers of NaN and infinity
    return y_TO


def _block_rows(weight: Int4, rows_T: Tensor) -> Tensor:
    blocks = -(-weight.planes * weight.outputs // LANES)
    groups = weight.inputs // weight.group
    wide = torch.float32 if groups == 1 else torch.bfloat16
    end = blocks * LANES * weight.inputs // 2
    nibbles = weight.packed[:end].view(blocks, weight.inputs // 8, LANES, 4)
    scales = weight.packed[end : end + blocks * LANES * groups * wide.itemsize].view(wide).view(blocks, groups, LANES)
    block_T, lane_T = rows_T // LANES, rows_T % LANES
    bytes_T = nibbles[block_T, :, lane_T]
    values_TGE = _signed(torch.stack([bytes_T & 15, bytes_T >> 4], dim=2)).view(-1, groups, weight.group)
    return (values_TGE * scales[block_T, :, lane_T].double()[:, :, None]).flatten(1)


def _kleidiai_rows(weight: Int4, rows_T: Tensor) -> Tensor:
    """KleidiAI's tiles of 8 rows: `kai_rhs_pack_nxk_qsi4c32p_qsu4c32s1s0` and `kai_rhs_pack_nxk_qsi4cxp_qs4cxs1s0`.

    32 inputs are 16 bytes a row, in two segments of 8; byte b of segment s holds input 8 s + b in its low nibble and
    the sixteenth after it in the high one. Grouped, the 8 bf16 scales follow each group's nibbles; per row, all nibbles
    are followed by 8 row sums in int32 and by 8 float32 scales, divided by 16.
    """
    group, groups = weight.group, weight.inputs // weight.group
    tile_T, lane_T = rows_T // KLEIDIAI_ROWS, rows_T % KLEIDIAI_ROWS
    tiles = weight.packed.view(-(-weight.planes * weight.outputs // KLEIDIAI_ROWS), -1)[tile_T]
    every_T = torch.arange(rows_T.shape[0])
    if groups == 1:
        end = KLEIDIAI_ROWS * group // 2
        scales = tiles[:, end + 4 * KLEIDIAI_ROWS : end + 8 * KLEIDIAI_ROWS].contiguous().view(torch.float32)
        nibbles, scales_TG = tiles[:, None, :end], 16 * scales[every_T, lane_T][:, None]
    else:
        end = KLEIDIAI_ROWS * group // 2
        blocks = tiles[:, : groups * (end + 2 * KLEIDIAI_ROWS)].view(-1, groups, end + 2 * KLEIDIAI_ROWS)
        scales = blocks[:, :, end:].contiguous().view(torch.bfloat16).float()
        nibbles, scales_TG = blocks[:, :, :end], scales[every_T, :, lane_T]
    segments = nibbles.reshape(-1, groups, group // 32, 2, KLEIDIAI_ROWS, 8)[every_T, :, :, :, lane_T]
    values_TGE = _signed(torch.stack([segments & 15, segments >> 4], dim=3)).view(-1, groups, group)
    return (values_TGE * scales_TG.double()[:, :, None]).flatten(1)


def _signed(nibbles: Tensor) -> Tensor:
    """Two's complement of 4 bits to float."""
    return (nibbles ^ 8).float() - 8


def _planes(values_OI: Tensor, scales_OG: Tensor) -> tuple[Tensor, Tensor]:
    """The two 4-bit planes of 8-bit values, stacked along the outputs."""
    whole = values_OI.short()
    low = ((whole + 8) & 15) - 8
    high = (whole - low) // 16
    if int(high.max()) > 7:
        raise InputError(f"8-bit value {int(whole.max())}: two 4-bit planes hold at most 119; quantize again")
    return torch.cat([high, low]).to(torch.int8), torch.cat([16 * scales_OG, scales_OG])


def _pack_kleidiai(values_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """Through ATen: element 2i in the low nibble; bf16 scales in groups, float32 per row."""
    (outputs, inputs), groups = values_OI.shape, scales_OG.shape[1]
    nibbles = (values_OI + 8).to(torch.uint8)
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    scales = scales_OG.to(torch.float32 if groups == 1 else torch.bfloat16)
    packed: Tensor = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, scales, None, inputs // groups, inputs, outputs)
    return packed


def _pack_blocks(values_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """The layout of `struct Int4` in kernels.cpp; the outputs of the last block are filled up with zeros."""
    (outputs, inputs), groups = values_OI.shape, scales_OG.shape[1]
    if inputs // groups % LANES:
        raise InputError(f"rows of {inputs} in groups of {inputs // groups}: the kernel needs multiples of {LANES}")
    missing = -outputs % LANES
    values_OI = torch.nn.functional.pad(values_OI, (0, 0, 0, missing))
    scales_OG = torch.nn.functional.pad(scales_OG.float(), (0, 0, 0, missing))
    halves = values_OI.view(torch.uint8).view(-1, LANES, inputs // 8, 2, 4)
    nibbles = ((halves[:, :, :, 0] & 15) | (halves[:, :, :, 1] << 4)).transpose(1, 2)
    scales = scales_OG.view(-1, LANES, groups).transpose(1, 2).to(torch.float32 if groups == 1 else torch.bfloat16)
    sums = (values_OI.view(-1, groups, inputs // groups).sum(dim=-1) * scales_OG.double()).sum(dim=-1)
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in (nibbles, scales, sums)])
