"""A registry on loopback that asks for Docker Hub's tokens, a password or nothing, and fails when told to."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

NAME, PASSWORD, TOKEN, STRANGERS_TOKEN = "anne", "secret word", "a-token", "a-strangers-token"
REPOSITORY = "anne/emerald"
HANG_UP = 0
"""A fault that is no answer at all."""
MEDIA_TYPE = "application/vnd.oci.image.manifest.v1+json"


def _freely(_port: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Hub:
    """What it holds, and how it behaves."""

    asks: str = "nothing"
    """"nothing", "basic" or "bearer"."""
    open: bool = False
    """With "bearer": strangers get a token too. It reads what is there, and is answered 401 where nothing is."""
    page: int = 1000
    """Tags in a page."""
    tags: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """Every request, as "METHOD path"."""
    fails_at: str = ""
    """Requests to paths that end so are answered with 500."""
    faults: list[int] = field(default_factory=list)
    """Each is the status that answers one request, before any other is served."""
    retry_after: str = ""
    """The header of that name, with faults."""
    around: Callable[[int], AbstractContextManager[None]] = _freely
    """Entered around every request, with the port that it came to."""
    refresh_token: str = ""
    """An identity token that buys a token too."""
    port: int = 0

    def add(self, text: str, tag: str = "candidate") -> str:
        """An image by any manifest; its digest."""
        content = json.dumps({"schemaVersion": 2, "note": text}).encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        self.tags[tag] = digest
        return digest

    @property
    def repository(self) -> str:
        return f"127.0.0.1:{self.port}/{REPOSITORY}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: "Server"

    def do_GET(self) -> None:
        with self.server.hub.around(self.server.server_address[1]):
            self._serve()

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_arguments: object) -> None:
        pass

    def _serve(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        self._body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        hub.log.append(f"{self.command} {parts.path}")
        if hub.faults:
            self._fail(hub.faults.pop(0), hub)
        elif parts.path == "/token":
            self._give_token(hub)
        elif not self._admitted(hub, parts.path):
            challenge = f'Bearer realm="http://127.0.0.1:{hub.port}/token",service="hub"'
            self._send(401, b"{}", {"WWW-Authenticate": challenge if hub.asks == "bearer" else 'Basic realm="hub"'})
        elif hub.fails_at and parts.path.endswith(hub.fails_at):
            self._send(500, b"no space left")
        elif parts.path.endswith("/tags/list"):
            self._list(hub, parse_qs(parts.query))
        else:
            self._manifest(hub, parts.path.rpartition("/")[2])

    def _fail(self, status: int, hub: Hub) -> None:
        if status != HANG_UP:
            self._send(status, b"toomanyrequests", {"Retry-After": hub.retry_after} if hub.retry_after else {})

    def _admitted(self, hub: Hub, path: str) -> bool:
        given = self.headers.get("Authorization")
        if hub.open and given == f"Bearer {STRANGERS_TOKEN}":
            return self.command != "PUT" and path.startswith(f"/v2/{REPOSITORY}/")
        wanted = {"nothing": "", "bearer": f"Bearer {TOKEN}", "basic": _basic(NAME, PASSWORD)}[hub.asks]
        return not wanted or given == wanted

    def _give_token(self, hub: Hub) -> None:
        bought = self.headers.get("Authorization") == _basic(NAME, PASSWORD)
        form = parse_qs(self._body.decode())
        if form.get("grant_type") == ["refresh_token"]:
            bought = form["refresh_token"] == [hub.refresh_token]
        token = TOKEN if bought else STRANGERS_TOKEN if hub.open and "Authorization" not in self.headers else None
        self._send(200 if token else 401, json.dumps({"token": token} if token else {}).encode())

    def _list(self, hub: Hub, query: dict[str, list[str]]) -> None:
        tags = sorted(hub.tags)
        start = tags.index(query["last"][0]) + 1 if "last" in query else 0
        shown = tags[start : start + hub.page]
        more = (
            {"Link": f'<{urlsplit(self.path).path}?last={shown[-1]}>; rel="next"'} if tags[start + hub.page :] else {}
        )
        self._send(200, json.dumps({"name": "emerald", "tags": shown or None}).encode(), more)

    def _manifest(self, hub: Hub, reference: str) -> None:
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(self._body).hexdigest()}"
            hub.blobs[digest] = self._body
            hub.tags[reference] = digest
            self._send(201, b"")
            return
        digest = reference if re.fullmatch(r"sha256:\w+", reference) else hub.tags.get(reference, "")
        if digest in hub.blobs:
            headers = {"Docker-Content-Digest": digest, "Content-Type": MEDIA_TYPE}
            self._send(200, hub.blobs[digest], headers)
        else:
            self._send(404, b"{}")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class Server(ThreadingHTTPServer):
    """Serves one hub."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        hub.port = self.server_address[1]


@contextmanager
def serving(hub: Hub | None = None) -> Iterator[Hub]:
    """A registry while the block runs: a new one, or one more port of a hub that is served already."""
    with Server(hub or Hub()) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.hub
        server.shutdown()
