"""Pulling: limits are waited for; a base image comes from whoever has its digest. Pushing: only what is not there."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import docker
import pytest
from docker.errors import APIError, ImageNotFound, NotFound
from docker.models.images import Image

from model.errors import InputError
from pipeline.image.registry import Backoff
from pipeline.image.transfer import pull, pull_base, push
from tests.pipeline.image.registry import Hub, serving

DIGEST = f"sha256:{'4290' * 16}"
BASE = f"python:3.11-slim-bookworm@{DIGEST}"
GOOGLE, AMAZON, HUB = (
    f"{place}/python@{DIGEST}"
    for place in ("mirror.gcr.io/library", "public.ecr.aws/docker/library", "docker.io/library")
)
SENT = f"sha256:{'5e47' * 16}"
QUICK = Backoff(first_seconds=0.01, total_seconds=0.05)
LIMIT = 'toomanyrequests: You have reached your unauthenticated pull rate limit. https://www.docker.com/limit"'


@dataclass
class Held:
    """An image."""

    attrs: dict[str, str]


@dataclass
class Engine:
    """As much of a Docker client as pulling takes. Its faults are those of each reference, and happen once each."""

    held: dict[str, str] = field(default_factory=dict)
    """{reference: architecture}"""
    faults: dict[str, list[Exception | str]] = field(default_factory=dict)
    """A text is an error among the events."""
    asked: list[str] = field(default_factory=list)

    @property
    def images(self) -> "Engine":
        return self

    @property
    def api(self) -> "Engine":
        return self

    def info(self) -> dict[str, str]:
        return {"Architecture": "aarch64"}

    def get(self, reference: str) -> Held:
        if reference not in self.held:
            raise ImageNotFound(reference)
        return Held({"Os": "linux", "Architecture": self.held[reference]})

    def remove(self, reference: str) -> None:
        self.get(reference)
        del self.held[reference]

    def pull(self, repository: str, tag: str, platform: str = "linux/arm64", **_: bool) -> Iterator[dict[str, Any]]:
        reference = f"{repository}@{tag}"
        self.asked.append(reference)
        fault = self.faults[reference].pop(0) if self.faults.get(reference) else None
        if isinstance(fault, Exception):
            raise fault
        if fault is None:
            self.held[reference] = platform.partition("/")[2]
        return iter([{"status": "Pulling"}, {"error": fault} if fault else {"status": "Done"}])

    def push(self, *_: str, **__: bool) -> Iterator[dict[str, Any]]:
        return iter([{"id": "one", "status": "Pushed"}, {"status": f"candidate: digest: {SENT} size: 1"}])


def client(engine: Engine) -> docker.DockerClient:
    return cast(docker.DockerClient, engine)


@pytest.mark.parametrize(
    "fault", [APIError(LIMIT), LIMIT, "429 Too Many Requests", "received unexpected HTTP status: 429"]
)
def test_a_limit_is_waited_for(fault: Exception | str) -> None:
    reference = f"anne/emerald@{DIGEST}"
    engine = Engine(faults={reference: [fault, fault]})
    pull(client(engine), reference, None, QUICK)
    assert engine.asked == [reference] * 3


def test_a_limit_that_stays_names_its_remedy() -> None:
    reference = f"anne/emerald@{DIGEST}"
    engine = Engine(faults={reference: [LIMIT] * 10})
    with pytest.raises(InputError, match=r"allows no more requests.*docker login docker\.io, which raises the limit"):
        pull(client(engine), reference, None, QUICK)
    assert engine.asked == [reference] * 4


@pytest.mark.parametrize(
    ("fault", "says"), [(NotFound("manifest unknown"), "holds no such image"), ("denied: sign in", "docker login")]
)
def test_another_fault_is_told_at_once(fault: Exception | str, says: str) -> None:
    """Although the digest has a 429 in it."""
    reference = f"anne/emerald@{DIGEST}"
    engine = Engine(faults={reference: [fault]})
    with pytest.raises(InputError, match=says):
        pull(client(engine), reference, None, QUICK)
    assert engine.asked == [reference]


def test_a_base_comes_from_the_first_mirror() -> None:
    engine = Engine()
    assert pull_base(client(engine), BASE, None, QUICK) == GOOGLE
    assert engine.asked == [GOOGLE]


@pytest.mark.parametrize("held", [GOOGLE, AMAZON, HUB])
def test_a_base_that_the_engine_holds_is_not_pulled(held: str) -> None:
    engine = Engine(held={held: "arm64"})
    assert pull_base(client(engine), BASE, None, QUICK) == held
    assert engine.asked == []


def test_a_base_of_another_architecture_is_not_the_base() -> None:
    engine = Engine(held={HUB: "amd64"})
    assert pull_base(client(engine), BASE, None, QUICK) == GOOGLE
    assert pull_base(client(engine), BASE, "linux/amd64", QUICK) == HUB
    assert engine.asked == [GOOGLE]


def test_mirrors_that_lack_or_refuse_it_are_told_and_passed(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(faults={GOOGLE: [NotFound("manifest unknown")], AMAZON: [LIMIT], HUB: [LIMIT, LIMIT]})
    assert pull_base(client(engine), BASE, None, QUICK) == HUB
    assert engine.asked == [GOOGLE, AMAZON, HUB, HUB, HUB]
    lines = capsys.readouterr().err.splitlines()
    assert [sum(place in line for line in lines if "no base image from" in line) for place in (GOOGLE, AMAZON)] == [
        1,
        1,
    ]


def test_no_place_gives_the_base() -> None:
    engine = Engine(faults={GOOGLE: ["no route"], AMAZON: [NotFound("unknown")], HUB: [APIError(LIMIT)] * 10})
    with pytest.raises(InputError, match=r"docker login docker\.io") as raised:
        pull_base(client(engine), BASE, None, QUICK)
    assert all(place in str(raised.value) for place in (GOOGLE, AMAZON, HUB))
    assert engine.asked == [GOOGLE, AMAZON, *[HUB] * 4]


@pytest.mark.parametrize("reference", [f"python@{DIGEST}", f"library/python@{DIGEST}", f"docker.io/library/{BASE}"])
def test_an_official_image_by_any_of_its_names(reference: str) -> None:
    assert pull_base(client(Engine()), reference, None, QUICK) == GOOGLE


@pytest.mark.parametrize(
    "reference",
    [
        "python:3.11-slim",
        "emerald-base",
        f"anne/base@{DIGEST}",
        f"ghcr.io/anne/base@{DIGEST}",
        f"localhost:5000/x@{DIGEST}",
    ],
)
def test_any_other_base_is_left_to_the_build(reference: str) -> None:
    engine = Engine()
    assert pull_base(client(engine), reference, None, QUICK) == reference
    assert engine.asked == []


@dataclass
class Built:
    """An image of this engine, of two layers."""

    id: str
    attrs: dict[str, Any] = field(default_factory=lambda: {"RootFS": {"Layers": ["one", "two"]}})

    def tag(self, repository: str, tag: str) -> None:
        pass


def pushed(engine: Engine, repository: str, image_id: str = DIGEST) -> str:
    """As the workflow pushes."""
    return push(client(engine), cast(Image, Built(image_id)), repository, "candidate", after="latest")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with serving() as hub:
        yield hub


def test_before_the_first_push_there_is_nothing_to_learn(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """The registry shows no such repository, as Docker Hub does; that stops no push."""
    hub.asks, hub.open = "bearer", True
    engine = Engine()
    assert pushed(engine, f"127.0.0.1:{hub.port}/anne/none") == SENT
    assert engine.asked == []
    assert "every layer is pushed" in capfd.readouterr().err


def test_layers_of_another_image_are_learnt_first(hub: Hub) -> None:
    reference = f"{hub.repository}@{hub.add('another image', 'latest')}"
    engine = Engine()
    assert pushed(engine, hub.repository) == SENT
    assert engine.asked == [reference]


def test_layers_that_cannot_be_pulled_stop_no_push(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    reference = f"{hub.repository}@{hub.add('an image', 'latest')}"
    engine = Engine(faults={reference: ["no space left on device"]})
    assert pushed(engine, hub.repository) == SENT
    assert engine.asked == [reference]
    assert "every layer is pushed, since those of" in " ".join(capfd.readouterr().err.split())


NAMED: dict[str, dict[str, Any]] = {
    "config": {"config": {"digest": DIGEST}},
    "manifest": {},
    "index": {"manifests": []},
}
"""What an engine names an image by: Docker's own store by its config, containerd's by its manifest or index."""


@pytest.mark.parametrize("by", NAMED)
def test_an_image_that_the_registry_has_is_tagged_and_not_pushed(
    by: str, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = json.dumps({"schemaVersion": 2, **NAMED[by]}).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    hub.blobs[digest], hub.tags["latest"] = manifest, digest
    engine = Engine()
    assert pushed(engine, hub.repository, DIGEST if by == "config" else digest) == digest
    assert hub.tags["candidate"] == digest
    assert engine.asked == []
    assert "0 layers pushed, 2 were there" in " ".join(capfd.readouterr().err.split())


def test_a_full_disk_is_not_blamed_on_the_mirrors() -> None:
    engine = Engine(faults={GOOGLE: ["write /var/lib/docker/tmp: no space left on device"]})
    with pytest.raises(InputError, match=r"the disk of the Docker engine is full.*docker system prune"):
        pull_base(client(engine), BASE, None, QUICK)
    assert engine.asked == [GOOGLE]
