"""The sampler's distribution against a plain loop and `transformers`, and its draws against the distribution."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.errors import InputError
from model.sampling import LogitsError, Sampler, Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.4, -5.0, 2.9, 1.0])


def random_logits(vocabulary: int, seed: int) -> Tensor:
    return 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def reference(
    logits: Sequence[float], by: Sampling, prompt: Sequence[int] = (), reply: Sequence[int] = ()
) -> list[float]:
    """The distribution step by step, in the order that `model.sampling` states."""
    scores = dict(enumerate(logits))
    for token in {*prompt, *reply}:
        if scores[token] > 0:
            scores[token] /= by.repetition_penalty
        else:
            scores[token] *= by.repetition_penalty
    for token in reply:
        scores[token] -= by.frequency_penalty
    for token in set(reply):
        scores[token] -= by.presence_penalty
    ranked = sorted(scores, key=lambda token: (-scores[token], token))
    if by.temperature == 0:
        return [float(token == ranked[0]) for token in scores]
    weights = {token: math.exp((scores[token] - scores[ranked[0]]) / by.temperature) for token in ranked}
    ranked = [token for token in ranked if weights[token] >= by.min_p]
    ranked = ranked[: by.top_k or None]
    total = sum(weights[token] for token in ranked)
    if by.top_p < 1:
        reached = list(accumulate(weights[token] for token in ranked))
        ranked = [token for token, sum_ in zip(ranked, [0.0, *reached], strict=False) if sum_ < by.top_p * total]
    total = sum(weights[token] for token in ranked)
    return [weights[token] / total if token in set(ranked) else 0.0 for token in scores]


def assert_follows(sampler: Sampler, logits_V: Tensor, expected: Sequence[float]) -> None:
    """The same tokens left, at the same probabilities."""
    found = sampler.probabilities(logits_V)
    assert found.dtype == torch.float32
    assert found.nonzero()[:, 0].tolist() == [token for token, share in enumerate(expected) if share > 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 2.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 3, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_filters_are_the_reference(temperature: float, min_p: float, top_k: int, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    assert_follows(Sampler(sampling), LOGITS, reference(LOGITS.tolist(), sampling))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.5}, {"top_k": 500}, {"min_p": 1e-4}, {"top_k": 500, "min_p": 1e-3}]
)
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 2.0])
def test_filters_of_a_larger_vocabulary_are_the_reference(
    temperature: float, filters: dict[str, Any], scale: float
) -> None:
    logits = scale * random_logits(2000, seed=4)
    sampling = Sampling(temperature=temperature, **filters)
    assert_follows(Sampler(sampling), logits, reference(logits.tolist(), sampling))


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"presence_penalty": 1.5},
    {"presence_penalty": -0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 1.5, "top_p": 1}, {"min_p": 0.1, "top_k": 9}])
@pytest.mark.parametrize("prompt", [[], [2, 0, 2, 11]])
def test_penalties_are_the_reference_at_every_step(
    penalties: dict[str, Any], sampled: dict[str, Any], prompt: list[int]
) -> None:
    sampling = Sampling(seed=1, **penalties, **sampled)
    sampler, reply = Sampler(sampling, prompt), list[int]()
    for step in range(25):
        logits = random_logits(12, seed=step % 3)
        expected = reference(logits.tolist(), sampling, prompt, reply)
        assert_follows(sampler, logits, expected)
        reply.append(sampler.next_token(logits))
        assert expected[reply[-1]] > 0
    assert max(Counter(reply).values()) > 1


@pytest.mark.parametrize("seed", range(20))
def test_distribution_is_that_of_transformers(seed: int) -> None:
    logits = random_logits(300, seed)
    prompt = list(range(0, 300, 7))
    peer = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            MinPLogitsWarper(0.01),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = peer(torch.LongTensor([prompt]), torch.FloatTensor(logits[None].clone()))[0].softmax(-1)
    sampling = Sampling(repetition_penalty=1.2, temperature=0.8, min_p=0.01, top_k=20, top_p=0.9)
    assert_follows(Sampler(sampling, prompt), logits, expected.tolist())


def test_prompt_counts_for_repetition_only() -> None:
    prompt = [3, 3, 6]
    recurrence = Sampler(Sampling(temperature=0, frequency_penalty=2, presence_penalty=2), prompt)
    assert recurrence.next_token(LOGITS) == 3
    assert Sampler(Sampling(temperature=0, repetition_penalty=2), prompt).next_token(LOGITS) == 0


def test_greedy_reply_moves_on_from_penalized_tokens() -> None:
    def reply(**penalties: Any) -> list[int]:
        sampler = Sampler(Sampling(temperature=0, **penalties))
        return [sampler.next_token(LOGITS) for _ in range(6)]

    assert reply() == [3] * 6
    assert reply(presence_penalty=0.5) == [3, 6, 3, 3, 3, 3]
    assert reply(frequency_penalty=0.5) == [3, 6, 3, 6, 0, 3]
    assert reply(repetition_penalty=100) == [3, 6, 0, 7, 2, 4]


def test_zero_temperature_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=0, top_k=2, top_p=0.1))
    assert {sampler.next_token(LOGITS) for _ in range(5)} == {3}
    assert sampler.probabilities(LOGITS).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_one_of_top_k_takes_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=2, top_k=1))
    assert {sampler.next_token(LOGITS) for _ in range(50)} == {3}


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiniest_temperatures_are_greedy(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    assert {sampler.next_token(LOGITS * 20) for _ in range(5)} == {3}


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_p": 1}, {"top_p": 1e-300}, {"temperature": 1e-5}])
def test_the_likeliest_token_is_always_left(settings: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(**{"temperature": 2.0, **settings}))
    assert {sampler.next_token(LOGITS * 0.01 + offset) for offset in (0, 80, -80)} == {3}


def test_equal_logits_go_to_the_lowest_token() -> None:
    logits = torch.zeros(1000)
    logits[::3] = 5
    highest = list(range(0, 1000, 3))

    def left(**settings: Any) -> list[int]:
        return Sampler(Sampling(**settings)).probabilities(logits).nonzero()[:, 0].tolist()

    assert Sampler(Sampling(temperature=0)).next_token(logits) == 0
    assert left(top_k=5, top_p=1) == highest[:5]
    assert left(top_k=len(highest) + 2, top_p=1) == sorted([*highest, 1, 2])
    assert left(top_p=0.5) == highest[:168]
    assert left(top_k=100, top_p=0.5) == highest[:50]


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_nucleus_of_a_large_vocabulary_is_the_smallest(scale: float) -> None:
    logits = scale * random_logits(200_000, seed=1)
    shares = (logits.double() / 0.7).softmax(-1)
    kept = shares[Sampler(Sampling(top_p=0.95)).probabilities(logits) > 0]
    assert kept.sum() - kept.min() < 0.95 <= kept.sum() + 1e-7
    assert len(kept) == (shares >= kept.min()).sum()


def test_nucleus_of_equal_tokens_is_counted_exactly() -> None:
    """Sums in float32 would round every addition the same way, and be wrong by thousands of tokens."""
    logits = torch.full((200_000,), -0.25)
    logits[0] = 0
    other = math.exp(-0.25 / 0.7)
    others = math.ceil((0.95 * (1 + 199_999 * other) - 1) / other)
    kept = Sampler(Sampling(top_p=0.95)).probabilities(logits).nonzero()[:, 0]
    assert kept.tolist() == list(range(1 + others))


@pytest.mark.parametrize("point", [0.0, 1 - 2**-53])
def test_no_random_number_draws_an_impossible_token(monkeypatch: pytest.MonkeyPatch, point: float) -> None:
    monkeypatch.setattr("model.sampling.torch.rand", lambda *_, **__: torch.tensor(point, dtype=torch.float64))
    assert Sampler(Sampling(top_p=1)).next_token(torch.tensor([-900.0, 0, -900])) == 1


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9}])
@pytest.mark.parametrize(("point", "token"), [(0.0, 0), (1 - 2**-53, 6)])
def test_tokens_are_drawn_in_their_own_order(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], point: float, token: int
) -> None:
    """Not in that of their probabilities, which a rounding difference between two machines can change."""
    monkeypatch.setattr("model.sampling.torch.rand", lambda *_, **__: torch.tensor(point, dtype=torch.float64))
    assert Sampler(Sampling(**{"top_p": 1, **settings})).next_token(LOGITS[:7]) == token


@pytest.mark.parametrize(
    "settings", [{"top_k": 4, "top_p": 1}, {"top_p": 0.9}, {"min_p": 0.1, "top_p": 1}, {"temperature": 2, "top_p": 1}]
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    """Chi-square over many seeds, always the same ones; of a right sampler it would fail one such set in a thousand."""
    sampling = Sampling(**{"temperature": 1, **settings})
    samplers = [Sampler(replace(sampling, seed=seed)) for seed in range(500)]
    draws = Counter(sampler.next_token(LOGITS) for sampler in samplers for _ in range(10))
    expected = reference(LOGITS.tolist(), sampling)
    possible = [token for token, share in enumerate(expected) if share > 0]
    assert set(draws) <= set(possible)
    found = chisquare([draws[token] for token in possible], [5000 * expected[token] for token in possible])
    assert found.pvalue > 1e-3


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
    sampling = Sampling(top_k=2, min_p=0.1, repetition_penalty=2, frequency_penalty=1, presence_penalty=1)
    sampler = Sampler(sampling, [3, 6])
    for _ in range(3):
        sampler.next_token(logits)
        sampler.probabilities(logits)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_precision(dtype: torch.dtype) -> None:
    logits, sampling = LOGITS.to(dtype), Sampling(repetition_penalty=1.5)
    expected = reference(logits.tolist(), sampling, [3])
    assert_follows(Sampler(sampling, [3]), logits, expected)
    assert expected[Sampler(sampling, [3]).next_token(logits)] > 0


def test_logits_of_inference_mode() -> None:
    with torch.inference_mode():
        logits = LOGITS + 0
    sampler = Sampler(Sampling(repetition_penalty=2, presence_penalty=1, min_p=0.1, top_k=3, seed=0), [3])
    assert {sampler.next_token(logits) for _ in range(5)} <= set(range(8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 2}, {"presence_penalty": 1.0}])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_refuses_logits_that_are_no_numbers(bad: float, settings: dict[str, Any], place: int) -> None:
    logits = LOGITS.clone()
    logits[place] = bad
    sampler = Sampler(Sampling(**settings))
    message = (
        r'1 of the model\'s 8 logits are NaN or infinite, so its artifact is damaged: run "python -m pipeline run"'
    )
    with pytest.raises(LogitsError, match=message):
        sampler.next_token(logits)
    with pytest.raises(LogitsError, match=message):
        sampler.probabilities(logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"Sampling.temperature = -0.1: expected a number from 0 to 2"),
        ({"temperature": 2.1}, r"Sampling.temperature = 2.1"),
        ({"temperature": float("nan")}, r"Sampling.temperature = nan"),
        ({"top_p": 0}, r"Sampling.top_p = 0: expected a number above 0"),
        ({"top_p": 1.5}, r"Sampling.top_p = 1.5"),
        ({"top_k": -1}, r"Sampling.top_k = -1: expected a whole number of at least 0"),
        ({"min_p": -0.1}, r"Sampling.min_p = -0.1: expected a number from 0 to 1"),
        ({"min_p": 1.1}, r"Sampling.min_p = 1.1"),
        ({"min_p": True}, r"Sampling.min_p = True"),
        ({"repetition_penalty": 0}, r"Sampling.repetition_penalty = 0: expected a number from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, r"Sampling.repetition_penalty = inf"),
        ({"frequency_penalty": 2.1}, r"Sampling.frequency_penalty = 2.1: expected a number from -2 to 2"),
        ({"frequency_penalty": "1"}, r"Sampling.frequency_penalty = '1'"),
        ({"presence_penalty": -2.1}, r"Sampling.presence_penalty = -2.1: expected a number from -2 to 2"),
        ({"presence_penalty": float("nan")}, r"Sampling.presence_penalty = nan"),
        ({"max_tokens": 0}, r"Sampling.max_tokens = 0: expected a whole number of at least 1"),
        ({"seed": 1.5}, r"Sampling.seed = 1.5: expected a whole number or none"),
        ({"stop": ["a"]}, r"Sampling.stop = \['a'\]"),
        ({"stop": ("a", "")}, r"Sampling.stop contains an empty text"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)


def test_defaults_filter_by_top_p_only() -> None:
    defaults = Sampling()
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.7, 0.95, 0, 0)
    assert (defaults.repetition_penalty, defaults.frequency_penalty, defaults.presence_penalty) == (1, 0, 0)
