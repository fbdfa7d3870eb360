"""Packed weights against the values and scales they were packed from, on the kernel that this machine has."""

import pytest
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from model.errors import InputError
from model.int4_linear import (
    EIGHT_BIT_RANGE,
    Dense,
    Int4,
    Packing,
    check_packing,
    kernel,
    linear,
    pack,
    packed_bytes,
    quantize_activations,
    rows,
)

x86_only = pytest.mark.skipif(kernel() != "blocks", reason="there KleidiAI is reached")
arm_only = pytest.mark.skipif(kernel() != "kleidiai", reason="KleidiAI packs on aarch64 alone")

SHAPES = [(48, 128), (37, 576), (100, 256), (1, 64), (24, 32)]
"""Outputs and inputs; neither kernel takes outputs one by one."""
SCHEMES = {"g32": 32, "channel": None}
"""Inputs that share a scale; None: all of a row."""
each_shape = pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
each_scheme = pytest.mark.parametrize("group", SCHEMES.values(), ids=SCHEMES.keys())
each_width = pytest.mark.parametrize("bits", [4, 8])
TOLERANCE = {"blocks": 1e-6, "kleidiai": 1e-5}[kernel()]
"""Of a product, as a part of the largest: the order of float32 sums."""


def round_trip(x_TI: Tensor) -> Tensor:
    """Activations through 8 bits and back."""
    whole_TI, factor_T1 = quantize_activations(x_TI)
    return whole_TI / factor_T1


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(outputs: int, inputs: int, bits: int, group: int | None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Values over the whole range and scales of both signs, as the quantizer stores them.

    A scale per row has 16 binary digits: more than bf16 holds, and few enough that 8-bit values times it are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 7) if bits == 4 else EIGHT_BIT_RANGE
    values = torch.randint(low, high + 1, (outputs, inputs), dtype=torch.int8, generator=generator)
    if group is not None and group < inputs:
        return values, torch.randn(outputs, inputs // group, generator=generator).bfloat16()
    signs = torch.randint(2, (outputs, 1), generator=generator) * 2 - 1
    return values, signs * torch.randint(1 << 15, 1 << 16, (outputs, 1), generator=generator) * 2.0**-17


def meaning(values_OI: Tensor, scales_OG: Tensor) -> Tensor:
    """The float32 weight that values and scales stand for, by torchao."""
    block = (1, values_OI.shape[1] // scales_OG.shape[1])
    weight: Tensor = dequantize_affine(
        values_OI, block, scales_OG.float(), None, torch.int8, output_dtype=torch.float32
    )
    return weight


@each_width
@each_scheme
@each_shape
def test_rows_give_the_weight_back(outputs: int, inputs: int, group: int | None, bits: int) -> None:
    values, scales = quantized(outputs, inputs, bits, group)
    weight = pack(values, scales, bits, kernel())
    assert (weight.inputs, weight.outputs, weight.planes) == (inputs, outputs, bits // 4)
    assert weight.group == inputs // scales.shape[1]
    assert torch.equal(rows(weight, torch.arange(outputs), kernel()), meaning(values, scales))


@each_width
def test_rows_are_those_asked_for(bits: int) -> None:
    """In any order, repeatedly, or none: an embedding's lookup."""
    values, scales = quantized(40, 64, bits, 32)
    weight = pack(values, scales, bits, kernel())
    for chosen in ([17, 3, 39, 3, 16, 0], [5], []):
        rows_T = torch.tensor(chosen, dtype=torch.int64)
        found = rows(weight, rows_T, kernel())
        assert found.dtype == torch.float32
        assert torch.equal(found, meaning(values, scales)[rows_T])


@each_scheme
def test_scales_keep_their_digits(group: int | None) -> None:
    """All 24 of float32 per row: a weight is the exact product, rounded once."""
    values, _ = quantized(16, 64, 8, group)
    scales = random(16, 64 // (group or 64))
    scales = scales.bfloat16() if scales.shape[1] > 1 else scales
    found = rows(pack(values, scales, 8, kernel()), torch.arange(16), kernel())
    exact = values.double().unflatten(1, (scales.shape[1], -1)) * scales.double()[:, :, None]
    assert torch.equal(found, exact.flatten(1).float())


@each_scheme
def test_two_planes_hold_every_8_bit_value_up_to_119(group: int | None) -> None:
    values = torch.arange(-128, 120).repeat(2)[:480].to(torch.int8).view(1, 480)
    scales = torch.full((1, 480 // (group or 480)), 0.25)
    assert set(values[0].tolist()) == set(range(-128, 120))
    weight = pack(values, scales, 8, kernel())
    assert torch.equal(rows(weight, torch.tensor([0]), kernel()), 0.25 * values)


@pytest.mark.parametrize("value", [120, 121, 127])
def test_larger_8_bit_value_is_refused(value: int) -> None:
    values, scales = quantized(16, 64, 8, 32)
    values[7, 13] = value
    with pytest.raises(InputError, match=f"8-bit value {value}: two 4-bit planes hold at most 119; quantize again"):
        pack(values, scales, 8, kernel())


@x86_only
def test_blocks_need_groups_of_whole_lanes() -> None:
    with pytest.raises(InputError, match="rows of 72 in groups of 24: the kernel needs multiples of 16"):
        pack(*quantized(16, 72, 4, 24), 4, "blocks")


def bytes_by_hand(outputs: int, inputs: int, group: int | None) -> int:
    """Nibbles; scales, bf16 in groups and float32 per row; blocks: float64 sums; KleidiAI: sums and a bias."""
    rows_stored = outputs + (-outputs % {"blocks": 16, "kleidiai": 8}[kernel()])
    scales = 4 if group is None or group == inputs else 2 * (inputs // group)
    return rows_stored * (inputs // 2 + scales + 8)


@each_width
@each_scheme
@each_shape
def test_packed_weight_has_just_the_bytes_of_its_layout(
    outputs: int, inputs: int, group: int | None, bits: int
) -> None:
    weight = pack(*quantized(outputs, inputs, bits, group), bits, kernel())
    assert weight.packed.dtype == torch.uint8
    expected = bytes_by_hand(outputs * bits // 4, inputs, group)
    assert weight.packed.numel() == packed_bytes(weight, kernel()) == expected


def test_bytes_of_a_layer_of_llama_3_1_8b() -> None:
    """On either machine, without packing: gate and up in groups of 32, the head per row."""
    gate_up = Int4(torch.empty(0), 32, 4096, 2 * 14336)
    assert packed_bytes(gate_up, "blocks") == 28672 * (2048 + 256 + 8)
    assert packed_bytes(gate_up, "kleidiai") == 28672 * (2048 + 256 + 8)
    head = Int4(torch.empty(0), 4096, 4096, 128256, planes=2)
    assert packed_bytes(head, "blocks") == 2 * 128256 * (2048 + 4 + 8)
    assert packed_bytes(head, "kleidiai") == 2 * 128256 * (2048 + 12)


@pytest.mark.parametrize("packing", ["blocks", "kleidiai"])
@pytest.mark.parametrize("damage", ["dtype", "short", "long"])
def test_bytes_of_another_layout_are_refused_by_name(damage: str, packing: Packing) -> None:
    """Named: the weight, what was found, what it should be, and the command; for KleidiAI where to run it too."""
    size = {"blocks": 48 * (64 + 8 + 8), "kleidiai": 48 * (64 + 8 + 8)}[packing]
    found = {
        "dtype": torch.zeros(size, dtype=torch.float32),
        "short": torch.zeros(size - 1, dtype=torch.uint8),
        "long": torch.zeros(size + 1, dtype=torch.uint8),
    }[damage]
    check_packing("head", Int4(torch.zeros(size, dtype=torch.uint8), 32, 128, 48), packing)
    with pytest.raises(InputError) as raised:
        check_packing("layers.3.qkv", Int4(found, 32, 128, 48), packing)
    where = " where /sys is mounted (without it torch does not find KleidiAI)" if packing == "kleidiai" else ""
    assert str(raised.value) == (
        f"layers.3.qkv: {found.numel()} values of {found.dtype}, expected {size} bytes of packing {packing!r}: "
        f'run "python -m pipeline run export"{where}'
    )


@x86_only
@each_width
@each_scheme
def test_kleidiai_that_is_not_reached_is_refused(group: int | None, bits: int) -> None:
    """Where ATen has no KleidiAI it packs for a slow fallback without a word."""
    with pytest.raises(
        InputError, match=r"the packed weight: .* bytes of packing 'kleidiai': run .* where /sys is mounted"
    ):
        pack(*quantized(48, 128, bits, group), bits, "kleidiai")


@arm_only
@each_scheme
def test_kleidiai_is_reached(group: int | None) -> None:
    """The bytes are KleidiAI's: another size than the nibbles and scales that went in, in one flat tensor."""
    weight = pack(*quantized(48, 128, 4, group), 4, "kleidiai")
    assert (weight.packed.dtype, weight.packed.dim()) == (torch.uint8, 1)
    assert weight.packed.numel() == 48 * (64 + (12 if group is None else 16))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("tokens", [1, 2, 17])
@each_width
@each_scheme
@each_shape
def test_product_is_that_of_the_dequantized_weight(
    outputs: int, inputs: int, group: int | None, bits: int, tokens: int
) -> None:
    values, scales = quantized(outputs, inputs, bits, group)
    x = random(tokens, inputs, seed=3)
    product = linear(x, pack(values, scales, bits, kernel()))
    expected = linear(x, Dense(meaning(values, scales), int8_activations=True))
    assert (product.shape, product.dtype) == ((tokens, outputs), torch.float32)
    torch.testing.assert_close(product, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.usefixtures("kernels")
@each_width
@pytest.mark.parametrize("offset", [-20.0, 0.0, 20.0], ids=["negative", "both-signs", "positive"])
def test_product_of_one_sided_activations(bits: int, offset: float) -> None:
    values, scales = quantized(48, 256, bits, 32)
    x = random(5, 256, seed=3) + offset
    product = linear(x, pack(values, scales, bits, kernel()))
    expected = linear(x, Dense(meaning(values, scales), int8_activations=True))
    terms = float((x.abs().max() * meaning(values, scales).abs().sum(dim=1)).max())
    torch.testing.assert_close(product, expected, rtol=0, atol=TOLERANCE * terms)


def test_product_of_a_plain_weight_is_the_definition() -> None:
    weight, x = random(48, 128).bfloat16(), random(3, 128, seed=1)
    product = linear(x, Dense(weight))
    assert product.dtype == torch.float32
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert linear(x.bfloat16(), Dense(weight)).dtype == torch.bfloat16


def torchao_round_trip(x_TI: Tensor) -> Tensor:
    block = (1, x_TI.shape[1])
    scale, zero_point = choose_qparams_affine(
        x_TI, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, zero_point_dtype=torch.int8
    )
    values = quantize_affine(x_TI, block, scale, zero_point, torch.int8, -128, 127)
    restored: Tensor = dequantize_affine(values, block, scale, zero_point, torch.int8, -128, 127)
    return restored


@pytest.mark.parametrize(
    "x_TI",
    [
        random(200, 96),
        random(50, 96).abs() + 3,
        -random(50, 96).abs() - 3,
        random(50, 96) * torch.logspace(-3, 3, 50)[:, None],
        torch.cat([torch.tensor([-101.0, 154.0]), torch.arange(-50.5, 50.0)])[None],  # steps of 1, odd zero point
    ],
    ids=["both-signs", "positive", "negative", "magnitudes", "ties"],
)
def test_activation_round_trip_is_torchaos(x_TI: Tensor) -> None:
    torch.testing.assert_close(round_trip(x_TI), torchao_round_trip(x_TI), rtol=1e-6, atol=1e-6)


def test_activation_range_includes_zero() -> None:
    """All values near 100: the 255 steps reach from 0, so that a step is 0.4 and zero itself is exact."""
    x = torch.tensor([[100.0, 100.1, 100.3, 102.0]])
    restored = round_trip(x)
    assert torch.unique(restored).tolist() == pytest.approx([100.0, 100.4, 102.0], abs=1e-4)
    mixed = round_trip(torch.tensor([[-3.3, 0.0, 7.1]]))
    assert mixed[0, 1] == 0


def test_each_token_has_its_own_range() -> None:
    small, large = random(1, 64), random(1, 64, seed=1) * 1000
    together = round_trip(torch.cat([small, large]))
    assert torch.equal(together, torch.cat([round_trip(small), round_trip(large)]))
    step = (small.max() - small.min()) / 255
    assert 0 < (together[0] - small[0]).abs().max() <= step * 0.501


def test_zero_token_stays_zero() -> None:
    assert torch.equal(round_trip(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_int8_activations_are_quantized_before_the_product() -> None:
    weight, x = random(48, 128), random(3, 128, seed=1)
    product = linear(x, Dense(weight, int8_activations=True))
    torch.testing.assert_close(product, torchao_round_trip(x) @ weight.T, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(product, x @ weight.T, rtol=1e-5, atol=1e-4)
