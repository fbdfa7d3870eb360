"""API Gateway's management API for WebSocket connections: a real server on loopback that can be made to misbehave."""

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

FRAME_BYTES = 32 * 1024
STAGE = "live"


@dataclass
class Frame:
    """A frame that was accepted."""

    at: float
    bytes: int
    content: dict[str, Any]


@dataclass(frozen=True)
class Posted:
    """A post that is to be answered: the how-many-th to this connection, counted from 0, and what it says."""

    number: int
    content: dict[str, Any]


Behaviour = Callable[[Posted], int]
"""Says with which status a post is answered; may take its time."""


def accepts(_: Posted) -> int:
    return 200


class Management:
    """What clients have received, by connection."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/{STAGE}"
        self.frames: dict[str, list[Frame]] = defaultdict(list)
        self.posts: dict[str, int] = defaultdict(int)
        self.behaviours: dict[str, Behaviour] = {}
        self.faults: list[str] = []
        """What AWS would have refused of a request, whatever the connection."""

    def received(self, connection: str) -> list[dict[str, Any]]:
        return [frame.content for frame in self.frames[connection]]

    def take(self, connection: str, authorization: str, body: bytes) -> int:
        if not authorization.startswith("AWS4-HMAC-SHA256 ") or "/execute-api/aws4_request" not in authorization:
            self.faults.append(f"not signed for execute-api: {authorization[:80]}")
            return 403
        if len(body) > FRAME_BYTES:
            self.faults.append(f"{len(body)} bytes")
            return 413
        content = json.loads(body)
        number = self.posts[connection]
        self.posts[connection] += 1
        status = self.behaviours.get(connection, accepts)(Posted(number, content))
        if status == 200:
            self.frames[connection].append(Frame(time.monotonic(), len(body), content))
        return status


@contextlib.contextmanager
def managing() -> Iterator[Management]:
    """The server, until the block ends."""
    errors = {410: "GoneException", 429: "LimitExceededException"}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            before, _, connection = self.path.partition("/@connections/")
            assert before == f"/{STAGE}", self.path
            status = management.take(unquote(connection), self.headers.get("Authorization", ""), body)
            self.send_response(status)
            if status in errors:
                self.send_header("x-amzn-ErrorType", errors[status])
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    management = Management(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield management
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
