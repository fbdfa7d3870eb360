"""A Hugging Face hub on 127.0.0.1, as far as huggingface_hub asks for it, with the faults that a real one can have.

python -m tests.hub FOLDER --port 8085      (until it is stopped)
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from model.artifact import file_digest

REVISION = "0123456789abcdef0123456789abcdef01234567"
OPEN, GATED = "emerald/tiny", "emerald/gated"
GRANTED, REFUSED = "hf_granted", "hf_not_granted"
BLOCK = 1 << 20


@dataclass
class Hub:
    """What is served, and how badly. `asked` lists the requests that were answered."""

    folder: Path
    repository: str = OPEN
    revision: str = REVISION
    url: str = ""
    asked: list[str] = field(default_factory=list)
    redirects: bool = True
    """Large files are elsewhere, as on the real hub."""
    ranges: bool = True
    """Otherwise a range is ignored and the whole file is sent."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Bytes after which an answer with that file breaks off, one for each of its first answers."""
    throttled: Counter[str] = field(default_factory=Counter)
    """How often a file is answered with 429 and Retry-After."""
    etags: dict[str, str] = field(default_factory=dict)
    """A wrong ETag of a file."""
    expired: bool = False
    """Whether tokens are refused."""
    expires_at: str = ""
    """The file at whose request tokens expire."""
    flipped: set[str] = field(default_factory=set)
    """Files whose last byte is damaged on the way."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each file that were sent."""

    def digest(self, file: Path) -> str:
        return self.etags.get(file.name) or _digest(file, file.stat().st_size, file.stat().st_mtime_ns)


@cache
def _digest(file: Path, _size: int, _modified_ns: int) -> str:
    return file_digest(file)


class Handler(BaseHTTPRequestHandler):
    """Answers for the server's `hub`."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Server)
        return self.server.hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        self.hub.asked.append(f"{self.command} {self.path}")

    def _answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "cdn":
            self._content(self.hub.folder / "/".join(parts[1:]))
            return
        if parts[0] == "datasets":
            parts = parts[1:]
        listing = parts[0] == "api"
        owner, name, verb, revision, *file = parts[2:] if listing else parts
        repository = f"{owner}/{name}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.expired |= self.hub.expires_at in file
        if token and self.hub.expired:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository not in (self.hub.repository, GATED):
            self._refuse(401, "RepoNotFound")
        elif revision != self.hub.revision:
            self._refuse(404, "RevisionNotFound")
        elif listing and verb == "tree":
            self._send(json.dumps(self._tree()).encode())
        elif repository == GATED and token != GRANTED:  # the listing is public, the files are not
            self._refuse(403 if token else 401, "GatedRepo")
        elif verb == "resolve" and (self.hub.folder / "/".join(file)).is_file():
            self._resolve(self.hub.folder / "/".join(file))
        else:
            self._refuse(404, "EntryNotFound")

    def _tree(self) -> list[dict[str, object]]:
        """Large files as the hub keeps them, in LFS, so that their ETag is their SHA-256."""
        rows = []
        for path in sorted(self.hub.folder.iterdir()):
            size, digest = path.stat().st_size, self.hub.digest(path)
            row: dict[str, object] = {"type": "file", "path": path.name, "size": size, "oid": digest[:40]}
            if path.suffix == ".safetensors":
                row["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            rows.append(row)
        return rows

    def _resolve(self, path: Path) -> None:
        if self.hub.throttled[path.name]:
            self.hub.throttled[path.name] -= 1
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.hub.redirects and path.suffix == ".safetensors":
            self.send_response(302)
            self.send_header("Location", f"{self.hub.url}/cdn/{path.name}")
            self.send_header("X-Linked-Etag", f'"{self.hub.digest(path)}"')
            self.send_header("X-Linked-Size", str(path.stat().st_size))
            self.send_header("X-Repo-Commit", self.hub.revision)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._content(path)

    def _content(self, path: Path) -> None:
        size, asked = path.stat().st_size, self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and self.hub.ranges else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(size - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.send_header("ETag", f'"{self.hub.digest(path)}"')
        self.send_header("X-Repo-Commit", self.hub.revision)
        self.end_headers()
        if self.command == "GET":
            self._body(path, first, size)

    def _body(self, path: Path, first: int, size: int) -> None:
        cuts = self.hub.cuts.get(path.name, [])
        end = min(size, first + cuts.pop(0)) if cuts else size
        with path.open("rb") as file:
            file.seek(first)
            for start in range(first, end, BLOCK):
                block = file.read(min(BLOCK, end - start))
                if path.name in self.hub.flipped and start + len(block) == size:
                    block = block[:-1] + bytes([block[-1] ^ 1])
                self.wfile.write(block)
                self.hub.sent[path.name] += len(block)
        self.close_connection = end < size

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(ThreadingHTTPServer):
    """Serves one hub."""

    def __init__(self, hub: Hub, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that serves the folder while the block runs."""
    with Server(Hub(folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.hub
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repository", default=OPEN)
    parser.add_argument("--revision", default=REVISION)
    parser.add_argument("--port", type=int, default=8085)
    options = parser.parse_args()
    Server(Hub(options.folder, options.repository, options.revision), options.port).serve_forever()
