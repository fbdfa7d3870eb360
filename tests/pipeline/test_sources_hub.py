"""Downloads from a hub that is a server on 127.0.0.1: what arrives, and what is said when nothing can."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.artifact import file_digest
from tests.conftest import ROOT, write_tiny_model
from tests.hub import GATED, GRANTED, OPEN, REFUSED, REVISION, Hub, serving
from tests.pipeline.conftest import Ended, cli

OTHER_REVISION = "f" * 40


@dataclass
class Client:
    """A cache folder of the client, and the hub that it asks."""

    hub: Hub
    home: Path

    def fetch(self, repository: str, build: Path, revision: str = REVISION, **extra: str) -> Ended:
        return fetch_from(self.hub.url, self.home, f"{repository}@{revision}", build, **extra)


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
def client(tmp_path: Path) -> Iterator[Client]:
    folder = write_tiny_model(tmp_path / "served")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with serving(folder) as hub:
        yield Client(hub, tmp_path / "home")


def require_refusal(ended: Ended, *messages: str) -> None:
    assert ended.code == 2
    for message in messages:
        assert message in ended.err
    assert "Traceback" not in ended.err


def test_model_is_downloaded_once_and_vouched_for(client: Client, tmp_path: Path) -> None:
    first = client.fetch(OPEN, tmp_path / "first")
    assert (first.code, first.states) == (0, {"fetch": "ran"})
    assert "nothing vouches" not in first.err
    checkpoint = tmp_path / "first/checkpoint"
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert file_digest(checkpoint / file) == file_digest(client.hub.folder / file)
    assert not any("pytorch_model.bin" in request for request in client.hub.asked)
    source = json.loads((checkpoint / "source.json").read_text())["source"]
    assert source == f"hub:{OPEN}@{REVISION}"

    client.hub.asked.clear()
    offline = client.fetch(OPEN, tmp_path / "second", HF_HUB_OFFLINE="1")
    assert offline.code == 0
    assert client.hub.asked == []


def test_damaged_download_in_the_cache_is_noticed(client: Client, tmp_path: Path) -> None:
    assert client.fetch(OPEN, tmp_path / "first").code == 0
    [weights] = client.home.rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    ended = client.fetch(OPEN, tmp_path / "second", HF_HUB_OFFLINE="1")
    require_refusal(ended, "model.safetensors: SHA-256 is", "but the hub's cache says", "download it again")


def test_token_opens_a_gated_model(client: Client, tmp_path: Path) -> None:
    assert client.fetch(GATED, tmp_path / "build", HF_TOKEN=GRANTED).code == 0


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": REFUSED}], ids=["no token", "not granted"])
def test_gated_model_says_where_to_ask_and_what_to_set(client: Client, tmp_path: Path, token: dict[str, str]) -> None:
    ended = client.fetch(GATED, tmp_path / "build", **token)
    require_refusal(ended, f"{GATED} is gated", f"ask for access at {client.hub.url}/{GATED}", "set HF_TOKEN to it")
    assert REFUSED not in ended.err


def test_unknown_model(client: Client, tmp_path: Path) -> None:
    ended = client.fetch("emerald/missing", tmp_path / "build")
    require_refusal(
        ended, f"emerald/missing: not found at {client.hub.url}/emerald/missing, or private: check the name"
    )


def test_unknown_revision(client: Client, tmp_path: Path) -> None:
    ended = client.fetch(OPEN, tmp_path / "build", OTHER_REVISION)
    commits = f"take a commit hash from {client.hub.url}/{OPEN}/commits/main"
    require_refusal(ended, f"{OPEN} has no revision '{OTHER_REVISION}': {commits}")


OUT_OF_REACH = "cannot be reached and emerald/tiny@0123456789abcdef0123456789abcdef01234567 is not in the local cache"
REMEDY = "check the network and HF_HUB_OFFLINE, or download the model elsewhere and use folder:PATH"


def test_offline_without_a_copy(client: Client, tmp_path: Path) -> None:
    ended = client.fetch(OPEN, tmp_path / "build", HF_HUB_OFFLINE="1")
    require_refusal(ended, f"the hub at {client.hub.url} {OUT_OF_REACH}", REMEDY)
    assert client.hub.asked == []


def test_closed_port(closed_port: Future[Ended]) -> None:
    require_refusal(closed_port.result(), f"the hub at {CLOSED} {OUT_OF_REACH}", REMEDY)
