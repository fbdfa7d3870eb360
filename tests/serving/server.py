"""A real server process on loopback, and plain requests to it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

LONG: dict[str, Any] = {"max_tokens": 500, "frequency_penalty": -2, "presence_penalty": -2}
"""A reply that goes on for seconds: whatever was said once is said again and again, and the end never is."""


@dataclass
class Server:
    """A process that serves, or is about to."""

    port: int
    process: "subprocess.Popen[bytes]"
    output: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """All it has printed."""
        return self.output.read_text(encoding="utf-8")

    def stop(self) -> int:
        """Asks it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


@contextlib.contextmanager
def serving(build: Path, **settings: str) -> Iterator[Server]:
    """A server with these environment variables, perhaps before it listens; killed in the end."""
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        port = free_port()
        environment = {**os.environ, "PORT": str(port), "EMERALD_BUILD": str(build), **settings}
        process = subprocess.Popen(
            [sys.executable, "-m", "serving", "serve"], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            yield Server(port, process, Path(output.name))
        finally:
            process.kill()
            process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):  # not listening yet
            if call(port, "GET", "/health/ready")[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server was not ready within a minute")


def figure(port: int, name: str) -> float:
    """Sum of the values of /metrics whose line begins so; 0 if nothing was counted."""
    lines = call(port, "GET", "/metrics")[2].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def call(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers in lower case, and text of one request."""
    content = body if isinstance(body, (str, bytes)) else None if body is None else json.dumps(body)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text
