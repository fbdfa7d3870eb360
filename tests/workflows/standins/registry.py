"""A registry as strict as Docker Hub, in front of a real one.

It answers 401 for a repository that does not exist, whatever token it is asked with, and 429 to as many requests for a
manifest as `limited` says, as a machine meets whose address has used up its share.
"""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BLOCK = 1 << 20
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


class StrictRegistry(ThreadingHTTPServer):
    """Passes everything else on."""

    daemon_threads = True

    def __init__(self, upstream: int, data: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.data = data
        self.limited = 0
        """How many requests for manifests are still answered with 429."""
        self.refused: list[int] = []
        """Every refusal of its own, by status."""

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def knows(self, repository: str) -> bool:
        """Whether anything was pushed there."""
        return (self.data / "docker/registry/v2/repositories" / repository / "_manifests/tags").exists()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StrictRegistry

    def log_message(self, *_arguments: object) -> None:
        pass

    def _pass_on(self) -> None:
        if self.path.startswith("/token"):
            self._say(200, b'{"token": "of no use"}')
            return
        if status := self._refusal():
            self.server.refused.append(status)
            self._refuse(status)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=600)
        with contextlib.closing(upstream):
            chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            if chunked:
                headers["Transfer-Encoding"] = "chunked"
            body = self._chunks() if chunked else self._counted(int(self.headers.get("Content-Length", "0")))
            upstream.request(self.command, self.path, body=body, headers=headers, encode_chunked=chunked)
            self._answer(upstream.getresponse())

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on

    def _refusal(self) -> int | None:
        """The status of an answer that the hub would refuse with."""
        parts = self.path.partition("?")[0].strip("/").split("/")
        reads = self.command in ("GET", "HEAD") and parts[0] == "v2" and ("manifests" in parts or "tags" in parts)
        if not reads:
            return None
        if self.server.limited:
            self.server.limited -= 1
            return 429
        place = parts.index("manifests" if "manifests" in parts else "tags")
        return None if self.server.knows("/".join(parts[1:place])) else 401

    def _refuse(self, status: int) -> None:
        code = {401: "UNAUTHORIZED", 429: "TOOMANYREQUESTS"}[status]
        challenge = f'Bearer realm="http://127.0.0.1:{self.server.port}/token",service="hub"'
        header = {401: ("WWW-Authenticate", challenge), 429: ("Retry-After", "1")}[status]
        self._say(status, f'{{"errors": [{{"code": "{code}", "message": "refused"}}]}}'.encode(), header)

    def _say(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield from self._counted(size)
            self.rfile.readline()
        self.rfile.readline()

    def _counted(self, size: int) -> Iterator[bytes]:
        while size:
            block = self.rfile.read(min(size, BLOCK))
            size -= len(block)
            yield block

    def _answer(self, found: http.client.HTTPResponse) -> None:
        self.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        sized = found.getheader("Content-Length") is not None or self.command == "HEAD"
        if not sized:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            while block := found.read(BLOCK):
                self.wfile.write(block)


@contextmanager
def strict(upstream: int, data: Path) -> Iterator[StrictRegistry]:
    """In front of the registry on that port, whose data lie there, while the block runs."""
    with StrictRegistry(upstream, data) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
