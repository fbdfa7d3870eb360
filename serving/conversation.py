"""A message over a WebSocket: HTTP's chat completions, their checks and errors included, as frames."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from pydantic import ValidationError

from model.engine import Piece
from model.errors import InputError
from serving.answer import Origin
from serving.completion import Completion
from serving.energy import EnergyModel
from serving.errors import error_body
from serving.faults import described
from serving.protocol import ChatRequest, refusal
from serving.scheduler import Ticket
from serving.security import veiled
from serving.service import LoadingError, Service
from serving.websocket import FRAME_BYTES, NAME_CHARACTERS, Frames, GoneError, UnsentError, encoded, named

LOG = logging.getLogger("emerald.requests")
ACTIONS = ("prologue", "chat")
EXAMPLE = '{"action": "chat", "body": {"messages": [{"role": "user", "content": "Who is the Wizard?"}]}}'
BEAT_SECONDS = 1.0
"""A client that waits for the model hears this often how far it is."""
BATCH_SECONDS = 0.1
"""Text that comes sooner than this after the last frame waits for it: a post costs 10 to 30 ms and is billed."""
CHUNK_BYTES = FRAME_BYTES - 1024
"""Of a frame, what its chunk may take; the rest is type, request and number."""
QUOTED = 2000
"""Characters of an error, which may quote what the client sent; of a field's name, a tenth."""
DROP_SECONDS = 30.0
"""How long a reply that was given up may take to leave the engine: one step, of a piece of the prompt at most."""


class Conversation:
    """Answers a client's message, until some time of `time.monotonic` at most."""

    def __init__(self, service: Service, frames: Frames, client: str, until: float) -> None:
        self._service, self._frames, self._client, self._until = service, frames, client, until
        self._energy = EnergyModel(service.settings.grams_per_kwh)

    def take(self, message: object) -> None:
        """Does what a message asks, up to the frame that ends it. Raises GoneError or UnsentError."""
        try:
            action, body = _action(message)
            if action == "chat":
                self._answer(body)
            else:
                self._wait_for_model()
        except (GoneError, UnsentError):
            raise
        except Exception as fault:
            self._fail(fault)

    def _wait_for_model(self) -> None:
        """Tells of the progress until the model is ready; LoadingError if it does not become so in time."""
        while not self._service.wait(BEAT_SECONDS):
            self._tell_progress()
        self._service.engine()
        proof = self._service.opened().certificate
        self._frames.send("ready", cache="exact matches only" if proof is None else f"certified {proof.identity}")

    def _answer(self, body: Mapping[str, Any]) -> None:
        """Answers a chat request, which has the shape of HTTP's."""
        request = _read(body)
        turns = request.conversation(self._service.settings)
        LOG.info("%s: %s", self._client, veiled(turns[-1]["content"], self._service.settings))
        inbox: SimpleQueue[Piece | Exception] = SimpleQueue()
        left = self._until - time.monotonic()
        ticket = Ticket(request.sampling(self._service.settings, {}), self._client, left, inbox.put)
        outcome = "abort"
        try:
            origin = self._origin(ticket, request)
            self._frames.send("origin", **origin.facts())
            tokenizer = None if origin.cached else self._service.engine().tokenizer
            name = request.model or self._service.opened().model_id
            completion = Completion(name, ticket, tokenizer, self._energy)
            for batch in batches(inbox):
                for part in fitting(batch, completion):
                    for chunk in completion.chunks(part):
                        self._frames.send("chunk", data=chunk)
            self._frames.send("done", **completion.figures())
            outcome = "done"
        finally:
            ticket.cancel()
            self._drop()
            LOG.info("%s: %s after %d tokens", self._client, outcome, ticket.tokens)

    def _fail(self, fault: Exception) -> None:
        """Ends the request with an error in OpenAI's shape."""
        status, message, headers = described(fault)
        if status == 500:
            LOG.error("%s: failed", self._client, exc_info=fault)
        wait = {"retry_after": int(headers["Retry-After"])} if "Retry-After" in headers else {}
        param = fault.param if isinstance(fault, FieldError) else None
        self._frames.send("error", status=status, **error_body(status, message[:QUOTED], param), **wait)

    def _origin(self, ticket: Ticket, request: ChatRequest) -> Origin:
        """Where the answer comes from, which may have to wait for the model."""
        turns = request.conversation(self._service.settings)
        while True:
            try:
                self._service.check_model(request.model)
                ticket.sampling = request.sampling(self._service.settings, self._service.manner(request))
                found = self._service.answer(
                    ticket, turns, use_cache=request.takes_ready_answers, choices=request.emerald.choices
                )
                return found.result()
            except LoadingError as fault:
                if fault.failed:
                    raise
            if not self._service.wait(BEAT_SECONDS):
                self._tell_progress()

    def _tell_progress(self) -> None:
        if time.monotonic() > self._until:
            raise LoadingError(f"the model is still loading ({self._service.progress:.0%}); try again in a moment")
        self._frames.send("loading", progress=round(self._service.progress, 3))

    def _drop(self) -> None:
        """Waits until the engine is idle: Lambda freezes this process when the invocation ends, as it then is."""
        scheduler, until = self._service.scheduler, time.monotonic() + DROP_SECONDS
        while scheduler is not None and (scheduler.running or scheduler.waiting) and time.monotonic() < until:
            time.sleep(0.005)


class FieldError(InputError):
    """A field of a request is wrong; `param` is its name."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param and param[: QUOTED // 10]


def batches(inbox: "SimpleQueue[Piece | Exception]") -> Iterator[list[Piece]]:
    """Pieces in order: the first at once, later ones together with those that come within BATCH_SECONDS.

    Ends with the piece that has a finish reason; raises an exception that comes, after the pieces before it.
    """
    pending: list[Piece] = []
    due = time.monotonic()
    while True:
        try:
            piece = inbox.get(timeout=max(0.0, due - time.monotonic()) if pending else None)
        except Empty:
            yield pending
            pending, due = [], time.monotonic() + BATCH_SECONDS
            continue
        if isinstance(piece, Exception):
            if pending:
                yield pending
            raise piece
        pending.append(piece)
        if piece.finish_reason:
            yield pending
            return


def fitting(pieces: Sequence[Piece], completion: Completion) -> Iterator[Sequence[Piece]]:
    """The same pieces in as few parts as fit a frame each; a single one that does not is cut within its text."""
    largest = max((len(encoded(chunk)) for chunk in completion.chunks(pieces)), default=0)
    if largest <= CHUNK_BYTES or (len(pieces) == 1 and len(pieces[0].text) < 2):
        yield pieces
        return
    if len(pieces) == 1:
        half = len(pieces[0].text) // 2
        first = replace(pieces[0], text=pieces[0].text[:half], finish_reason=None)
        pieces = [first, replace(pieces[0], text=pieces[0].text[half:], logprobs=())]
    middle = len(pieces) // 2
    yield from fitting(pieces[:middle], completion)
    yield from fitting(pieces[middle:], completion)


def _action(message: object) -> tuple[str, Mapping[str, Any]]:
    """What a message asks, and the request in it; InputError if it is no message."""
    if not isinstance(message, dict):
        raise InputError(f"a message is a JSON object, such as {EXAMPLE}")
    unknown = sorted(message.keys() - {"action", "id", "body"})
    if unknown:
        raise FieldError(f"{unknown[0]}: not supported by this server; leave it out", unknown[0])
    if message.get("action") not in ACTIONS:
        raise FieldError(f'action: expected "prologue" or "chat", as in {EXAMPLE}', "action")
    if "id" in message and not named(message["id"]):
        raise FieldError(f"id: expected text of 1 to {NAME_CHARACTERS} printable ASCII characters", "id")
    body = message.get("body", {})
    if not isinstance(body, dict) or (message["action"] == "prologue") == ("body" in message):
        raise FieldError("body: a chat has one, an object as for /v1/chat/completions; a prologue has none", "body")
    return message["action"], body


def _read(body: Mapping[str, Any]) -> ChatRequest:
    """The request; InputError names what is wrong with it, or what a WebSocket has no choice of."""
    for field in ("stream", "stream_options"):
        if field in body and body[field] is not True:
            raise FieldError(f"{field}: answers come in pieces here, and end with their usage; leave it out", field)
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as fault:
        raise FieldError(*refusal(list(fault.errors()))) from None
