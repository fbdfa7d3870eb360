"""Asks the server from inside its container, which has no network: python -c "$(cat probe.py)" COMMAND [JSON]...

It runs on the image's own Python with nothing but the standard library, and prints a JSON object for each thing it
finds, as soon as it finds it.
"""

import contextlib
import http.client
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
CHAT = "/v1/chat/completions"


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def connection(seconds: float = 600) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT", "8000")), timeout=seconds)


def wait(seconds: float) -> None:
    """Tells the progress of loading, and the moment when the server is ready."""
    end, told = time.monotonic() + seconds, -1.0
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            server = connection(5)
            server.request("GET", "/health/ready")
            answer = server.getresponse()
            state = json.loads(answer.read())
            if answer.status == 200:
                tell(ready=time.time(), cache=state["cache"])
                return
            if state["status"] != "loading":
                tell(failed=state["status"])
                return
            if state["progress"] > told:
                told = state["progress"]
                tell(progress=told)
        time.sleep(POLL_SECONDS)
    tell(failed=f"not ready after {seconds:g} seconds")


def identity() -> None:
    """Who the processes are, on what, and what they can write to."""
    tell(
        uid=os.getuid(),
        machine=platform.machine(),
        allocator="tcmalloc" in Path("/proc/self/maps").read_text(encoding="utf-8"),
        writable=[folder for folder in ("/", "/emerald", "/opt/emerald", "/tmp", "/var/tmp") if writable(folder)],
        kept_capabilities=next(
            line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
        ),
    )


def writable(folder: str) -> bool:
    path = Path(folder) / f"probe-{os.getpid()}"
    try:
        path.touch()
    except OSError:
        return False
    path.unlink()
    return True


def ask(requests: dict[str, dict[str, Any]]) -> None:
    """Sends each request, {name: body}, and tells what came: whole, or its events where the body asks for a stream."""
    for name, body in requests.items():
        begun = time.perf_counter()
        answer = send(body)
        headers = {key.lower(): value for key, value in answer.getheaders()}
        events = list(events_of(answer)) if body.get("stream") and answer.status == 200 else None
        content = None if events is not None else json.loads(answer.read())
        seconds = time.perf_counter() - begun
        tell(name=name, status=answer.status, headers=headers, body=content, events=events, seconds=seconds)


def drain(body: dict[str, Any]) -> None:
    """Streams a reply, and tells when it began and how it ended."""
    begun = False
    answer = send({**body, "stream": True})
    try:
        for event in events_of(answer):
            if not begun:
                begun = True
                tell(began=time.time())
            if event == "[DONE]":
                tell(done=time.time())
    except (OSError, http.client.HTTPException) as fault:
        tell(cut=str(fault) or type(fault).__name__)


def send(body: dict[str, Any]) -> http.client.HTTPResponse:
    server = connection()
    server.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return server.getresponse()


def events_of(answer: http.client.HTTPResponse) -> Iterator[str]:
    """The data of a stream's events, as they come."""
    for line in answer:
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").decode().strip()


if __name__ == "__main__":
    command, arguments = sys.argv[1], [json.loads(text) for text in sys.argv[2:]]
    commands: dict[str, Callable[..., None]] = {"wait": wait, "identity": identity, "ask": ask, "drain": drain}
    commands[command](*arguments)
