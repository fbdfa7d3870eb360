"""Choosing the next token from logits.

Steps in vLLM's order: repetition, frequency and presence penalties, temperature, min_p, top_k, top_p, draw. Each filter
measures what the one before has left, and never leaves fewer than the likeliest token; of equal logits the lower token
id is the likelier. Nothing sorts the whole vocabulary, which takes 10 ms for 128,256 tokens.

Shape letters: V vocabulary, C candidates that the filters have left.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from model.artifact import REMEDY
from model.errors import InputError
from model.fields import Checked, Range

GREEDY_BELOW = 1e-5
"""A temperature under this is taken for 0, as in vLLM: in float32 the tiniest ones are 0, and 0 / 0 is no number."""
BIN_SHIFT = 17
"""The low bits of a float32 that its bin in a histogram leaves out: 64 bins per power of two remain."""


class LogitsError(RuntimeError):
    """The model produced logits that are no numbers: the fault of the artifact, not of the request."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How to sample and when to stop. The same seed, prompt and engine give the same text."""

    temperature: Annotated[float, Range(0, 2)] = 0.7
    """0 takes the likeliest token always (greedy)."""
    top_p: Annotated[float, Range(0, 1)] = 0.95
    """Keep the likeliest tokens whose probabilities sum to this (nucleus sampling, Holtzman et al. 2020)."""
    top_k: Annotated[int, Range(0)] = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: Annotated[float, Range(0, 1)] = 0.0
    """Keep tokens at least this times as probable as the likeliest (Nguyen et al. 2024); 0 keeps all."""
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or reply (CTRL, Keskar et al. 2019)."""
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Subtracted from a token's logit for every time it is in the reply (OpenAI's definition)."""
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Subtracted once from the logit of every token that is in the reply (OpenAI's definition)."""
    seed: int | None = None
    """None draws a fresh one."""
    max_tokens: Annotated[int, Range(1)] = 256
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these appears in the text."""
    logprobs: Annotated[int, Range(0, 20)] | None = None
    """Report every token's log probability, and those of this many of the likeliest; None reports nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p == 0:
            raise InputError("Sampling.top_p = 0: expected a number above 0 and up to 1")
        if "" in self.stop:
            raise InputError("Sampling.stop contains an empty text, which would stop everywhere; remove it")


class TokenLogprob(NamedTuple):
    """A token and its natural log probability by the model's own logits, before any penalty, temperature or filter."""

    token: int
    logprob: float


def logprobs(logits_V: Tensor, token: int, count: int) -> tuple[TokenLogprob, ...]:
    """The chosen token's log probability, and after it those of the `count` likeliest tokens."""
    logprobs_V = logits_V.float().log_softmax(0)
    top = logprobs_V.topk(count)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs_V[token])), *(TokenLogprob(*pair) for pair in likeliest)


class Sampler:
    """Draws the tokens of one reply by one `Sampling`, with a random state and counts of its own."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._seen = set(prompt)
        self._reply: Counter[int] = Counter()
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def next_token(self, logits_V: Tensor) -> int:
        """Draws a token and counts it into the reply. Raises LogitsError if a logit is NaN or infinite."""
        logits_V = _checked(self._penalized(logits_V.float()))
        token = int(logits_V.argmax()) if self._greedy else self._drawn(*self._candidates(logits_V))
        self._seen.add(token)
        self._reply[token] += 1
        return token

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution [V] that `next_token` draws from. Raises LogitsError if a logit is NaN or infinite."""
        logits_V = _checked(self._penalized(logits_V.float()))
        if self._greedy:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1)
        tokens_C, weights_C = self._candidates(logits_V)
        return torch.zeros_like(logits_V).index_copy_(0, tokens_C, weights_C / weights_C.sum())

    @property
    def _greedy(self) -> bool:
        return self._sampling.temperature < GREEDY_BELOW

    def _penalized(self, logits_V: Tensor) -> Tensor:
        by = self._sampling
        repetition = by.repetition_penalty != 1 and self._seen
        recurrence = (by.frequency_penalty or by.presence_penalty) and self._reply
        if not (repetition or recurrence):
            return logits_V
        logits_V = logits_V.clone()
        if repetition:
            seen = torch.tensor(list(self._seen))
            found = logits_V[seen]
            logits_V[seen] = torch.where(found > 0, found / by.repetition_penalty, found * by.repetition_penalty)
        if recurrence:
            tokens, counts = torch.tensor(list(self._reply.items())).T
            logits_V[tokens] -= by.frequency_penalty * counts + by.presence_penalty
        return logits_V

    def _candidates(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [C] left to draw from, ascending, and their weights: probabilities by that of the likeliest."""
        by = self._sampling
        weights_C = (logits_V - logits_V.max()).div_(by.temperature).exp_()
        tokens_C = torch.arange(len(weights_C))
        if by.min_p > 0:
            kept = (weights_C >= by.min_p).nonzero()[:, 0]
            tokens_C, weights_C = tokens_C[kept], weights_C[kept]
        if 0 < by.top_k < len(weights_C):
            kept = _top_k(weights_C, by.top_k)
            tokens_C, weights_C = tokens_C[kept], weights_C[kept]
        if by.top_p < 1:
            kept = _top_p(weights_C, by.top_p)
            tokens_C, weights_C = tokens_C[kept], weights_C[kept]
        return tokens_C, weights_C

    def _drawn(self, tokens_C: Tensor, weights_C: Tensor) -> int:
        """Inverts the cumulative distribution at one random number; `multinomial` would take one per token."""
        cumulated_C = weights_C.cumsum(0, dtype=torch.float64)
        point = torch.rand((), dtype=torch.float64, generator=self._random) * cumulated_C[-1]
        return int(tokens_C[torch.searchsorted(cumulated_C, point, right=True)])


def _checked(logits_V: Tensor) -> Tensor:
    """The same logits, unless one is NaN or infinite: argmax would take a NaN for the likeliest token."""
    if not all(math.isfinite(extreme) for extreme in logits_V.aminmax()):
        bad = int((~logits_V.isfinite()).sum())
        raise LogitsError(
            f"{bad} of the model's {len(logits_V)} logits are NaN or infinite, so its artifact is damaged: {REMEDY}"
        )
    return logits_V


def _top_k(weights_C: Tensor, count: int) -> Tensor:
    """Positions of the `count` greatest weights, ascending."""
    least = weights_C.topk(count).values[-1]
    near = (weights_C >= least).nonzero()[:, 0]  # more than `count` if there are ties
    return near[weights_C[near].argsort(descending=True, stable=True)[:count]].sort().values


def _top_p(weights_C: Tensor, share: float) -> Tensor:
    """Positions of the fewest weights, greatest first, that make up `share` of the sum; ascending.

    A histogram finds the bin where they end, and only that bin is sorted: the cost stays small for flat distributions.
    The bits of positive floats are ordered as the floats are, so a weight's upper bits are its bin.
    """
    bins_C = weights_C.view(torch.int32) >> BIN_SHIFT
    held = torch.bincount(bins_C, weights_C.double()).flip(0).cumsum(0)  # by each bin and those above, greatest first
    wanted = share * held[-1]
    rank = int(torch.searchsorted(held, wanted))
    last_bin = len(held) - 1 - rank
    near = (bins_C >= last_bin).nonzero()[:, 0]
    edge = (bins_C[near] == last_bin).nonzero()[:, 0]
    sorted_edge, order = weights_C[near[edge]].sort(descending=True, stable=True)
    held_above = held[rank - 1] if rank else 0
    count = int(torch.searchsorted(held_above + sorted_edge.cumsum(0, dtype=torch.float64), wanted)) + 1
    kept = torch.ones(len(near), dtype=torch.bool).index_fill_(0, edge[order[count:]], False)
    return near[kept]
