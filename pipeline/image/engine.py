"""The Docker engine: found, or said to be missing in words; what it builds, pushes and pulls, told as it goes on.

Images are built by the engine itself, which every engine can do, through its Python library.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.images import Image

from model.errors import InputError
from pipeline.progress import say

SILENCE_SECONDS = 3600
"""How long the engine may say nothing: it installs packages and compresses gigabytes without a word."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The kernel's names of machines, and Docker's."""


@contextmanager
def engine() -> Iterator[docker.DockerClient]:
    """The engine that DOCKER_HOST names, or this machine's. Raises InputError if none answers, or if it fails."""
    place = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        client = docker.from_env(timeout=SILENCE_SECONDS)
        client.ping()
    except (DockerException, requests.RequestException) as fault:
        raise InputError(
            f"no Docker engine answers at {place} ({fault}): start one, or set DOCKER_HOST; everything up to the image "
            'is built without it by "python -m pipeline run"'
        ) from fault
    try:
        yield client
    except (APIError, requests.RequestException) as fault:
        raise explained(str(fault), f"the Docker engine at {place}") from fault
    finally:
        client.close()


def machine(client: docker.DockerClient) -> str:
    """The platform that this engine runs without emulation, such as linux/arm64."""
    found = str(client.info()["Architecture"])
    return f"linux/{ARCHITECTURES.get(found, found)}"


def local_image(client: docker.DockerClient, reference: str) -> Image:
    """An image that the engine holds. Raises InputError if it holds none of that name."""
    try:
        return client.images.get(reference)
    except ImageNotFound as fault:
        raise InputError(
            f"{reference}: the Docker engine holds no such image; build it with make image, or pull it"
        ) from fault


def told(events: Iterator[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    """Passes on what the engine tells of its work; raises InputError for an error among it."""
    lines: list[str] = []
    for event in events:
        if "error" in event:
            raise explained(event["error"], what, lines[-20:])
        lines += str(event.get("stream", "")).splitlines()
        yield event


def explained(fault: str, what: str, lines: list[str] | None = None) -> InputError:
    """An engine's error in words that say what to do."""
    before = "\n".join(["", *lines]) if lines else ""
    if "no space left" in fault:
        return InputError(
            f"{what}: the disk of the Docker engine is full: look with docker system df, free some with docker system "
            f"prune, and run again{before}"
        )
    if any(word in fault for word in ("unauthorized", "denied", "no basic auth", "authentication required")):
        return InputError(f"{what}: refused ({fault}): docker login with a name and token that may push there{before}")
    if "exec format error" in fault:
        return InputError(f"{what}: it is for another architecture than this machine ({fault}){before}")
    return InputError(f"{what}: {fault}{before}")


def say_steps(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Passes events of a build on, and says each step of the Dockerfile."""
    for event in events:
        step = str(event.get("stream", ""))
        if step.startswith("Step "):
            say(f"  {step.strip()[:110]}")
        yield event
