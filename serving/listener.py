"""uvicorn as this server wants it: with limits on how long a connection may keep a request to itself."""

import asyncio
import logging

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.settings import Settings

CONNECTIONS_MAX = 1000
"""Beyond these the server answers 503 at once."""
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
        limit_concurrency=CONNECTIONS_MAX,
        server_header=False,
    )


def _protocol(seconds: float) -> type[HttpToolsProtocol]:
    class Impatient(HttpToolsProtocol):
        """Closes a connection whose request line and headers have not come within the time."""

        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._limit = self.loop.call_later(seconds, transport.close)

        def on_message_begin(self) -> None:
            if self._limit is None:
                self._limit = self.loop.call_later(seconds, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._rest()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._rest()
            super().connection_lost(exc)

        def _rest(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return Impatient
