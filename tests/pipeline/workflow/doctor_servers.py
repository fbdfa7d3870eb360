"""GitHub, a registry and a model hub on loopback, as far as the doctor asks them: one server, and what it answers."""

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """A status with a content, which is sent as JSON unless it is bytes."""

    status: int = 200
    content: object = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Site(ThreadingHTTPServer):
    """Answers by path, 404 where nothing stands; `asked` holds the Authorization of every request, by its path.

    With an `admits` it asks for a password, and answers only to that Authorization.
    """

    def __init__(self, replies: dict[str, Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = replies
        self.asked: dict[str, str | None] = {}
        self.admits = ""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.server.asked[self.path] = self.headers["Authorization"]
        reply = self.server.replies.get(urlsplit(self.path).path, Reply(404))
        if self.server.admits not in ("", self.headers["Authorization"]):
            reply = Reply(401, headers={"WWW-Authenticate": 'Basic realm="here"'})
        body = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def served(replies: dict[str, Reply] | None = None) -> Iterator[Site]:
    """Serves until the block ends."""
    with Site({} if replies is None else replies) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


def push_token(name: str, *actions: str) -> Reply:
    """What a token server gives: a JWT that says what its bearer may do with a repository."""
    access = [{"type": "repository", "name": name, "actions": list(actions)}] if actions else []
    claims = base64.urlsafe_b64encode(json.dumps({"access": access}).encode()).decode().rstrip("=")
    return Reply(200, {"token": f"header.{claims}.signature"})
