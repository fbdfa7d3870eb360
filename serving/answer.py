"""Answers a conversation: from the cache if its last question has a ready answer, else from the model.

The model is loaded when it is first needed, so a question with a ready answer never waits for it.
"""

import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from model.cpu import available_cores
from model.engine import Engine, FinishReason, Piece, Timing, timed
from model.errors import InputError
from model.sampling import Sampling
from model.tokenizer import Message
from serving.cache import Cache, Hit, Miss
from serving.certificate import Certificate, admit
from serving.embedder import Embedder
from serving.settings import Settings

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer on its way: where it comes from, and its pieces as they are made."""

    cached: Hit | None
    """The ready answer, or None if the model answers."""
    certificate: Certificate | None
    """What vouches for a semantic match; None for an exact one, and for the model."""
    miss: str | None
    """Why the cache had no answer; None on a hit."""
    prompt_tokens: int
    dropped_turns: int
    """Turns at the beginning of the conversation that the context had no room for."""
    pieces: Iterator[tuple[Piece, Timing]]


class Storyteller:
    """The persona, its ready answers and its model."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads or available_cores())
        self._settings = settings
        self.cache = Cache(settings.folder("cache"), Embedder(settings.folder("embedder")), settings.revoked_entries)
        self.certificate = admit(self.cache, Path(settings.build) / "certificate.json")
        if self.certificate is None:
            LOG.warning("the cache answers exact matches only: %s", self.cache.uncertified)

    @cached_property
    def engine(self) -> Engine:
        """The model, loaded at the first use."""
        return Engine.load(self._settings.folder("engine"))

    def warm_up(self) -> None:
        """Loads all that is otherwise loaded at its first use."""
        self.cache.nearest(self.cache.embedder.embed("hello"), 1)
        self.engine.forget()

    def reply(self, conversation: Sequence[Message], sampling: Sampling, *, use_cache: bool = True) -> Reply:
        """Answers the last user message of a conversation (user and assistant turns, oldest first)."""
        if not conversation or conversation[-1]["role"] != "user":
            raise InputError("the conversation must end with a user message")
        start = time.perf_counter()
        found = self.cache.lookup(conversation[-1]["content"]) if use_cache else Miss(reason="the cache was bypassed")
        if isinstance(found, Hit):
            pieces = _spoken(found.answer, time.perf_counter() - start)
            proof = self.certificate if found.tier == "semantic" else None
            return Reply(cached=found, certificate=proof, miss=None, prompt_tokens=0, dropped_turns=0, pieces=pieces)
        tokens, dropped = self._prompt(conversation, sampling)
        pieces = timed(self.engine.generate(tokens, sampling))
        return Reply(
            cached=None,
            certificate=None,
            miss=found.reason,
            prompt_tokens=len(tokens),
            dropped_turns=dropped,
            pieces=pieces,
        )

    def _prompt(self, conversation: Sequence[Message], sampling: Sampling) -> tuple[list[int], int]:
        """The persona and as many of the latest turns as leave room for the reply."""
        persona = {"role": "system", "content": self.cache.persona["system_prompt"]}
        room = self.engine.context - min(sampling.max_tokens, self.engine.context // 2)
        for dropped in range(len(conversation)):
            if conversation[dropped]["role"] == "user":
                tokens = self.engine.tokenizer.encode_chat([persona, *conversation[dropped:]])
                if len(tokens) <= room:
                    return tokens, dropped
        raise InputError(
            f"the message is too long: with the persona it has {len(tokens)} tokens, and {room} fit beside a reply of "
            f"{sampling.max_tokens}; shorten it"
        )


def _spoken(answer: str, seconds: float) -> Iterator[tuple[Piece, Timing]]:
    """A ready answer word by word, so that it streams as the model does."""
    words = re.findall(r"\s*\S+", answer)
    for count, word in enumerate(words, start=1):
        done: FinishReason | None = "stop" if count == len(words) else None
        yield Piece(text=word, tokens=0, finish_reason=done), Timing(ttft_s=seconds, tpot_s=0.0, tokens=0)
