"""Images to a registry and back: what was sent, what was there already, and that what comes is what was asked for."""

import contextlib
import re
from collections import Counter
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.images import Image

from model.errors import InputError
from pipeline.image.contents import CARD, read_contents
from pipeline.image.engine import explained, told
from pipeline.image.registry import check_tag, parse_digest
from pipeline.licences import missing
from pipeline.progress import say

CANDIDATE = "candidate"
HELD = ("Layer already exists", "Already exists", "Mounted from")


def licence_faults(client: docker.DockerClient, image: Image) -> list[str]:
    """What an image lacks of what the licences of its weights ask for before they are passed on, in words."""
    contents = read_contents(client, image)
    card, labels = contents.text(CARD), dict(image.labels)
    return [
        f"{model}: {fault}"
        for model, folder in (("model", "engine"), ("embedder", "embedder"))
        for fault in missing(contents.notices(model), card, labels, contents.json(f"build/{folder}/manifest.json"))
    ]


def push(client: docker.DockerClient, image: Image, repository: str, tag: str | None) -> str:
    """Pushes under a candidate's tag, which nobody pulls by; the digest under which the registry holds it."""
    tag = check_tag(tag or f"{CANDIDATE}-{str(image.id).removeprefix('sha256:')[:12]}")
    image.tag(repository, tag)
    states: dict[str, str] = {}
    digest = None
    what = f"pushing {repository}:{tag}"
    for event in told(client.api.push(repository, tag, stream=True, decode=True), what):
        if "id" in event:
            states[event["id"]] = _outcome(event.get("status", ""), states.get(event["id"], ""))
        if said := re.search(r"digest: (sha256:[0-9a-f]{64})", str(event.get("status", ""))):
            digest = said[1]
    if digest is None:
        raise InputError(f"{what}: the registry gave no digest, so that nothing is known to be there: push again")
    counted = Counter(states.values())
    say(f"{repository}:{tag} is {digest}: {counted['pushed']} layers pushed, {counted['there']} were there")
    return str(digest)


def _outcome(status: str, before: str) -> str:
    if status == "Pushed":
        return "pushed"
    return "there" if status.startswith(HELD) else before


def pull(client: docker.DockerClient, reference: str, platform: str | None) -> Image:
    """Pulls REPOSITORY@sha256:… anew and gives it by that name. The engine checks the digest of all that comes."""
    parse_digest(reference)
    with contextlib.suppress(ImageNotFound):
        client.images.remove(reference)
    repository, _, digest = reference.partition("@")
    options: dict[str, Any] = {"platform": platform} if platform else {}
    try:
        for _ in told(
            client.api.pull(repository, tag=digest, stream=True, decode=True, **options), f"pulling {reference}"
        ):
            pass
        pulled: Image = client.images.get(reference)
    except NotFound as fault:
        raise InputError(f"{reference}: the registry holds no such image; push it first") from fault
    except (APIError, DockerException) as fault:
        raise explained(str(fault), f"pulling {reference}") from fault
    return pulled
