"""A real server that is slow: it runs for moments, and is stopped between them by SIGSTOP.

Everything that it says of itself is true: loading and answers only take longer, as a larger model's would, and can be
looked at on the fastest of machines.
"""

import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Page

from model.artifact import file_digest, read_json, write_json
from tests.serving.server import Server, serving

SHORT_REPLIES = {"EMERALD_REPLY_TOKENS": "96"}
"""So that tests are short."""
LOADING, TELLING = (0.005, 0.045), (0.01, 0.19)
"""Seconds of running and of standing still; the smallest model tells a sentence in a fifth of a second."""
BALLAST_BYTES = 2 << 30
"""More to verify: the smallest model is loaded before a browser has fetched the page."""
WAIT_SECONDS = 60


class Slowed:
    """A server that goes on by moments, from a thread: the browser's driver waits for it and cannot move it itself."""

    def __init__(self, server: Server, pace: tuple[float, float]) -> None:
        self.url = server.url
        self._server, self._pace = server, pace
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
                time.sleep(self._pace[0])
                self._server.process.send_signal(signal.SIGSTOP)
            time.sleep(self._pace[1])


@contextmanager
def slowed(build: Path) -> Iterator[Slowed]:
    """A server that has just begun to listen, has much to load, and goes on by moments."""
    with laden(build) as larger, serving(larger, **SHORT_REPLIES) as server:
        for _ in range(60_000):
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1):
                break
            time.sleep(0.001)
        with by_moments(server, LOADING) as loading:
            yield loading


@contextmanager
def laden(build: Path) -> Iterator[Path]:
    """The same build, with one more file in its engine's folder: of zeros, which take no room on the disk."""
    with tempfile.TemporaryDirectory(dir=build.parent) as scratch:
        larger, kept = Path(scratch) / build.name, ("engine", "cache", "embedder", "certificate.json")
        dropped = shutil.ignore_patterns(*({path.name for path in build.iterdir()} - {*kept}))
        shutil.copytree(build, larger, copy_function=os.link, ignore=dropped)
        ballast, manifest = larger / "engine/ballast.bin", larger / "engine/manifest.json"
        ballast.touch()
        os.truncate(ballast, BALLAST_BYTES)
        facts = read_json(manifest, "make pipeline makes it")
        facts["files"][ballast.name] = {"bytes": BALLAST_BYTES, "sha256": file_digest(ballast)}
        manifest.unlink()
        write_json(manifest, facts)
        yield larger


@contextmanager
def by_moments(server: Server, pace: tuple[float, float] = TELLING) -> Iterator[Slowed]:
    """A server that goes on by moments until the end of the block."""
    slow = Slowed(server, pace)
    try:
        yield slow
    finally:
        slow.run()
