"""One question over HTTP as a client sees it: when the first text came, when the last, and what it said.

The least that speaks HTTP/1.1 with keep-alive and server-sent events on asyncio, parsed by `httptools`: whatever a
client takes of a processor that it shares with the server, it takes from the figures.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httptools

Outcome = Literal["complete", "refused", "hung up", "failed"]
PATIENCE_SECONDS = 330.0
"""After these an answer counts as failed: a server's own limit, 300 s by default, should have ended it."""
IDLE_SECONDS = 5.0
"""A connection that was idle for longer is not used again; servers close them at their leisure."""


@dataclass
class Exchange:
    """What came of one request; seconds count from the moment at which it was meant to be sent."""

    outcome: Outcome = "failed"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""
    text: str = ""
    """The answer's; of a refusal, its error; of anything else, the body."""
    tokens: int = 0
    """Generated, as the server counts them; 0 unless the answer is complete."""
    prompt_tokens: int = 0
    first_s: float | None = None
    """When the first text came; None unless it was streamed."""
    ended_s: float = 0.0
    fault: str = ""
    """Why it failed."""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        known = self.outcome == "complete" and self.first_s is not None and self.tokens > 1
        return (self.ended_s - (self.first_s or 0)) / (self.tokens - 1) if known else None


class Connection:
    """A client's connection to a server on this machine, opened when it is needed and kept between questions."""

    def __init__(self, host: str, port: int, *, key: str = "", local: str | None = None) -> None:
        self._place = (host, port)
        self._authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        self._local = None if local is None else (local, 0)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = 0.0

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        since: float | None = None,
        hang_up_after: float | None = None,
        abruptly: bool = False,
    ) -> Exchange:
        """Posts a body, or gets a path. Never raises; `since` is on the clock of `time.perf_counter`.

        A client that hangs up does it so many seconds after `since`, unless it has the whole answer by then: by
        closing its connection, or abruptly, by resetting it.
        """
        since = time.perf_counter() if since is None else since
        reading = _Reading(since)
        patience = PATIENCE_SECONDS if hang_up_after is None else hang_up_after
        try:
            async with asyncio.timeout(max(0.0, since + patience - time.perf_counter())):
                await self._exchange(self._request(path, body), reading)
        except TimeoutError:
            reading.gave_up("failed" if hang_up_after is None else "hung up", f"no answer within {patience:g} s")
            self.close(abruptly=abruptly)
        except (OSError, EOFError, ValueError, httptools.HttpParserError) as fault:
            reading.gave_up("failed", f"{type(fault).__name__}: {fault.__context__ or fault}")
            self.close()
        return reading.exchange

    def close(self, *, abruptly: bool = False) -> None:
        """Hangs up."""
        if self._streams is not None:
            transport = self._streams[1].transport
            transport.abort() if abruptly else transport.close()
            self._streams = None

    def _request(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        method, kind = ("GET", "") if body is None else ("POST", "Content-Type: application/json\r\n")
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._place[0]}\r\n{self._authorization}{kind}"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    async def _exchange(self, request: bytes, reading: "_Reading") -> None:
        reader, writer = await self._open()
        writer.write(request)
        await writer.drain()
        while not reading.done:
            received = await reader.read(65536)
            if not received:
                raise EOFError("the server closed the connection in the middle of its answer")
            reading.feed(received)
        self._used = time.perf_counter()
        if not reading.keeps_alive:
            self.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if time.perf_counter() - self._used > IDLE_SECONDS:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place, local_addr=self._local)
        return self._streams


class _Reading:
    """An answer as it arrives; `httptools` calls its methods."""

    def __init__(self, since: float) -> None:
        self.exchange = Exchange()
        self.done = False
        self._since = since
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)

    @property
    def keeps_alive(self) -> bool:
        return bool(self._parser.should_keep_alive())

    def feed(self, received: bytes) -> None:
        """Takes bytes; raises HttpParserError, or ValueError for JSON that is none."""
        self._parser.feed_data(received)

    def gave_up(self, outcome: Outcome, why: str) -> None:
        self.exchange.outcome, self.exchange.fault = outcome, why
        self.exchange.ended_s = time.perf_counter() - self._since

    def on_header(self, name: bytes, value: bytes) -> None:
        self.exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self._is("text/event-stream"):
            *events, self._body = self._body.split(b"\n\n")
            for event in events:
                self._take_event(event.removeprefix(b"data: "))

    def on_message_complete(self) -> None:
        exchange, self.done = self.exchange, True
        exchange.ended_s = time.perf_counter() - self._since
        if self._is("application/json"):
            self._take_whole(json.loads(self._body))
        elif not self._is("text/event-stream"):
            exchange.text = self._body.decode()
            exchange.outcome = "complete" if exchange.status == 200 else "refused"
        elif exchange.outcome != "complete":
            raise EOFError("the stream ended without [DONE]")

    def _is(self, kind: str) -> bool:
        return self.exchange.headers.get("content-type", "").startswith(kind)

    def _take_event(self, event: bytes) -> None:
        if event == b"[DONE]":
            self.exchange.outcome = "complete"
            return
        content = json.loads(event)
        if "error" in content:
            raise ValueError(f"an error in the stream: {content['error']}")
        for choice in content["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                self.exchange.text += text
                if self.exchange.first_s is None:
                    self.exchange.first_s = time.perf_counter() - self._since
        self._count(content)

    def _take_whole(self, content: dict[str, Any]) -> None:
        exchange = self.exchange
        if exchange.status != 200:
            exchange.outcome, exchange.text = "refused", str(content.get("error", content))
            return
        exchange.outcome, exchange.text = "complete", self._body.decode()
        if "choices" in content:
            (choice,) = content["choices"]
            exchange.text = choice["message"]["content"] if "message" in choice else choice["text"]
            self._count(content)

    def _count(self, content: dict[str, Any]) -> None:
        if usage := content.get("usage"):
            self.exchange.tokens, self.exchange.prompt_tokens = (
                usage["completion_tokens"],
                usage.get("prompt_tokens", 0),
            )


async def get(host: str, port: int, path: str, key: str = "") -> Exchange:
    """One GET on a connection of its own."""
    connection = Connection(host, port, key=key)
    answer = await connection.ask(path, None)
    connection.close()
    return answer
