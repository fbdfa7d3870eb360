"""The Docker engine: found, or said to be missing in words; what it builds, pushes and pulls, told as it goes on.

Images are built by BuildKit through Docker's command line; all else goes through its Python library.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.images import Image

from model.errors import InputError
from pipeline.progress import say

SILENCE_SECONDS = 3600
"""How long the engine may say nothing: it installs packages and compresses gigabytes without a word."""
LINES_OF_A_FAULT = 20
"""Of what a failed build printed last, what is shown."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The kernel's names of machines, and Docker's."""


class DiskFullError(InputError):
    """The engine has no room; to get the same image from another place does not help."""


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
        return DiskFullError(
            f"{what}: the disk of the Docker engine is full: look with docker system df, free some with docker system "
            f"prune, and run again{before}"
        )
    if any(word in fault for word in ("unauthorized", "denied", "no basic auth", "authentication required")):
        return InputError(f"{what}: refused ({fault}): docker login with a name and token that may push there{before}")
    if "exec format error" in fault:
        return InputError(f"{what}: it is for another architecture than this machine ({fault}){before}")
    return InputError(f"{what}: {fault}{before}")


def layer_bytes(image: Image) -> int:
    """Bytes of an image's files: its layers', unpacked. The engine's own sum differs between its image stores."""
    return sum(int(layer["Size"]) for layer in image.history())


def run_build(command: Sequence[str], context: Iterable[bytes], what: str) -> None:
    """Runs `docker build` with BuildKit, sends it the context, and says each step of the Dockerfile once.

    The Python library reaches the classic builder alone, which Docker has announced to remove.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "1", "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except FileNotFoundError as fault:
        raise InputError(
            f"{what}: no docker command: install Docker's command line with its buildx plugin (docker-ce-cli and "
            "docker-buildx-plugin, or Debian's docker.io)"
        ) from fault
    assert process.stdin is not None and process.stdout is not None
    with process, ThreadPoolExecutor(1) as reader:
        lines = reader.submit(_say_steps, process.stdout)
        with contextlib.suppress(BrokenPipeError), process.stdin as sent:  # it ended early: its last lines say why
            for block in context:
                sent.write(block)
        said = lines.result()
    if process.returncode:
        raise explained(said[-1] if said else f"exit code {process.returncode}", what, said[-LINES_OF_A_FAULT:])


def _say_steps(output: IO[bytes]) -> list[str]:
    """Says each step of the Dockerfile as it begins, or that it was done before; all lines that were printed."""
    lines: list[str] = []
    said: set[str] = set()
    steps: dict[str, str] = {}
    for line in output:
        lines.append(line.decode("utf-8", "replace").rstrip())
        number, _, event = lines[-1].partition(" ")
        if event == "CACHED" and number in steps:
            say(f"  {steps[number]} has been done before")
        step = re.match(r"(\[[\w-]* *\d+/\d+\]) ", event)
        if step and event not in said:
            said.add(event)
            steps[number] = step[1]
            say(f"  {event[:110]}")
    return lines
