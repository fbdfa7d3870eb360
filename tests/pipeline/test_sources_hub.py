"""Downloads from a hub that is a server on 127.0.0.1: what arrives, and what is said when nothing can."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from model.artifact import file_digest
from tests.conftest import ROOT, write_tiny_model
from tests.pipeline.conftest import Ended, cli

REVISION = "0123456789abcdef0123456789abcdef01234567"
OTHER_REVISION = "f" * 40
OPEN, GATED = "emerald/tiny", "emerald/gated"
GRANTED, REFUSED = "hf_granted", "hf_not_granted"


class HubHandler(BaseHTTPRequestHandler):
    """The paths of the hub's interface that huggingface_hub's `snapshot_download` asks for."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        self.asked.append(f"{self.command} {self.path}")

    def _answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        listing = parts[0] == "api"
        owner, name, verb, revision, *file = parts[2:] if listing else parts
        repository = f"{owner}/{name}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository not in (OPEN, GATED):
            self._refuse(401, "RepoNotFound")
        elif revision != REVISION:
            self._refuse(404, "RevisionNotFound")
        elif listing and verb == "tree":
            self._send(json.dumps(self._tree()).encode(), "application/json")
        elif repository == GATED and token != GRANTED:  # the listing is public, the files are not
            self._refuse(403 if token else 401, "GatedRepo")
        elif verb == "resolve" and (self.folder / "/".join(file)).is_file():
            self._send((self.folder / "/".join(file)).read_bytes(), "application/octet-stream")
        else:
            self._refuse(404, "EntryNotFound")

    def _tree(self) -> list[dict[str, object]]:
        """Large files as the hub keeps them, in LFS, so that their ETag is their SHA-256."""
        rows = []
        for path in sorted(self.folder.iterdir()):
            size, digest = path.stat().st_size, file_digest(path)
            row: dict[str, object] = {"type": "file", "path": path.name, "size": size, "oid": digest[:40]}
            if path.suffix == ".safetensors":
                row["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
            rows.append(row)
        return rows

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Hub:
    """A hub at `url` and the client's cache folder; `asked` lists the requests it has answered."""

    def __init__(self, server: ThreadingHTTPServer, home: Path) -> None:
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.home = home
        self.asked = HubHandler.asked

    def fetch(self, repository: str, build: Path, revision: str = REVISION, **extra: str) -> Ended:
        return fetch_from(self.url, self.home, f"{repository}@{revision}", build, **extra)


def fetch_from(url: str, home: Path, model: str, build: Path, **extra: str) -> Ended:
    """`python -m pipeline run fetch` against the hub at `url`, with `home` for the client's cache."""
    settings = ["--set", f"fetch.source=hub:{model}", "--set", "fetch.sha256=none"]
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **extra}
    return cli("run", "fetch", "--build", build, *settings, folder=ROOT, **hub)


CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module", autouse=True)
def closed_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Ended]]:
    """Begun before the other tests: the client tries a closed port for half a minute, mostly asleep."""
    home = tmp_path_factory.mktemp("closed")
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(fetch_from, CLOSED, home / "home", f"{OPEN}@{REVISION}", home / "build")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    HubHandler.folder = write_tiny_model(tmp_path / "served")
    (HubHandler.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    HubHandler.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Hub(server, tmp_path / "home")
        server.shutdown()


def require_refusal(ended: Ended, *messages: str) -> None:
    assert ended.code == 2
    for message in messages:
        assert message in ended.err
    assert "Traceback" not in ended.err


def test_model_is_downloaded_once_and_vouched_for(hub: Hub, tmp_path: Path) -> None:
    first = hub.fetch(OPEN, tmp_path / "first")
    assert (first.code, first.states) == (0, {"fetch": "ran"})
    assert "nothing vouches" not in first.err
    checkpoint = tmp_path / "first/checkpoint"
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert file_digest(checkpoint / file) == file_digest(HubHandler.folder / file)
    assert not any("pytorch_model.bin" in request for request in hub.asked)
    source = json.loads((checkpoint / "source.json").read_text())["source"]
    assert source == f"hub:{OPEN}@{REVISION}"

    hub.asked.clear()
    offline = hub.fetch(OPEN, tmp_path / "second", HF_HUB_OFFLINE="1")
    assert offline.code == 0
    assert hub.asked == []


def test_damaged_download_in_the_cache_is_noticed(hub: Hub, tmp_path: Path) -> None:
    assert hub.fetch(OPEN, tmp_path / "first").code == 0
    [weights] = hub.home.rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    ended = hub.fetch(OPEN, tmp_path / "second", HF_HUB_OFFLINE="1")
    require_refusal(ended, "model.safetensors: SHA-256 is", "but the hub's cache says", "download it again")


def test_token_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    assert hub.fetch(GATED, tmp_path / "build", HF_TOKEN=GRANTED).code == 0


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": REFUSED}], ids=["no token", "not granted"])
def test_gated_model_says_where_to_ask_and_what_to_set(hub: Hub, tmp_path: Path, token: dict[str, str]) -> None:
    ended = hub.fetch(GATED, tmp_path / "build", **token)
    require_refusal(ended, f"{GATED} is gated", f"ask for access at {hub.url}/{GATED}", "set HF_TOKEN to it")
    assert REFUSED not in ended.err


def test_unknown_model(hub: Hub, tmp_path: Path) -> None:
    ended = hub.fetch("emerald/missing", tmp_path / "build")
    require_refusal(ended, f"emerald/missing: not found at {hub.url}/emerald/missing, or private: check the name")


def test_unknown_revision(hub: Hub, tmp_path: Path) -> None:
    ended = hub.fetch(OPEN, tmp_path / "build", OTHER_REVISION)
    commits = f"take a commit hash from {hub.url}/{OPEN}/commits/main"
    require_refusal(ended, f"{OPEN} has no revision '{OTHER_REVISION}': {commits}")


OUT_OF_REACH = "cannot be reached and emerald/tiny@0123456789abcdef0123456789abcdef01234567 is not in the local cache"
REMEDY = "check the network and HF_HUB_OFFLINE, or download the model elsewhere and use folder:PATH"


def test_offline_without_a_copy(hub: Hub, tmp_path: Path) -> None:
    ended = hub.fetch(OPEN, tmp_path / "build", HF_HUB_OFFLINE="1")
    require_refusal(ended, f"the hub at {hub.url} {OUT_OF_REACH}", REMEDY)
    assert hub.asked == []


def test_closed_port(closed_port: Future[Ended]) -> None:
    require_refusal(closed_port.result(), f"the hub at {CLOSED} {OUT_OF_REACH}", REMEDY)
