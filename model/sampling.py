"""Choosing the next token from logits."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from model.errors import InputError
from model.fields import Checked, Range


@dataclass(frozen=True, kw_only=True)
class Sampling(Checked):
    """How to sample and when to stop. The same seed, prompt and engine give the same text."""

    temperature: Annotated[float, Range(0, 2)] = 0.7
    """0 takes the likeliest token always (greedy)."""
    top_p: Annotated[float, Range(0, 1)] = 0.95
    """Keep the likeliest tokens whose probabilities sum to this (nucleus sampling, Holtzman et al. 2020)."""
    top_k: Annotated[int, Range(0)] = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int | None = None
    """None draws a fresh one."""
    max_tokens: Annotated[int, Range(1)] = 256
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these appears in the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p == 0:
            raise InputError("Sampling.top_p = 0: expected a number above 0 and up to 1")
        if "" in self.stop:
            raise InputError("Sampling.stop contains an empty text, which would stop everywhere; remove it")


class Sampler:
    """Draws tokens by one `Sampling`, with a random state of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def next_token(self, logits_V: Tensor) -> int:
        """Temperature, then top-k, then top-p, then a draw."""
        if self._sampling.temperature == 0:
            return int(logits_V.argmax())
        return int(torch.multinomial(self.probabilities(logits_V), 1, generator=self._random))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """The distribution [V] that `next_token` draws from."""
        below_V = (logits_V - logits_V.max()).double()  # divided by the tiniest temperature, still never inf - inf
        scaled = (below_V / self._sampling.temperature).softmax(dim=-1).float()
        if self._sampling.top_k == 0 and self._sampling.top_p == 1:
            return scaled
        probabilities, order = scaled.sort(descending=True)
        if self._sampling.top_k:
            probabilities[self._sampling.top_k :] = 0
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = torch.where(before < self._sampling.top_p * probabilities.sum(), probabilities, 0.0)
        return torch.zeros_like(scaled).scatter(0, order, kept / kept.sum())
