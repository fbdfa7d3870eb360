"""The sampler's distribution against NumPy, and its draws against the distribution."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.errors import InputError
from model.sampling import Sampler, Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.4, -5.0, 2.9, 1.0])


def reference(logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """Temperature, then the k likeliest, then the fewest of these that hold `top_p` of their probability."""
    weights = np.exp(logits / temperature)
    order = np.argsort(-weights)[: top_k or len(weights)]
    shares = weights[order] / weights[order].sum()
    count = int(np.searchsorted(np.cumsum(shares), top_p * (1 - 1e-9))) + 1
    kept = np.zeros_like(weights)
    kept[order[:count]] = weights[order[:count]]
    distribution: NDArray[np.float64] = kept / kept.sum()
    return distribution


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_probabilities_are_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    expected = reference(LOGITS.double().numpy(), temperature, top_k, top_p)
    np.testing.assert_allclose(sampler.probabilities(LOGITS).numpy(), expected, rtol=1e-5, atol=1e-8)


def test_zero_temperature_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=0, top_k=2, top_p=0.1))
    assert {sampler.next_token(LOGITS) for _ in range(5)} == {3}


def test_one_of_top_k_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=2, top_k=1))
    assert {sampler.next_token(LOGITS) for _ in range(50)} == {3}


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiniest_temperatures_are_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    assert {sampler.next_token(LOGITS * 20) for _ in range(5)} == {3}


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1, top_k=4, top_p=1, seed=5))
    draws = Counter(sampler.next_token(LOGITS) for _ in range(4000))
    expected = reference(LOGITS.double().numpy(), 1, 4, 1)
    assert set(draws) == set(np.flatnonzero(expected))
    for token, count in draws.items():
        assert count / 4000 == pytest.approx(expected[token], abs=4 * (0.25 / 4000) ** 0.5)


def draw(seed: int | None) -> list[int]:
    sampler = Sampler(Sampling(temperature=2, top_p=1, seed=seed))
    return [sampler.next_token(LOGITS) for _ in range(40)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**70 + 3])
def test_same_seed_draws_the_same(seed: int) -> None:
    assert draw(seed) == draw(seed)


def test_other_seeds_and_none_draw_anew() -> None:
    assert len({tuple(draw(seed)) for seed in (0, 1, 2, None, None)}) == 5


def test_sampler_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_are_left_as_they_were() -> None:
    logits = LOGITS.clone()
    Sampler(Sampling(top_k=2)).next_token(logits)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"Sampling.temperature = -0.1: expected a number from 0 to 2"),
        ({"temperature": 2.1}, r"Sampling.temperature = 2.1"),
        ({"temperature": float("nan")}, r"Sampling.temperature = nan"),
        ({"top_p": 0}, r"Sampling.top_p = 0: expected a number above 0"),
        ({"top_p": 1.5}, r"Sampling.top_p = 1.5"),
        ({"top_k": -1}, r"Sampling.top_k = -1: expected a whole number of at least 0"),
        ({"max_tokens": 0}, r"Sampling.max_tokens = 0: expected a whole number of at least 1"),
        ({"seed": 1.5}, r"Sampling.seed = 1.5: expected a whole number or none"),
        ({"stop": ["a"]}, r"Sampling.stop = \['a'\]"),
        ({"stop": ("a", "")}, r"Sampling.stop contains an empty text"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)
