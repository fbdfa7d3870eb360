"""The storyteller as servers use it: loaded in the background, asked by many at once.

One thread looks questions up, another generates (see `serving/scheduler.py`); callers get pieces through a function of
theirs. Ready answers are given while the model is still loading.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from model.engine import Engine, Piece
from model.errors import InputError
from model.threads import use_threads
from model.tokenizer import Message
from serving.answer import Origin, Storyteller, spoken
from serving.protocol import ChatRequest, TextRequest
from serving.scheduler import ClosingError, QueueFullError, Scheduler, Ticket
from serving.settings import Settings

LOG = logging.getLogger(__name__)
OWN_NAME = "emerald"
"""Names the served model whatever it is, so that clients need not know."""
READY_WAIT_SECONDS = 0.05
T = TypeVar("T")


class LoadingError(Exception):
    """The model cannot answer yet, or, once `failed`, ever."""

    def __init__(self, message: str, *, failed: bool = False) -> None:
        super().__init__(message)
        self.failed = failed


class UnknownModelError(Exception):
    """A model was asked for that is not served here."""


class Service:
    """A storyteller and its threads. `start` it, ask it, `close` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.progress = 0.0
        """How much of loading is done, from 0 to 1."""
        self.failure: str | None = None
        """Why loading failed, in words without paths; None unless it did."""
        self.storyteller: Storyteller | None = None
        """The ready answers; before the model."""
        self.scheduler: Scheduler | None = None
        """The model; None until it is loaded."""
        self._lookups = ThreadPoolExecutor(1, "lookup", use_threads, (1,))  # beside the model's threads
        self._places = threading.BoundedSemaphore(settings.waiting_max + settings.running_max)
        self._loading = threading.Thread(target=self._load, name="load", daemon=True)

    def start(self) -> None:
        """Begins to load."""
        self._loading.start()

    def wait(self, seconds: float) -> bool:
        """Waits that long for loading to end; whether it has, well or badly."""
        self._loading.join(seconds)
        return not self._loading.is_alive()

    def close(self) -> None:
        """Takes nothing new, and lets what was admitted end within the time that is set for it."""
        self._lookups.shutdown(wait=True, cancel_futures=True)
        if self.scheduler is not None:
            self.scheduler.close(self.settings.drain_seconds)

    def opened(self) -> Storyteller:
        """The storyteller, once its ready answers are open; else LoadingError."""
        if self.storyteller is None:
            raise self._not_ready()
        return self.storyteller

    def engine(self) -> Engine:
        """The model, once it is loaded: for its tokenizer and its facts, never to generate. Else LoadingError."""
        if self.scheduler is None:
            raise self._not_ready()
        return self.opened().engine

    def check_model(self, name: str | None) -> None:
        """UnknownModelError for a model that is not served."""
        known = self.opened().model_id
        if name not in (None, OWN_NAME, known):
            raise UnknownModelError(f"model {name!r} is not served here; use {known!r} or {OWN_NAME!r}")

    def manner(self, request: ChatRequest | TextRequest) -> Mapping[str, Any]:
        """The persona's sampling, where it is the persona that speaks."""
        persona = isinstance(request, ChatRequest) and not request.own_system_prompt
        return self.opened().manner if persona else {}

    def answer(
        self,
        ticket: Ticket,
        conversation: Sequence[Message],
        *,
        use_cache: bool = True,
        choices: Mapping[str, str] | None = None,
    ) -> "Future[Origin]":
        """Looks the conversation's last question up, and queues the ticket for the model if there is no answer.

        Pieces go to the ticket's `deliver`, a ready answer's too. The future raises InputError, LoadingError,
        QueueFullError or ClosingError, and then nothing is delivered.
        """

        def work() -> Origin:
            start = time.thread_time()
            try:
                origin = self.opened().look_up(conversation, use_cache=use_cache)
            except InputError as fault:
                if conversation[-1]["role"] != "user":
                    raise
                raise self._not_ready() from fault  # not the request's: the cache's own artifacts do not load
            ticket.cpu_seconds = time.thread_time() - start
            if origin.cached is not None:
                _give(ticket, spoken(origin.cached.answer))
                return origin
            self.engine()
            tokens, dropped = self.opened().prompt(conversation, ticket.sampling.max_tokens, choices)
            self._generate(ticket, tokens)
            return replace(origin, dropped_turns=dropped)

        return self._look_up(work)

    def continue_text(self, ticket: Ticket, text: str | Sequence[int]) -> "Future[Origin]":
        """Queues plain text, or its tokens, for the model to go on with: no persona, no cache."""

        def work() -> Origin:
            tokenizer = self.engine().tokenizer
            tokens = tokenizer.encode(tokenizer.plain(text)) if isinstance(text, str) else list(text)
            most = self.settings.prompt_tokens_max
            if most is not None and len(tokens) > most:
                raise InputError(f"prompt: it has {len(tokens)} tokens, and this server reads {most}; shorten it")
            if not tokens:
                raise InputError("prompt: it is empty; give at least one token")
            if len(tokens) >= self.engine().context:
                raise InputError(
                    f"prompt: it has {len(tokens)} tokens, and the context holds {self.engine().context} with the "
                    "reply; shorten it"
                )
            self._check_known("prompt", tokens)
            if not isinstance(text, str) and not self.settings.system_prompt:
                self._check_plain(tokens)
            self._generate(ticket, tokens)
            return Origin(miss="plain text is continued, not answered")

        return self._look_up(work)

    def tokenize(self, text: str | Sequence[Message]) -> "Future[list[int]]":
        """Tokens of plain text, or of a conversation with the persona in front. Raises what `answer` does."""

        def work() -> list[int]:
            tokenizer = self.engine().tokenizer
            return tokenizer.encode(tokenizer.plain(text)) if isinstance(text, str) else self.opened().tokens(text)

        return self._look_up(work)

    def detokenize(self, tokens: Sequence[int]) -> "Future[str]":
        """Text of tokens, special ones left out. Raises what `answer` does."""

        def work() -> str:
            self._check_known("tokens", tokens)
            return self.engine().tokenizer.decode(tokens)

        return self._look_up(work)

    def _check_known(self, name: str, tokens: Sequence[int]) -> None:
        vocab = self.engine().architecture.vocab
        if not all(0 <= token < vocab for token in tokens):
            raise InputError(f"{name}: the vocabulary has the tokens 0 to {vocab - 1}")

    def _check_plain(self, tokens: Sequence[int]) -> None:
        """InputError for a special token, which text cannot spell: it could open another system prompt."""
        tokenizer = self.engine().tokenizer
        opening = tokenizer.encode("")  # what is put before every text
        given = tokens[len(opening) :] if list(tokens[: len(opening)]) == opening else tokens
        for token in set(given):
            spelt = tokenizer.token_bytes(token).decode(errors="replace")
            if tokenizer.plain(spelt) != spelt:
                raise InputError(f"prompt: token {token} is special, and this server takes those of text only")

    def _look_up(self, work: Callable[[], T]) -> "Future[T]":
        if not self._places.acquire(blocking=False):
            raise QueueFullError(retry_after=1)
        try:
            future = self._lookups.submit(work)
        except RuntimeError as fault:  # the pool was shut down
            self._places.release()
            raise ClosingError("the server is shutting down") from fault
        future.add_done_callback(lambda _: self._places.release())
        return future

    def _generate(self, ticket: Ticket, tokens: Sequence[int]) -> None:
        assert self.scheduler is not None
        self.scheduler.submit(ticket, tokens)

    def _load(self) -> None:
        try:
            storyteller = Storyteller(self.settings)
            LOG.info("serving %s from %s", storyteller.model_id, self.settings.build)  # fails now if there is no model
            self.storyteller = storyteller
            storyteller.warm_up(self._move_on)
            self.scheduler = Scheduler(
                storyteller.engine,
                running_max=self.settings.running_max,
                waiting_max=self.settings.waiting_max,
                threads=storyteller.threads,
            )
            storyteller.cache.prepare()
            gc.freeze()  # what was loaded stays; looking through it would make replies halt
        except InputError as fault:
            LOG.error("the model cannot be loaded: %s", fault)
            self.failure = "the model cannot be loaded; the server's log says why"
        except Exception:
            LOG.exception("the model cannot be loaded")
            self.failure = "the model cannot be loaded; the server's log says why"

    def _move_on(self, done: float) -> None:
        self.progress = done

    def _not_ready(self) -> LoadingError:
        if self.failure is not None:
            return LoadingError(self.failure, failed=True)
        return LoadingError(f"the model is still loading ({self.progress:.0%}); try again in a moment")


def _give(ticket: Ticket, pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        ticket.deliver(piece)
        ticket.flush()
