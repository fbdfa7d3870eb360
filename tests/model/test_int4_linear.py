"""Products of every stored form against the dequantized float product."""

import pytest
import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from model.int4_linear import (
    Dense,
    Int4,
    Int8,
    Weight,
    dequantize,
    linear,
    named_tensors,
    pack_halves,
    quantize_activations,
    unpack_halves,
    weight_named,
)

OUTPUTS, GROUPS, ELEMENTS = 48, 4, 32
INPUTS = GROUPS * ELEMENTS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_values(low: int, high: int) -> Tensor:
    shape = (OUTPUTS, GROUPS, ELEMENTS)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))


def weight_and_meaning(form: str) -> tuple[Weight, Tensor]:
    """A stored weight, and in float64 the matrix that it stands for by definition."""
    if form == "dense":
        return Dense(random(OUTPUTS, INPUTS).bfloat16()), random(OUTPUTS, INPUTS).bfloat16().double()
    scales = random(OUTPUTS, GROUPS, seed=2)  # of both signs
    values = random_values(-8, 7) if form == "int4" else random_values(-128, 127)
    meaning = (values.double() * scales.double()[:, :, None]).reshape(OUTPUTS, INPUTS)
    return (Int4(pack_halves(values), scales) if form == "int4" else Int8(values, scales)), meaning


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("form", ["int4", "int8", "dense"])
def test_product_is_that_of_the_dequantized_weight(form: str, tokens: int) -> None:
    weight, meaning = weight_and_meaning(form)
    x = random(tokens, INPUTS, seed=3)
    product = linear(x, weight)
    assert (product.shape, product.dtype) == ((tokens, OUTPUTS), torch.float32)
    expected = (x.double() @ meaning.T).float()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_dequantize_gives_the_meaning(form: str) -> None:
    weight, meaning = weight_and_meaning(form)
    assert not isinstance(weight, Dense)
    torch.testing.assert_close(dequantize(weight), meaning.float(), rtol=1e-6, atol=0)
    assert dequantize(weight, torch.bfloat16).dtype == torch.bfloat16


def test_halves_round_trip_with_the_first_half_low() -> None:
    values = random_values(-8, 7)
    assert pack_halves(values).shape == (OUTPUTS, GROUPS, ELEMENTS // 2)
    assert torch.equal(unpack_halves(pack_halves(values)), values)
    assert pack_halves(torch.tensor([[[-8, 0, 7, 1]]], dtype=torch.int8)).tolist() == [[[0xF0, 0x98]]]


@pytest.mark.parametrize("form", ["int4", "int8", "dense"])
def test_weight_is_found_again_by_name(form: str) -> None:
    weight, _ = weight_and_meaning(form)
    tensors = dict([*named_tensors("head", weight), *named_tensors("other", Dense(torch.zeros(1, 1)))])
    found = weight_named("head", tensors)
    assert type(found) is type(weight)
    stored = [field for field in weight if isinstance(field, Tensor)]
    assert all(a is b for a, b in zip(stored, found, strict=False))


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
    torch.testing.assert_close(quantize_activations(x_TI), torchao_round_trip(x_TI), rtol=1e-6, atol=1e-6)


def test_activation_range_includes_zero() -> None:
    """All values near 100: the 255 steps reach from 0, so that a step is 0.4 and zero itself is exact."""
    x = torch.tensor([[100.0, 100.1, 100.3, 102.0]])
    restored = quantize_activations(x)
    assert torch.unique(restored).tolist() == pytest.approx([100.0, 100.4, 102.0], abs=1e-4)
    mixed = quantize_activations(torch.tensor([[-3.3, 0.0, 7.1]]))
    assert mixed[0, 1] == 0


def test_each_token_has_its_own_range() -> None:
    small, large = random(1, 64), random(1, 64, seed=1) * 1000
    together = quantize_activations(torch.cat([small, large]))
    assert torch.equal(together, torch.cat([quantize_activations(small), quantize_activations(large)]))
    step = (small.max() - small.min()) / 255
    assert 0 < (together[0] - small[0]).abs().max() <= step * 0.501


def test_zero_token_stays_zero() -> None:
    assert torch.equal(quantize_activations(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_int8_activations_are_quantized_before_the_product() -> None:
    weight, x = random(OUTPUTS, INPUTS), random(3, INPUTS, seed=1)
    product = linear(x, Dense(weight, int8_activations=True))
    torch.testing.assert_close(product, torchao_round_trip(x) @ weight.T, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(product, x @ weight.T, rtol=1e-5, atol=1e-4)
