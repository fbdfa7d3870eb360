"""A real server whose loading is stretched: it runs for moments, and is stopped between them by SIGSTOP.

Everything that it says of itself is true: loading only takes longer, as a larger model's would, and can be looked at
while it stands still.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Page

from tests.serving.server import Server, serving

SHORT_REPLIES = {"EMERALD_REPLY_TOKENS": "96"}
"""So that tests are short."""
MOMENT_SECONDS, PAUSE_SECONDS = 0.02, 0.08
WAIT_SECONDS = 60


class Slowed:
    """A server that goes on by moments, from a thread: the browser's driver waits for it and cannot move it itself."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self._server = server
        self._clock = threading.Lock()
        """Held while the server runs, and by whoever wants it to stand still."""
        self._still = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._tick)
        self._thread.start()

    def until(self, page: Page, reached: Callable[[], bool]) -> None:
        """Lets it go on by moments until this is so, and leaves it standing still."""
        self._go_on()
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            if reached():
                self._clock.acquire()
                if reached():  # as before, now that nothing moves
                    self._still = True
                    return
                self._clock.release()
            page.wait_for_timeout(10)
        raise AssertionError(f"not reached; the server said: {self._server.log()}")

    def run(self) -> None:
        """Lets it go on at full speed."""
        self._released.set()
        self._go_on()
        self._thread.join()
        self._server.process.send_signal(signal.SIGCONT)

    def _go_on(self) -> None:
        if self._still:
            self._still = False
            self._clock.release()

    def _tick(self) -> None:
        while not self._released.is_set():
            with self._clock:
                self._server.process.send_signal(signal.SIGCONT)
                time.sleep(MOMENT_SECONDS)
                self._server.process.send_signal(signal.SIGSTOP)
            time.sleep(PAUSE_SECONDS)


@contextmanager
def slowed(build: Path) -> Iterator[Slowed]:
    """A server that has just begun to listen, and goes on by moments."""
    with serving(build, **SHORT_REPLIES) as server:
        for _ in range(60_000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
                break
            time.sleep(0.001)
        loading = Slowed(server)
        try:
            yield loading
        finally:
            loading.run()
