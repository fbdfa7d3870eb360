"""What an image says of itself: labels, and the manifests, certificate, card and notices inside, without running it.

Labels are written from a build's own manifests, so that a registry's page and an orchestrator can tell which model,
certificate and CPU family an image is for; `differences` finds labels that say otherwise than what is inside.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import docker
from docker.errors import NotFound
from docker.models.images import Image

from model.errors import InputError

HOME = "emerald"
"""The folder at the image's root that holds code and build."""
BUILD = f"{HOME}/build"
CARD = "MODEL_CARD.md"
NOTICES = "licences"
OWN = "emerald"
"""Prefix of the labels that are ours; the others are OCI's annotations."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The small files of an image that say what it is, by their path below `HOME`."""

    files: dict[str, bytes]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file. Raises InputError if the image has none of that name."""
        try:
            content = json.loads(self.files[name])
        except (KeyError, ValueError) as fault:
            raise InputError(
                f"the image holds no readable /{HOME}/{name}: it is none of ours, or was changed; build it again"
            ) from fault
        assert isinstance(content, dict)
        return content

    def text(self, name: str) -> str:
        """A text file; empty if there is none."""
        return self.files.get(name, b"").decode("utf-8", "replace")

    def notices(self, model: str) -> dict[str, str]:
        """The licence files of "model" or "embedder", {name: text}."""
        folder = f"{NOTICES}/{model}/"
        return {name.removeprefix(folder): self.text(name) for name in self.files if name.startswith(folder)}

    def facts(self) -> dict[str, str]:
        """The labels that follow from what is inside."""
        engine, certificate = self.json("build/engine/manifest.json"), self.json("build/certificate.json")
        manifest = self.files["build/engine/manifest.json"]
        return {
            f"{OWN}.model": engine["model_id"],
            f"{OWN}.model.manifest": f"sha256:{hashlib.sha256(manifest).hexdigest()}",
            f"{OWN}.scheme": engine["recipe"]["scheme"],
            f"{OWN}.cpu": engine["cpu"],
            f"{OWN}.certificate": certificate["seal"] if certificate["certified"] else "none",
        }

    def differences(self, labels: dict[str, str]) -> list[str]:
        """Labels that do not say what is inside, in words."""
        return [
            f"label {name} says {labels.get(name)!r}, inside is {fact!r}"
            for name, fact in self.facts().items()
            if labels.get(name) != fact
        ]


def read_contents(client: docker.DockerClient, image: Image) -> Contents:
    """Takes the files out of a container that is made and never started, so that any architecture's can be read."""
    files: dict[str, bytes] = {}
    with _unstarted(client, image) as container:
        for name in (CARD, NOTICES, "build/certificate.json", *_inside("engine", "embedder", "cache")):
            try:
                stream, _ = container.get_archive(f"/{HOME}/{name}")
            except NotFound:
                continue  # what an image lacks is named by the check that reads it
            folder = name.rpartition("/")[0]
            with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
                for member in archive.getmembers():
                    found = archive.extractfile(member) if member.isfile() else None
                    if found is not None:
                        files[f"{folder}/{member.name}".lstrip("/")] = found.read()
    return Contents(files=files)


def _inside(*folders: str) -> Iterator[str]:
    for folder in folders:
        yield f"build/{folder}/manifest.json"
    yield "build/cache/entries.json"
    yield "build/reports/latency.json"


@contextmanager
def _unstarted(client: docker.DockerClient, image: Image) -> Iterator[Any]:
    container = client.containers.create(image, platform=platform_of(image))
    try:
        yield container
    finally:
        container.remove(v=True, force=True)


def platform_of(image: Image) -> str:
    """Such as linux/arm64."""
    return f"{image.attrs['Os']}/{image.attrs['Architecture']}"
