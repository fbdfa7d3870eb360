"""uvicorn as this server wants it: with limits on how long a connection may keep a request to itself."""

import asyncio
import json
import logging
from http import HTTPStatus

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import error_body
from serving.security import SECURITY_HEADERS
from serving.settings import Settings

CONNECTIONS_MAX = 1000
"""Beyond these the server answers 503 at once."""
HEAD_BYTES_MAX = 64 * 1024
"""Of a request line and its headers; what comes in one piece with their beginning is let through."""
UNREAD_SECONDS = 30.0
"""How long a client may read nothing of what fills the buffers to it."""
BUSY = JSONResponse(
    error_body(503, "the server has as many connections as it takes; try again later"),
    503,
    {"Retry-After": "1", "Connection": "close", **SECURITY_HEADERS},
)
IDLE_SECONDS = 15
"""How long a kept-alive connection may wait for its next request."""


def listen(app: FastAPI, settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; then takes nothing new, and lets what was admitted end."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s:     %(name)s: %(message)s")
    logging.getLogger("emerald").setLevel(logging.INFO)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        http=_protocol(settings.receive_seconds),
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        server_header=False,
        lifespan="on",
    )


def _protocol(seconds: float) -> type[HttpToolsProtocol]:
    class Impatient(HttpToolsProtocol):
        """Closes a connection whose request line and headers do not come in time, or whose client does not read."""

        _limit: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._limit = self.loop.call_later(seconds, transport.close)

        def data_received(self, data: bytes) -> None:
            awaited = self._limit
            super().data_received(data)
            if awaited is not None and awaited is self._limit and not self.transport.is_closing():
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_BYTES_MAX:
                    self._refuse(431, f"the request line and its headers are longer than {HEAD_BYTES_MAX} bytes")

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg)

        def on_message_begin(self) -> None:
            if self._limit is None:
                self._limit = self.loop.call_later(seconds, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._rest()
            full = max(len(self.connections), len(self.tasks)) >= CONNECTIONS_MAX
            self.app = BUSY if full else self.config.loaded_app
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._read()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            self._read()
            super().connection_lost(exc)

        def _rest(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None
            self._head_bytes = 0

        def _read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _refuse(self, status: int, message: str) -> None:
            """Past the application, and so only where no answer of its is under way."""
            if self.cycle is None or self.cycle.response_complete:
                body = json.dumps(error_body(status, message)).encode()
                head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            self.transport.close()

    return Impatient
