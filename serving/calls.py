"""Completions from their arrival to their end: pieces come from other threads, and clients hang up at any moment."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.engine import Piece
from serving.answer import Origin
from serving.completion import Completion, event
from serving.energy import Energy, EnergyModel
from serving.errors import error_body
from serving.faults import ClientGoneError, PerKeyError, described
from serving.metrics import Metrics
from serving.protocol import ChatRequest, TextRequest
from serving.scheduler import Ticket
from serving.security import veiled
from serving.service import Service
from serving.settings import Settings

LOG = logging.getLogger("emerald.requests")
STREAM_SECONDS = 1 / 30
"""How often at most a stream has an event. Waking the event loop takes time from the model's threads: where tokens come
faster than anyone reads, several make one event. The first token never waits, nor does the last."""
SEND_SECONDS = 30.0
"""How long beyond its reply's time a client may take to read it."""
T = TypeVar("T")
EXPOSED = (
    "X-Request-Id",
    "X-Emerald-Source",
    "X-Emerald-Entry",
    "X-Emerald-Tier",
    "X-Emerald-Certificate",
    "X-Emerald-False-Hit-Bound",
    "X-Emerald-Miss",
    "X-Emerald-Dropped-Turns",
    "X-Emerald-CPU-Seconds",
    "X-Emerald-Joules",
    "X-Emerald-Grams-CO2e",
    "X-Emerald-Energy-Source",
)
"""The headers of an answer that a page of another origin may read."""


class Calls:
    """Completions from arrival to end: places, figures, and clients that hang up."""

    def __init__(self, settings: Settings, service: Service, metrics: Metrics) -> None:
        self._settings, self._service, self._metrics = settings, service, metrics
        self._energy = EnergyModel(settings.grams_per_kwh)
        self._at_once: Counter[str] = Counter()

    def log_prompt(self, http: Request, text: str) -> None:
        """What was said, veiled."""
        LOG.info("%s %s: %s", http.scope["client_name"], http.scope["path"], veiled(text, self._settings))

    async def complete(
        self,
        http: Request,
        request: ChatRequest | TextRequest,
        shape: type[Completion],
        begin: Callable[[Ticket], "Future[Origin]"],
    ) -> Response:
        """Answers one request; a client that hangs up, at whatever moment, ends its reply before the next token."""
        self._service.check_model(request.model)
        inbox = Inbox(STREAM_SECONDS if request.stream else math.inf)
        client, seconds = http.scope["client_name"], self._settings.reply_seconds
        sampling = request.sampling(self._settings, self._service.manner(request))
        ticket = Ticket(sampling, client, seconds, inbox.deliver, inbox.flush)
        self._enter(client)
        call = Call(ticket, lambda reason, origin: self._leave(ticket, reason, origin), self._metrics.refused)
        batches = inbox.batches()

        async def begun() -> tuple[Origin, list[Piece]]:
            """The first pieces of a stream; all of them otherwise."""
            call.origin = await asyncio.wrap_future(begin(ticket))
            self._metrics.looked_up(call.origin)
            first = await anext(batches)
            return call.origin, first if request.stream else await _gathered(first, batches)

        try:
            origin, spoken = await _until_gone(http, begun())
            tokenizer = None if origin.cached else self._service.engine().tokenizer
            name = request.model or self._service.opened().model_id
            completion = shape(name, ticket, tokenizer, self._energy)
            headers = {"X-Request-Id": completion.identity, **_origin_headers(origin)}
            if request.stream:
                events = completion.events(_after(spoken, batches), with_usage=request.with_usage)
                return EventStream(call.watched(events, completion), headers, seconds + SEND_SECONDS, call.end)
            call.reason = str(spoken[-1].finish_reason)
            headers |= _energy_headers(self._energy.of(ticket.cpu_seconds))
            answer = JSONResponse(completion.whole(spoken), headers=headers)
        except BaseException:
            call.end()
            raise
        call.end()
        return answer

    def _enter(self, client: str) -> None:
        if client.startswith("key ") and self._at_once[client] >= self._settings.per_key_max:
            raise PerKeyError(f"this key has {self._settings.per_key_max} requests under way; wait for one to end")
        self._at_once[client] += 1

    def _leave(self, ticket: Ticket, reason: str, origin: Origin | None) -> None:
        self._at_once[ticket.client] -= 1
        if not self._at_once[ticket.client]:
            del self._at_once[ticket.client]
        cached = origin is not None and origin.cached is not None
        seconds, energy = time.perf_counter() - ticket.created, self._energy.of(ticket.cpu_seconds)
        self._metrics.ended(ticket, reason, seconds, energy, cached=cached)


class Call:
    """One completion under way. Whatever happens to it, it ends exactly once."""

    def __init__(
        self, ticket: Ticket, leave: Callable[[str, Origin | None], None], refused: Callable[[int], None]
    ) -> None:
        self._ticket, self._leave, self._refused = ticket, leave, refused
        self._ended = False
        self.origin: Origin | None = None
        self.reason = "abort"

    def end(self) -> None:
        """Gives up whatever is still running and counts the request."""
        if not self._ended:
            self._ended = True
            self._ticket.cancel()
            self._leave(self.reason, self.origin)

    async def watched(self, events: AsyncIterator[str], completion: Completion) -> AsyncIterator[str]:
        """The events; an error among them becomes the last one, since the status line has been sent."""
        try:
            async for one in events:
                yield one
            self.reason = str(completion.finish_reason)
        except Exception as fault:
            status, message, _ = described(fault)
            if status == 500:
                LOG.exception("a stream failed")
            self._refused(status)
            self.reason = "error"
            yield event(error_body(status, message))


class Inbox:
    """A reply's pieces from the thread that makes them, for the event loop, which is woken every `seconds` at most.

    If they are infinite, nobody reads before the end.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Piece | Exception]] = asyncio.Queue()
        self._seconds = seconds
        self._held: list[Piece | Exception] = []
        self._woken = -math.inf

    def deliver(self, piece: Piece | Exception) -> None:
        """Called by one thread at a time; RuntimeError if the loop was closed."""
        self._held.append(piece)
        due = time.perf_counter() - self._woken >= self._seconds
        if isinstance(piece, Exception) or piece.finish_reason or due:
            self._hand_on()

    def flush(self) -> None:
        """Hands on what is held, before a wait for the next piece; on the same thread."""
        if self._held and self._seconds < math.inf:
            self._hand_on()

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """Up to the piece with a finish reason; raises an exception that was delivered, after what came before it."""
        while True:
            delivered = await self._queue.get()
            if pieces := [piece for piece in delivered if isinstance(piece, Piece)]:
                yield pieces
            for fault in delivered[len(pieces) :]:
                assert isinstance(fault, Exception)
                raise fault
            if pieces[-1].finish_reason:
                return

    def _hand_on(self) -> None:
        held, self._held, self._woken = self._held, [], time.perf_counter()
        self._loop.call_soon_threadsafe(self._queue.put_nowait, held)


class EventStream(StreamingResponse):
    """Server-sent events with a limit on their time, and an end that is always told of."""

    def __init__(
        self, events: AsyncIterator[str], headers: dict[str, str], seconds: float, end: Callable[[], None]
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._seconds, self._end = seconds, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            LOG.warning("a client did not read its reply within %g seconds", self._seconds)
        finally:
            self._end()


async def _until_gone(http: Request, work: Awaitable[T]) -> T:
    """Awaits; cancels it and raises ClientGoneError if the client hangs up first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(http.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _after(first: list[Piece], rest: AsyncIterator[list[Piece]]) -> AsyncIterator[list[Piece]]:
    yield first
    if not first[-1].finish_reason:
        async for pieces in rest:
            yield pieces


async def _gathered(first: list[Piece], rest: AsyncIterator[list[Piece]]) -> list[Piece]:
    return [piece async for pieces in _after(first, rest) for piece in pieces]


def _origin_headers(origin: Origin) -> dict[str, str]:
    """Where the answer came from."""
    facts = {name: f"{fact:.4f}" if isinstance(fact, float) else str(fact) for name, fact in origin.facts().items()}
    return {
        f"X-Emerald-{name.replace('_', '-').title()}": text.encode("ascii", "replace").decode().replace("\n", " ")
        for name, text in facts.items()
    }


def _energy_headers(energy: Energy) -> dict[str, str]:
    return {
        "X-Emerald-CPU-Seconds": f"{energy.cpu_seconds:.6f}",
        "X-Emerald-Joules": f"{energy.joules:.6f}",
        "X-Emerald-Grams-CO2e": f"{energy.grams_co2e:.9f}",
        "X-Emerald-Energy-Source": energy.source,
    }
