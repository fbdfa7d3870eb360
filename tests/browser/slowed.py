"""A real server whose loading is stretched: it runs for moments, and is stopped between them by SIGSTOP.

Everything that it says of itself is true: loading only takes longer, as a larger model's would, and can be looked at
while it stands still.
"""

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

from tests.serving.server import Server, serving

MOMENT_MS = 20
MOMENTS_MAX = 3000


class Slowed:
    """A server that stands still unless it is let go on."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self._server = server

    def until(self, page: Page, reached: Callable[[], bool]) -> None:
        """Lets it run for moments, between which it stands still, until the page shows what is waited for."""
        for _ in range(MOMENTS_MAX):
            if reached():
                return
            self.run()
            page.wait_for_timeout(MOMENT_MS)
            self.stand_still()
        raise AssertionError(f"not reached; the server said: {self._server.log()}")

    def stand_still(self) -> None:
        """Stops the process; its connections stay open."""
        self._server.process.send_signal(signal.SIGSTOP)

    def run(self) -> None:
        """Lets it go on at full speed."""
        self._server.process.send_signal(signal.SIGCONT)


@contextmanager
def slowed(build: Path) -> Iterator[Slowed]:
    """A server that has just begun to listen, and stands still."""
    with serving(build) as server:
        for _ in range(60_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
                break
            time.sleep(0.001)
        clock = Slowed(server)
        clock.stand_still()
        yield clock
