"""A server as a process beside us: started on a free port of loopback, watched through /proc, ended by its number."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError
from pipeline.fingerprint import ROOT
from serving.settings import Settings

HOST = "127.0.0.1"
LOOK_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a process holds of its machine."""

    resident_kb: int
    """Pages in memory, exact: Rss of /proc/PID/smaps_rollup."""
    anonymous_kb: int
    """Those of them that no file is behind."""
    threads: int
    files: int
    """Open file descriptors, sockets among them."""

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        """Of a running process; InputError for one that is not there, or another user's."""
        folder = Path(f"/proc/{pid}")
        try:
            sizes = {
                line.partition(":")[0]: line.split()[1] for line in (folder / "smaps_rollup").read_text().splitlines()
            }
            threads, files = (len(list((folder / name).iterdir())) for name in ("task", "fd"))
        except OSError as fault:
            raise InputError(f"process {pid} cannot be looked at ({fault})") from fault
        return cls(resident_kb=int(sizes["Rss"]), anonymous_kb=int(sizes["Anonymous"]), threads=threads, files=files)


class ServerProcess:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, ready_path: str, output: Path) -> None:
        self.process, self.port = process, port
        self._ready_path, self._output = ready_path, output

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_until_ready(self, seconds: float) -> None:
        """Returns when it answers 200 at its path of readiness; InputError if it ends, or the time does."""
        until = time.monotonic() + seconds
        while not self._is_ready():
            if self.process.poll() is not None:
                raise InputError(f"the server ended with exit code {self.process.returncode}:\n{self.log()[-2000:]}")
            if time.monotonic() > until:
                raise InputError(f"the server was not ready within {seconds:g} s:\n{self.log()[-2000:]}")
            time.sleep(LOOK_SECONDS)

    def log(self) -> str:
        """All it has printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def stop(self, seconds: float = 60.0) -> int:
        """Asks it to end, and waits; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=seconds)

    def _is_ready(self) -> bool:
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection(HOST, self.port, timeout=5)) as connection,
        ):
            connection.request("GET", self._ready_path)
            return connection.getresponse().status == 200
        return False


@contextmanager
def running(
    command: Sequence[str], port: int, ready_path: str, environment: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A process that serves on that port, or is about to; killed in the end unless it was stopped."""
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=output, stderr=output
        )
        try:
            yield ServerProcess(process, port, ready_path, Path(output.name))
        finally:
            process.kill()
            process.wait(timeout=20)


@contextmanager
def emerald(build: Path, settings: Mapping[str, str] | None = None, port: int | None = None) -> Iterator[ServerProcess]:
    """Our own server on a build folder, by default on a free port; `settings` are environment variables."""
    for artifact in ("engine", "cache", "embedder"):
        Settings(build=str(build)).folder(artifact)
    port = port or free_port()
    environment = {"EMERALD_BUILD": str(build.resolve()), "HOST": HOST, "PORT": str(port), **(settings or {})}
    with running([sys.executable, "-m", "serving", "serve"], port, "/health/ready", environment) as server:
        yield server


def free_port() -> int:
    """A port of loopback that no one listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
