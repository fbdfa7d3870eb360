"""The scale search against plain rounding, a brute-force search and torchao's own int4 tensor."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor

from model.errors import InputError
from model.int4_linear import Dense, kernel, linear, pack, rows
from model.quantization import Quantized, pack_nibbles, quantization_error, quantize, unpack_nibbles
from model.scale_search import search_scales

STEPS = 14


def gaussian(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    weight: Tensor = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02
    return weight


def round_to_nearest(weight_OI: Tensor, group: int) -> Tensor:
    """The plain method: scale = amax / 7, round, clamp. Returns the dequantized weight."""
    w: Tensor = weight_OI.unflatten(1, (-1, group))
    scale = w.abs().amax(dim=2, keepdim=True) / 7
    return ((w / scale).round().clamp(-8, 7) * scale).flatten(1)


def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (exact - approximate).norm()))


def group_errors(exact: Tensor, approximate: Tensor, group: int) -> Tensor:
    error: Tensor = (exact - approximate).unflatten(1, (-1, group))
    total: Tensor = error.square().sum(dim=2)
    return total


@pytest.mark.parametrize(("group", "gain_db"), [(32, 1.0), (512, 2.0)], ids=["groups-of-32", "channel-wise"])
def test_search_beats_round_to_nearest(group: int, gain_db: float) -> None:
    weight = gaussian(256, 512)
    searched = quantize("w", weight, 4, group, STEPS).dequantize()
    assert sqnr_db(weight, searched) >= sqnr_db(weight, round_to_nearest(weight, group)) + gain_db


def least_error_of_grid(group_E: NDArray[np.float64]) -> float:
    """The documented search, in float64 and one candidate at a time; errors measured, not derived."""
    least = math.inf
    for factor in np.linspace(0.5, 1.15, STEPS):
        for sign in (1, -1):
            k = np.clip(np.round(group_E / (sign * factor * np.abs(group_E).max() / 7.5)), -8, 7)
            scale = (group_E @ k) / (k @ k)
            least = min(least, float(np.square(group_E - scale * k).sum()))
    return least


def least_error_of_any_scale(group_E: NDArray[np.float64]) -> float:
    """Exhaustive: 4,000 scales of either sign over all that could be best."""
    reach = np.abs(group_E).max()
    scales = np.concatenate([np.linspace(reach / 16, reach / 3, 2000), np.linspace(-reach / 3, -reach / 16, 2000)])
    k = np.clip(np.round(group_E[None] / scales[:, None]), -8, 7)
    return float(np.square(group_E[None] - scales[:, None] * k).sum(axis=1).min())


@pytest.mark.parametrize("group", [8, 32])
def test_no_group_is_worse_than_a_direct_search(group: int) -> None:
    weight = gaussian(40, 4 * group, seed=3)
    scales = search_scales(weight, group, STEPS)
    k = (weight.unflatten(1, (-1, group)) / scales[:, :, None]).round().clamp(-8, 7)
    ours = group_errors(weight, (k * scales[:, :, None]).flatten(1), group).flatten()
    groups = weight.unflatten(1, (-1, group)).flatten(0, 1).double().numpy()
    grid = torch.tensor([least_error_of_grid(values) for values in groups])
    exhaustive = torch.tensor([least_error_of_any_scale(values) for values in groups])
    assert (ours <= grid * (1 + 1e-4)).all()
    assert ours.mean() <= exhaustive.mean() * 1.15


def test_round_to_nearest_wins_a_group_rarely_and_narrowly() -> None:
    """Its scale amax / 7 lies between two candidates, so that a few groups in a thousand suit it better."""
    weight = gaussian(128, 512, seed=4)
    searched = quantize("w", weight, 4, 32, STEPS).dequantize()
    ours, plain = (group_errors(weight, found, 32) for found in (searched, round_to_nearest(weight, 32)))
    assert (ours <= plain).float().mean() > 0.98
    assert (ours / plain).max() < 1.1


def test_more_steps_never_hurt() -> None:
    weight = gaussian(64, 256)
    coarse, fine = (quantize("w", weight, 4, 32, steps).dequantize() for steps in (2, 40))
    assert sqnr_db(weight, fine) > sqnr_db(weight, coarse) + 0.2


def test_negative_scale_gives_the_extra_level_to_the_longer_tail() -> None:
    """-8..7 reaches further below zero; a group whose outlier is positive takes a negative scale to use it."""
    levels = torch.arange(-7.0, 9.0).repeat(1, 2)
    upwards, downwards = (quantize("w", weight, 4, 32, STEPS) for weight in (levels, -levels))
    assert float(upwards.scales) < 0 < float(downwards.scales)
    torch.testing.assert_close(upwards.dequantize(), levels)
    torch.testing.assert_close(downwards.dequantize(), -levels)
    random_scales = quantize("w", gaussian(64, 256), 4, 32, STEPS).scales
    assert 0.2 < (random_scales < 0).float().mean() < 0.8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_all_zero_groups_stay_zero(bits: int, group: int) -> None:
    weight = gaussian(4, 64)
    weight[1] = 0
    weight[2, 32:] = 0
    quantized = quantize("w", weight, bits, group, STEPS)
    assert (quantized.scales != 0).all()
    assert (quantized.dequantize()[weight == 0] == 0).all()
    assert quantized.dequantize()[0].abs().max() > 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_nan_and_infinity_by_name(bits: int, bad: float) -> None:
    weight = gaussian(4, 64).to(torch.bfloat16)
    weight[3, 5] = bad
    with pytest.raises(InputError, match=r"tensor model\.layers\.7\.q: 1 of 256 weights are NaN or infinite; fetch"):
        quantize("model.layers.7.q", weight, bits, 32, STEPS)


@pytest.mark.parametrize(("inputs", "group"), [(48, 32), (33, 33)])
def test_refuses_a_group_that_does_not_fit(inputs: int, group: int) -> None:
    with pytest.raises(InputError, match=rf"tensor odd: {inputs} inputs do not divide into groups of {group}"):
        quantize("odd", gaussian(4, inputs), 4, group, STEPS)


@pytest.mark.parametrize(("group", "dtype"), [(32, torch.bfloat16), (64, torch.float32)])
def test_stored_form_is_the_documented_one(group: int, dtype: torch.dtype) -> None:
    quantized = quantize("w", gaussian(8, 64).to(torch.bfloat16), 4, group, STEPS)
    assert (quantized.values.dtype, quantized.scales.dtype) == (torch.int8, dtype)
    assert quantized.scales.shape == (8, 64 // group)
    assert quantized.group == group
    assert (int(quantized.values.min()), int(quantized.values.max())) == (-8, 7)
    by_hand = quantized.values.float() * quantized.scales.float().repeat_interleave(group, dim=1)
    torch.testing.assert_close(quantized.dequantize(), by_hand)


def test_values_are_rounded_with_the_scale_as_stored() -> None:
    """bf16 rounding moves a scale by up to 0.4 %; the values must fit the moved one."""
    weight = gaussian(64, 256)
    quantized = quantize("w", weight, 4, 32, STEPS)
    exact_k = weight / quantized.scales.float().repeat_interleave(32, dim=1)
    torch.testing.assert_close(quantized.values.float(), exact_k.round().clamp(-8, 7), rtol=0, atol=0)


def test_rows_quantized_in_chunks_equal_rows_quantized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 64)
    whole = quantize("w", weight, 4, 32, STEPS)
    error = quantization_error(weight, whole)
    monkeypatch.setattr("model.quantization.CHUNK_ELEMENTS", 5 * 64)
    pieces = quantize("w", weight, 4, 32, STEPS)
    assert torch.equal(whole.values, pieces.values)
    assert torch.equal(whole.scales, pieces.scales)
    assert quantization_error(weight, whole) == pytest.approx(error)


@pytest.mark.parametrize("group", [32, 256])
def test_int8_errs_by_half_a_step_at_most(group: int) -> None:
    weight = gaussian(64, 256)
    quantized = quantize("w", weight, 8, group, STEPS)
    step = quantized.scales.float().repeat_interleave(group, dim=1)
    error = (weight - quantized.dequantize()).abs()
    assert (error <= step * 0.51 + weight.abs() * 2**-8).all()  # 2**-8: a bf16 scale can clip the largest weight
    assert quantized.values.abs().max() == 119
    assert sqnr_db(weight, quantized.dequantize()) > 40


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 256])
def test_whatever_is_quantized_can_be_packed(bits: int, group: int) -> None:
    """An outlier in every group, so that its values reach the end of the range, on either side."""
    weight = gaussian(64, 256)
    weight[:, ::32] *= 1000
    quantized = quantize("w", weight, bits, group, STEPS)
    packed = pack(quantized.values, quantized.scales, bits, kernel())
    torch.testing.assert_close(rows(packed, torch.arange(64), kernel()), quantized.dequantize(), rtol=1e-6, atol=1e-6)


def test_error_report_is_the_direct_computation() -> None:
    weight = gaussian(16, 64).to(torch.bfloat16)
    quantized = quantize("w", weight, 4, 32, STEPS)
    exact, found = (tensor.double().numpy() for tensor in (weight, quantized.dequantize()))
    report = quantization_error(weight, quantized)
    relative = float(np.linalg.norm(exact - found) / np.linalg.norm(exact))
    assert report.relative_rms == pytest.approx(relative, rel=1e-5)
    assert report.sqnr_db == pytest.approx(-20 * math.log10(relative), rel=1e-5)
    assert report.largest == pytest.approx(float(np.abs(exact - found).max()), rel=1e-5)


def test_error_report_of_an_exact_tensor() -> None:
    zeros = torch.zeros(4, 64)
    report = quantization_error(zeros, quantize("w", zeros, 4, 32, STEPS))
    assert report == (0.0, math.inf, 0.0)


def test_nibbles_round_trip_with_even_elements_low() -> None:
    values = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_nibbles(pack_nibbles(values)), values)
    packed = pack_nibbles(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0xF0, 0x98]]


@pytest.mark.parametrize("activations", [None, "int8_asym_per_token"])
@pytest.mark.parametrize("group", [32, 128], ids=["int4-g32", "int4-channel"])
def test_torchao_computes_the_same_from_the_stored_values(group: int, activations: str | None) -> None:
    """Our canonical values and scales, put into torchao's int4 tensor, multiply as ours do."""
    weight, x = gaussian(96, 128), gaussian(50, 128, seed=9) * 50
    quantized = quantize("w", weight, 4, group, STEPS)
    theirs = IntxUnpackedToInt8Tensor(
        qdata=quantized.values,
        scale=quantized.scales.float(),
        zero_point=torch.zeros(quantized.scales.shape, dtype=torch.int8),
        target_dtype=torch.int4,  # type: ignore[attr-defined]  # not in torch's stubs
        block_size=(1, group),
        dtype=torch.float32,
        activation_quantization=activations,
    )
    expected = torch.nn.functional.linear(x, theirs)
    ours = linear(x, Dense(quantized.dequantize(), int8_activations=activations is not None))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_group_follows_from_the_shapes() -> None:
    assert Quantized(torch.zeros(2, 96, dtype=torch.int8), torch.ones(2, 3), 4).group == 32
