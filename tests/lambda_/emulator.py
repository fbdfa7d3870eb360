"""AWS's own Runtime Interface Emulator as a process, and in it the function as Lambda starts it."""

import contextlib
import http.client
import importlib.util
import json
import os
import platform
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
from tests.serving.server import free_port

TIMEOUT_SECONDS = 120
HANDLER = ("-m", "awslambdaric", "serving.lambda_handler.handler")


@dataclass
class Function:
    """An execution environment, which is initialised at its first event."""

    port: int
    output: Path

    def invoke(self, event: object) -> dict[str, Any]:
        """The function's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_SECONDS)
        connection.request("POST", "/2015-03-31/functions/function/invocations", json.dumps(event))
        answer = json.loads(connection.getresponse().read() or "null")
        connection.close()
        assert isinstance(answer, dict), answer
        return answer

    def log(self) -> str:
        """All it has printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def emulated(build: Path, management: str, **settings: str) -> Iterator[Function]:
    """The function in the emulator, with these environment variables; ended with the block."""
    port, api = free_port(), free_port()
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example",
        "AWS_REGION": "us-east-1",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": str(TIMEOUT_SECONDS),
        "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI": management,
        "EMERALD_BUILD": str(build),
        **settings,
    }
    addresses = ["--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
    addresses += ["--runtime-api-address", f"127.0.0.1:{api}"]
    command = [binary(), *addresses, sys.executable, *HANDLER]
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            _wait_until_listening(port)
            yield Function(port, Path(output.name))
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The emulator and the runtime that it started."""
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = [int(child) for child in started.read_text().split()] if started.exists() else []
    for one in (process.pid, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    process.wait(timeout=20)


def binary() -> str:
    """The emulator for this machine, from the package that brings it."""
    found = importlib.util.find_spec("samcli")
    assert found is not None and found.submodule_search_locations, "run make test-lambda, which installs it"
    machine = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    path = Path(found.submodule_search_locations[0]) / f"local/rapid/aws-lambda-rie-{machine}"
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


def _wait_until_listening(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise AssertionError("the emulator does not listen")
