"""Who generates when: one inference thread moves all running replies on together and admits waiting ones fairly.

Every step of the engine gives each running reply its next token (continuous batching, Yu et al. 2022, Orca). Between
steps the thread drops whoever has gone, ends whoever is out of time, and fills free places: the client with the fewest
running replies comes first, then the one that has waited longest since its last admission. The queue is bounded.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from model.engine import Engine, Piece, Reply
from model.errors import InputError
from model.kv_cache import CacheFullError
from model.sampling import LogitsError, Sampling
from model.threads import use_threads

LOG = logging.getLogger(__name__)
RETRY_SECONDS_MAX = 60

Deliver = Callable[[Piece | Exception], None]
"""Takes what a reply yields, on the inference thread: pieces up to the one with a finish reason, or an exception."""


class QueueFullError(Exception):
    """As many requests wait as may; `retry_after` is the seconds until a place is likely free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests are waiting; try again later")
        self.retry_after = retry_after


class ClosingError(Exception):
    """The server is shutting down and takes nothing new."""


class OutOfTimeError(Exception):
    """The request waited for its whole allowed time."""


class Ticket:
    """A request's way through the scheduler; what is measured of it is complete once its last piece is delivered."""

    def __init__(
        self,
        sampling: Sampling,
        client: str,
        seconds: float,
        deliver: Deliver,
        flush: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampling = sampling
        self.client = client
        self.created = time.perf_counter()
        self.first_token: float | None = None
        """When the first token came, on the clock of `time.perf_counter`."""
        self.last_token: float | None = None
        self.tokens = 0
        self.prompt: Sequence[int] = ()
        self.cached_tokens = 0
        """Tokens of the prompt whose keys and values an earlier request had computed."""
        self.cpu_seconds = 0.0
        """The process's CPU time in the engine's steps, shared out by the tokens that each reply had computed."""
        self.cancelled = False
        self.deliver = deliver
        self.flush = flush
        """Hands on what the receiver holds back, on the same thread as `deliver`: the next piece may take long."""
        self.deadline = self.created + seconds
        self.reply: Reply | None = None

    def cancel(self) -> None:
        """Gives the request up, wherever it is; takes effect before the next token."""
        self.cancelled = True

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from the request's arrival, waiting included."""
        return None if self.first_token is None else self.first_token - self.created

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.first_token is None or self.last_token is None or self.tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.tokens - 1)


class Scheduler:
    """Owns an engine, which nobody else uses from then on."""

    def __init__(self, engine: Engine, *, running_max: int, waiting_max: int, threads: int) -> None:
        self._engine = engine
        self._running_max, self._waiting_max = running_max, waiting_max
        self._waiting: dict[str, deque[Ticket]] = {}
        """By client, in the order of their turns: by when each began to wait, or was served last since then."""
        self._running: list[Ticket] = []
        self._reply_seconds = 1.0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, args=(threads,), name="inference", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Replies that gain a token with every step."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        with self._changed:
            return self._waiting_count()

    def submit(self, ticket: Ticket, prompt: Sequence[int]) -> None:
        """Queues a request. Raises QueueFullError or ClosingError, and then delivers nothing."""
        with self._changed:
            if self._closing:
                raise ClosingError("the server is shutting down")
            if self._waiting_count() - self._free_places() >= self._waiting_max:
                raise QueueFullError(self._retry_after())
            ticket.prompt = prompt
            self._waiting.setdefault(ticket.client, deque()).append(ticket)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Takes nothing new, lets what was admitted end for so long, then gives the rest up."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            for ticket in [*self._running, *(ticket for queue in self._waiting.values() for ticket in queue)]:
                ticket.cancel()
        self._thread.join()

    def _work(self, threads: int) -> None:
        use_threads(threads)
        while True:
            with self._changed:
                while not (self._running or self._waiting or self._closing):
                    self._changed.wait()
                if self._closing and not (self._running or self._waiting):
                    return
                self._drop_gone()
                self._admit()
            if self._running:
                self._step()

    def _drop_gone(self) -> None:
        now = time.perf_counter()
        for client, queue in list(self._waiting.items()):
            for ticket in [ticket for ticket in queue if ticket.cancelled or ticket.deadline < now]:
                queue.remove(ticket)
                if not ticket.cancelled:
                    _deliver(ticket, OutOfTimeError("the request waited too long for the model; try again later"))
            if not queue:
                del self._waiting[client]
        for ticket in list(self._running):
            if ticket.cancelled:
                self._end(ticket)
            elif ticket.deadline < now:
                assert ticket.reply is not None
                last: Piece | Exception
                try:
                    last = ticket.reply.cut()
                except Exception as fault:
                    LOG.exception("a reply could not be cut")
                    last = fault
                self._end(ticket)
                _deliver(ticket, last)

    def _admit(self) -> None:
        while self._waiting and self._free_places():
            client = min(self._waiting, key=self._running_of)  # of several, the one whose turn comes first
            ticket = self._waiting[client][0]
            try:
                ticket.reply = self._engine.open(ticket.prompt, ticket.sampling)
            except CacheFullError as fault:
                if self._running:
                    return
                self._refuse(client, fault)
            except InputError as fault:
                self._refuse(client, fault)
            except Exception as fault:  # whatever it was, the others must not wait for ever
                LOG.exception("a request could not be admitted")
                self._refuse(client, fault)
            else:
                self._next(client)
                ticket.cached_tokens = ticket.reply.sequence.reused
                self._running.append(ticket)

    def _running_of(self, client: str) -> int:
        return sum(ticket.client == client for ticket in self._running)

    def _next(self, client: str) -> Ticket:
        """Takes the client's first request; its others wait for another turn, behind whoever waits now."""
        queue = self._waiting.pop(client)
        ticket = queue.popleft()
        if queue:
            self._waiting[client] = queue
        return ticket

    def _refuse(self, client: str, fault: Exception) -> None:
        _deliver(self._next(client), fault)

    def _step(self) -> None:
        replies = [ticket.reply for ticket in self._running if ticket.reply is not None]
        before = [reply.sequence.computed for reply in replies]
        if any(len(reply.sequence.tokens) - done > 1 for reply, done in zip(replies, before, strict=True)):
            for ticket in self._running:  # a prompt takes far longer than a token
                _flush(ticket)
        start = time.process_time()
        try:
            pieces = self._engine.step(replies)
        except Exception as fault:  # whatever it was, the others must not wait for ever
            LOG.exception("a step of %d replies failed", len(replies))
            failed = list(self._running)
            for ticket in failed:
                self._end(ticket)
            self._engine.forget()  # what they left, too
            for ticket in failed:
                _deliver(ticket, fault)
            return
        spent, now = time.process_time() - start, time.perf_counter()
        shares = [reply.sequence.computed - done for reply, done in zip(replies, before, strict=True)]
        for ticket, piece, share in zip(list(self._running), pieces, shares, strict=True):
            ticket.cpu_seconds += spent * share / sum(shares)
            if piece is not None:
                self._advance(ticket, piece, now)

    def _advance(self, ticket: Ticket, piece: Piece | LogitsError, now: float) -> None:
        if isinstance(piece, Piece):
            ticket.first_token = ticket.first_token or now
            ticket.last_token, ticket.tokens = now, piece.tokens
        if isinstance(piece, LogitsError) or piece.finish_reason:
            self._end(ticket)
            self._reply_seconds += 0.1 * (now - ticket.created - self._reply_seconds)
        _deliver(ticket, piece)

    def _end(self, ticket: Ticket) -> None:
        assert ticket.reply is not None
        self._engine.close(ticket.reply)
        with self._changed:
            self._running.remove(ticket)

    def _free_places(self) -> int:
        return self._running_max - len(self._running)

    def _waiting_count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _retry_after(self) -> int:
        """Seconds until a queue of this length has moved on by one, by the mean time of late replies."""
        return min(RETRY_SECONDS_MAX, 1 + int(self._reply_seconds / self._running_max))


def _deliver(ticket: Ticket, piece: Piece | Exception) -> None:
    """A receiver that has gone, as an event loop that was closed, must not end the thread that serves the others."""
    try:
        ticket.deliver(piece)
    except RuntimeError:
        ticket.cancel()


def _flush(ticket: Ticket) -> None:
    try:
        ticket.flush()
    except RuntimeError:
        ticket.cancel()
