"""Answers a conversation: from the cache if its last question has a ready answer, else from the model.

The model is loaded when it is first needed or asked for, so a question with a ready answer never waits for it.
"""

import logging
import re
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.artifact import Progress, unwatched
from model.cpu import available_cores
from model.engine import Engine, FinishReason, Piece, Timing, timed
from model.errors import InputError
from model.sampling import Sampling
from model.threads import use_threads
from model.tokenizer import Message
from serving.cache import LONGEST_QUESTION, Cache, Hit, Miss
from serving.certificate import Certificate, admit
from serving.embedder import Embedder
from serving.persona import manner
from serving.prologue import model_id, system_prompt, visible
from serving.settings import Settings

LOG = logging.getLogger(__name__)
VERIFIED_SHARE = 0.9
"""Of loading, how much of the progress bar is reading and verifying files; the rest is computing the persona."""
LONGEST_LOOKUP = 4000
"""Characters, spacing and punctuation included, beyond which a message is not even compared with the known ones."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an answer comes from."""

    cached: Hit | None = None
    """The ready answer, or None if the model answers."""
    certificate: Certificate | None = None
    """What vouches for a semantic match; None for an exact one, and for the model."""
    miss: str | None = None
    """Why the cache had no answer; None on a hit."""
    dropped_turns: int = 0
    """Turns at the beginning of the conversation that the context had no room for."""

    def facts(self) -> dict[str, str | int | float]:
        """What clients are told; for a semantic match, by which certificate, and how often it is wrong at most.

        Never how similar the question was: that would show how to poison or probe a cache.
        """
        if self.cached is None:
            return {"source": "model", "miss": self.miss or "", "dropped_turns": self.dropped_turns}
        facts: dict[str, str | int | float] = {
            "source": "cache",
            "entry": self.cached.entry,
            "tier": self.cached.tier,
        }
        if self.certificate is not None:
            facts |= {"certificate": self.certificate.identity, "false_hit_bound": round(self.certificate.bound, 4)}
        return facts


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer on its way: where it comes from, and its pieces as they are made."""

    origin: Origin
    pieces: Iterator[tuple[Piece, Timing]]


class Storyteller:
    """The persona, its ready answers and its model."""

    def __init__(self, settings: Settings) -> None:
        self.threads = settings.threads or available_cores()
        use_threads(self.threads)
        self._settings = settings
        self._progress: Progress = unwatched
        self.cache = Cache(settings.folder("cache"), Embedder(settings.folder("embedder")), settings.revoked_entries)
        self.certificate = admit(self.cache, Path(settings.build) / "certificate.json")
        if self.certificate is None:
            LOG.warning("the cache answers exact matches only: %s", self.cache.uncertified)

    @cached_property
    def engine(self) -> Engine:
        """The model, loaded at the first use."""
        return Engine.load(self._settings.folder("engine"), self._settings.contexts, self._progress)

    def warm_up(self, progress: Progress = unwatched) -> None:
        """Loads what else is loaded at its first use, and computes the persona, which every prompt begins with."""
        self._progress = lambda done: progress(VERIFIED_SHARE * done)
        with ThreadPoolExecutor(1, "cache", use_threads, (1,)) as beside:
            first_lookup = beside.submit(lambda: self.cache.nearest(self.cache.embedder.embed("hello"), 1))
            persona = self.engine.tokenizer.encode_chat([self._system({})])
            self.engine.next_logits(persona)
            first_lookup.result()
        progress(1.0)

    @cached_property
    def model_id(self) -> str:
        """The model's name, which its folder tells before it is loaded and verified."""
        return model_id(self._settings.folder("engine").parent)

    @cached_property
    def manner(self) -> Mapping[str, Any]:
        """How the persona speaks unless it is told otherwise: its values of `Sampling`."""
        return manner(self.cache.persona, self.model_id)

    def prologue(self) -> dict[str, Any]:
        """Persona and prologue as visitors see them: what a choice tells the model stays here."""
        return visible(self.cache.persona, self.cache.prologue)

    def look_up(self, conversation: Sequence[Message], *, use_cache: bool = True) -> Origin:
        """Whether a conversation (user and assistant turns, oldest first) ends in a question with a ready answer."""
        if not conversation or conversation[-1]["role"] != "user":
            raise InputError("the conversation must end with a user message")
        question = conversation[-1]["content"]
        found: Hit | Miss
        if not use_cache:
            found = Miss(reason="the cache was bypassed")
        elif len(question) > LONGEST_LOOKUP:
            found = Miss(reason=f"it is longer than {LONGEST_QUESTION} characters")
        else:
            found = self.cache.lookup(question)
        if isinstance(found, Miss):  # the log has why there is no certificate, with paths that are nobody's business
            return Origin(miss=found.reason.replace(self.cache.uncertified, "no certificate fits"))
        return Origin(cached=found, certificate=self.certificate if found.tier == "semantic" else None)

    def prompt(
        self, conversation: Sequence[Message], max_tokens: int, choices: Mapping[str, str] | None = None
    ) -> tuple[list[int], int]:
        """The persona and as many of the latest turns as leave room for the reply; and how many were dropped.

        A system message that the conversation begins with stands in the persona's place. `choices` are the
        visitor's in the prologue, by scene.
        """
        system, turns = self._parted(conversation, choices or {})
        room = self.engine.context - min(max_tokens, self.engine.context // 2)
        room = min(room, self._settings.prompt_tokens_max or room)
        starts = [at for at, turn in enumerate(turns) if turn["role"] == "user"]

        def written(start: int) -> list[int]:
            return self.engine.tokenizer.encode_chat([system, *turns[start:]])

        tokens = written(starts[0])
        if len(tokens) <= room:
            return tokens, starts[0]
        fitting = bisect_left(starts, -room, lo=1, key=lambda start: -len(written(start)))
        if fitting < len(starts):
            return written(starts[fitting]), starts[fitting]
        tokens = written(starts[-1])
        raise InputError(
            f"the message is too long: with the persona it has {len(tokens)} tokens, and {room} fit beside a reply of "
            f"{max_tokens}; shorten it"
        )

    def tokens(self, conversation: Sequence[Message]) -> list[int]:
        """The persona and all of a conversation as the model would read it, whether or not it fits."""
        system, turns = self._parted(conversation, {})
        return self.engine.tokenizer.encode_chat([system, *turns])

    def reply(self, conversation: Sequence[Message], sampling: Sampling, *, use_cache: bool = True) -> Reply:
        """Answers the last user message of a conversation on the spot, for one user alone."""
        start = time.perf_counter()
        origin = self.look_up(conversation, use_cache=use_cache)
        if origin.cached is not None:
            timing = Timing(ttft_s=time.perf_counter() - start, tpot_s=0.0, tokens=0)
            return Reply(origin=origin, pieces=((piece, timing) for piece in spoken(origin.cached.answer)))
        tokens, dropped = self.prompt(conversation, sampling.max_tokens)
        pieces = timed(self.engine.generate(tokens, sampling))
        return Reply(origin=Origin(miss=origin.miss, dropped_turns=dropped), pieces=pieces)

    def _parted(self, conversation: Sequence[Message], choices: Mapping[str, str]) -> tuple[Message, list[Message]]:
        """The system message, which is the persona's unless the conversation has its own, and the turns."""
        persona, turns = self._system(choices), list(conversation)
        return (turns.pop(0), turns) if turns[0]["role"] == "system" else (persona, turns)

    def _system(self, choices: Mapping[str, str]) -> Message:
        """The persona, and what the visitor's choices in the prologue add to it."""
        return {"role": "system", "content": system_prompt(self.cache.persona, self.cache.prologue, choices)}


def spoken(answer: str) -> Iterator[Piece]:
    """A ready answer word by word, so that it streams as the model does."""
    words = re.findall(r"\s*\S+", answer)
    for count, word in enumerate(words, start=1):
        done: FinishReason | None = "stop" if count == len(words) else None
        yield Piece(text=word, tokens=0, finish_reason=done)
