"""The packed 8-bit weights, as the kernel of this machine reads them."""

import pytest
import torch
from torch import Tensor

from model.errors import InputError
from model.int8_linear import GROUP, linear, pack

pytestmark = pytest.mark.usefixtures("kernels")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (37, 384), (1, 64)])
def test_unit_vectors_give_the_weight_back(outputs: int, inputs: int) -> None:
    """Each entry within half a step of its group's 238, and a little for the scale in bf16."""
    weight_OI = random(outputs, inputs) * 10 ** random(outputs, 1, seed=1)
    found_OI = linear(torch.eye(inputs), pack("w", weight_OI), outputs).T
    step_OG = weight_OI.unflatten(1, (-1, GROUP)).abs().amax(dim=2) / 119
    difference_OG = (found_OI - weight_OI).unflatten(1, (-1, GROUP)).abs().amax(dim=2)
    assert (difference_OG <= 0.75 * step_OG).all()


@pytest.mark.parametrize("large", ["weights", "activations"])
def test_large_entries_cost_nothing_beyond_their_group(large: str) -> None:
    """Their partners are zero, so that only a scale shared with them could spoil the product."""
    weight_OI, x_TI = random(32, 256), random(8, 256, seed=1)
    big, none = (weight_OI, x_TI) if large == "weights" else (x_TI, weight_OI)
    big[:, 64:128] *= 10_000
    none[:, 64:128] = 0
    expected = x_TI.double() @ weight_OI.double().T
    difference = linear(x_TI, pack("w", weight_OI), 32).double() - expected
    assert difference.norm() / expected.norm() < 0.01


def test_inputs_that_do_not_divide_into_groups_are_named() -> None:
    with pytest.raises(InputError, match=r"tensor layer\.0\.weight: 100 inputs do not divide into groups of 64"):
        pack("layer.0.weight", random(16, 100))


def test_weights_that_are_not_finite_are_named() -> None:
    weight_OI = random(16, 128)
    weight_OI[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"tensor layer\.0\.weight: 1 of 2048 weights are NaN"):
        pack("layer.0.weight", weight_OI)
