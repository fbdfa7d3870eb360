"""Images to a registry and back: what was sent, what was there already, and that what comes is what was asked for."""

import contextlib
import json
import re
from collections import Counter
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.images import Image

from model.errors import InputError
from pipeline.image.contents import CARD, platform_of, read_contents
from pipeline.image.engine import DiskFullError, explained, machine, told
from pipeline.image.registry import (
    DEFAULT_BACKOFF,
    DIGEST,
    Backoff,
    Manifest,
    Registry,
    Repository,
    RepositoryUnavailableError,
    check_tag,
    parse_digest,
)
from pipeline.licences import missing
from pipeline.progress import say

CANDIDATE = "candidate"
LIMITED = re.compile(r"toomanyrequests|too many requests|\b429\b", re.IGNORECASE)
"""What engines say when a registry limits requests."""
OFFICIAL = re.compile(
    rf"(?:docker\.io/)?(?:library/)?(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*)(?::[\w.-]+)?@(?P<digest>{DIGEST.pattern})"
)
"""A Docker official image by its digest."""
MIRRORS = ("mirror.gcr.io/library", "public.ecr.aws/docker/library")
"""Google's cache of Docker Hub, and the copies of its official images that Docker keeps at Amazon."""
HUB = "docker.io/library"
ONCE = Backoff(total_seconds=0)
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


def _digest_of(registry: Registry, tag: str) -> str | None:
    """What a tag names; None if nothing, or if the registry shows no such repository."""
    try:
        return registry.digest_of(check_tag(tag))
    except RepositoryUnavailableError:
        return None


def _learn_layers(client: docker.DockerClient, reference: str) -> None:
    """Pulls an image: an engine sends every layer that it does not know the registry to have."""
    try:
        pull(client, reference, None)
    except InputError as fault:
        say(f"every layer is pushed, since those of {reference} could not be pulled: {fault}")


def push(
    client: docker.DockerClient, image: Image, repository: str, tag: str | None = None, after: str | None = None
) -> str:
    """Pushes under a candidate's tag, which nobody pulls by; the digest under which the registry holds it.

    Nothing is sent of an image that the tag `after` already names, and no layer that the image there has.
    """
    tag = check_tag(tag or f"{CANDIDATE}-{str(image.id).removeprefix('sha256:')[:12]}")
    if after is not None:
        registry = Registry(Repository.parse(repository))
        digest = _digest_of(registry, after)
        if digest is None:
            say(f"{repository}:{after} names nothing yet: every layer is pushed")
        else:
            manifest = registry.manifest(digest)
            if _is_of(manifest, image):
                registry.tag(manifest, tag)
                return _pushed(repository, tag, digest, 0, len(image.attrs["RootFS"]["Layers"]))
            _learn_layers(client, f"{repository}@{digest}")
    return _send(client, image, repository, tag)


def _send(client: docker.DockerClient, image: Image, repository: str, tag: str) -> str:
    image.tag(repository, tag)
    states: dict[str, str] = {}
    digest: str | None = None
    what = f"pushing {repository}:{tag}"
    for event in told(client.api.push(repository, tag, stream=True, decode=True), what):
        if "id" in event:
            states[event["id"]] = _outcome(event.get("status", ""), states.get(event["id"], ""))
        if said := re.search(r"digest: (sha256:[0-9a-f]{64})", str(event.get("status", ""))):
            digest = str(said[1])
    if digest is None:
        raise InputError(f"{what}: the registry gave no digest, so that nothing is known to be there: push again")
    counted = Counter(states.values())
    return _pushed(repository, tag, digest, counted["pushed"], counted["there"])


def _pushed(repository: str, tag: str, digest: str, sent: int, there: int) -> str:
    say(f"{repository}:{tag} is {digest}: {sent} layers pushed, {there} were there")
    return digest


def _is_of(manifest: Manifest, image: Image) -> bool:
    """Whether it is this very image's, as of two builds of one commit: pulling it would teach the engine nothing.

    An engine names an image by its config's digest, or by its manifest's where containerd stores images.
    """
    return image.id in (manifest.digest, json.loads(manifest.content).get("config", {}).get("digest"))


def _outcome(status: str, before: str) -> str:
    if status == "Pushed":
        return "pushed"
    return "there" if status.startswith(HELD) else before


def pull(
    client: docker.DockerClient, reference: str, platform: str | None, backoff: Backoff = DEFAULT_BACKOFF
) -> Image:
    """Pulls REPOSITORY@sha256:… anew and gives it by that name. The engine checks the digest of all that comes."""
    parse_digest(reference)
    with contextlib.suppress(ImageNotFound):
        client.images.remove(reference)
    return _download(client, reference, platform, backoff)


def pull_base(
    client: docker.DockerClient, reference: str, platform: str | None, backoff: Backoff = DEFAULT_BACKOFF
) -> str:
    """The reference by which the engine holds a base image; it is pulled where the engine has it under none.

    Docker Hub limits pulls by address, and machines that are rented by the minute share theirs. So a Docker official
    image comes from a mirror, by the same digest and so with the same content. Any other is left to the build.
    """
    official = OFFICIAL.fullmatch(reference)
    if official is None:
        return reference
    places = [f"{place}/{official['name']}@{official['digest']}" for place in (*MIRRORS, HUB)]
    wanted = platform or machine(client)
    for place in places:
        if _holds(client, place, wanted):
            return place
    return _pull_from_one(client, places, wanted, backoff)


def _holds(client: docker.DockerClient, reference: str, platform: str) -> bool:
    try:
        return platform_of(client.images.get(reference)) == platform
    except ImageNotFound:
        return False


def _pull_from_one(client: docker.DockerClient, places: list[str], platform: str, backoff: Backoff) -> str:
    """Pulls an image from the first of its places that gives it; only the last one is asked more than once."""
    reason = ""
    for place in places:
        try:
            _download(client, place, platform, backoff if place == places[-1] else ONCE)
            return place
        except DiskFullError:
            raise
        except InputError as fault:
            reason = " ".join(str(fault).split())
            say(f"no base image from {reason}")
    raise InputError(
        f"the base image came from none of {', '.join(places)}; the last said: {reason}. Try again later, or docker "
        "login docker.io, which raises Docker Hub's limit"
    )


def _download(client: docker.DockerClient, reference: str, platform: str | None, backoff: Backoff) -> Image:
    """Pulls an image by its digest, and tries again while the registry limits requests."""
    pauses = backoff.start()
    while True:
        try:
            return _download_once(client, reference, platform)
        except InputError as fault:
            if not LIMITED.search(str(fault)):
                raise
            if not pauses.wait(f"{reference}: the registry limits requests"):
                host = Repository.parse(reference.partition("@")[0]).host
                raise InputError(
                    f"{reference}: the registry allows no more requests for now ({fault}): docker login {host}, which "
                    "raises the limit, or try again later"
                ) from fault


def _download_once(client: docker.DockerClient, reference: str, platform: str | None) -> Image:
    repository, _, digest = reference.partition("@")
    options: dict[str, Any] = {"platform": platform} if platform else {}
    try:
        for _ in told(
            client.api.pull(repository, tag=digest, stream=True, decode=True, **options), f"pulling {reference}"
        ):
            pass
        return client.images.get(reference)
    except NotFound as fault:
        raise InputError(f"{reference}: the registry holds no such image; push it first") from fault
    except (APIError, DockerException) as fault:
        raise explained(str(fault), f"pulling {reference}") from fault
