"""GPTQ against the same algorithm done naively in float64, and against rounding each weight by itself."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import InputError
from model.gptq import DAMPING, gptq
from model.quantization import quantize

STEPS = 14
each_group = pytest.mark.parametrize("group", [32, 160], ids=["groups-of-32", "channel-wise"])


def inputs(tokens: int, seed: int) -> Tensor:
    """160 inputs that depend on one another, a few of them much larger: what calibration sees in a real network."""
    mixing = torch.randn(160, 160, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -2, 160)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 160, generator=random) @ mixing.T
    x[:, ::40] *= 8
    return x


def weight() -> Tensor:
    made: Tensor = torch.randn(48, 160, generator=torch.Generator().manual_seed(1)) * 0.02
    return made


def naive(weight_OI: NDArray[np.float64], hessian_II: NDArray[np.float64], scales_OG: Tensor) -> NDArray[np.float64]:
    """Optimal brain quantization in GPTQ's order: after each column the inverse Hessian loses a row and a column."""
    inputs, scales = weight_OI.shape[1], scales_OG.double().numpy()
    order = np.argsort(-np.diag(hessian_II), kind="stable")
    damped = hessian_II + DAMPING * np.diag(hessian_II).mean() * np.eye(inputs)
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    left, values = weight_OI[:, order].copy(), np.empty_like(weight_OI)
    for j, column in enumerate(order):
        scale = scales[:, column // (inputs // scales.shape[1])]
        values[:, column] = np.clip(np.round(left[:, j] / scale), -8, 7)
        error = (left[:, j] - values[:, column] * scale) / inverse[j, j]
        left -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


@each_group
def test_values_are_those_of_the_naive_algorithm(group: int) -> None:
    """A tie that float32 breaks the other way changes the rest of its row; rows are independent."""
    x, w = inputs(400, seed=2), weight()
    found = gptq("w", w, x.T @ x, group, STEPS)
    expected = naive(w.double().numpy(), (x.T @ x).double().numpy(), found.scales)
    rows_that_differ = (found.values.double().numpy() != expected).any(axis=1)
    assert rows_that_differ.sum() <= 2


@each_group
def test_products_of_other_inputs_are_nearer_than_by_rounding_alone(group: int) -> None:
    x, others, w = inputs(400, seed=2), inputs(400, seed=3), weight()
    candidates = {
        "search": quantize("w", w, 4, group, STEPS),
        "weighted-search": quantize("w", w, 4, group, STEPS, x.square().mean(dim=0)),
        "gptq": gptq("w", w, x.T @ x, group, STEPS),
    }
    lost = {name: float((others @ (w - one.dequantize()).T).square().sum()) for name, one in candidates.items()}
    assert lost["gptq"] < 0.7 * lost["weighted-search"] < 0.7 * lost["search"]


@each_group
def test_independent_inputs_leave_nothing_to_make_up_for(group: int) -> None:
    w = weight()
    found, expected = gptq("w", w, torch.eye(160), group, STEPS), quantize("w", w, 4, group, STEPS)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.values, expected.values)


@each_group
def test_energies_count_only_in_proportion(group: int) -> None:
    x, w = inputs(400, seed=2), weight()
    first, second = (gptq("w", w, factor * (x.T @ x), group, STEPS) for factor in (1.0, 2.0**-12))
    assert torch.equal(first.values, second.values)


def test_inputs_that_are_always_zero(group: int = 32) -> None:
    """Nothing is known of what they do, and their own group of 32 has no energy at all."""
    x, w = inputs(400, seed=2), weight()
    x[:, 32:64] = 0
    found = gptq("w", w, x.T @ x, group, STEPS)
    assert found.dequantize().isfinite().all()
    assert float((x @ (w - found.dequantize()).T).norm() / (x @ w.T).norm()) < 0.1


def test_a_damaged_weight_is_named() -> None:
    w = weight()
    w[3, 5] = torch.nan
    with pytest.raises(InputError, match="tensor w: 1 of 7680 weights are NaN or infinite; fetch it again"):
        gptq("w", w, torch.eye(160), 32, STEPS)
