"""Builds the image: writes its layers from a build folder and sends them to the engine with the Dockerfile.

What is in a build folder is verified before it is sent, and the labels are written from it, never given by hand.
"""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docker

from model.artifact import MANIFEST, files_below, manifest_digest, read_json, read_manifest
from model.errors import InputError
from pipeline.fingerprint import ROOT
from pipeline.image.contents import BUILD, CARD, HOME, NOTICES, OWN, Contents
from pipeline.image.engine import layer_bytes, machine, run_build
from pipeline.image.layers import EPOCH, Member, archive, archive_member, file_member, text_member
from pipeline.image.model_card import model_card
from pipeline.image.transfer import pull_base
from pipeline.licences import notices, terms_of
from pipeline.progress import say

CONTEXT = ("Dockerfile", "pyproject.toml", "requirements", "pipeline/install.py")
"""What the Dockerfile takes from the tree as it is."""
CODE = ("model", "serving")
WEIGHT_LAYERS = 4
LAYER_BYTES = 2_000_000_000
"""A layer of weights stays below this."""
FAMILIES = {"x86-64": "linux/amd64", "aarch64": "linux/arm64"}
"""Platforms by the CPU family that an engine was compiled for, up to its first further feature."""
REMEDY = 'run "python -m pipeline run"'


def build(
    client: docker.DockerClient,
    folder: Path,
    *,
    target: str,
    tag: str,
    platform: str | None,
    base: str | None,
    builder: str | None,
    network: str | None,
    afresh: bool,
) -> str:
    """Builds and tags an image of a build folder; its id. Raises InputError with what is wrong with the folder."""
    engine = read_manifest(folder / "engine", "engine")
    _check_platform(client, engine["cpu"], platform)
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    named = base or _official_base(dockerfile)
    base = base or pull_base(client, named, platform)
    contents = _contents(folder)
    command = _command(
        {
            "target": target,
            "tag": tag,
            "platform": platform,
            "network": network,
            "build-arg": {"BASE": base, "BUILDER": builder or base, "SOURCE_DATE_EPOCH": str(EPOCH)},
            "label": {**_described(engine, named), f"{OWN}.target": target, **contents.facts()},
            "no-cache": afresh,
        }
    )
    run_build(command, archive(list(_context(folder, contents))), f"building {tag}")
    image = client.images.get(tag)
    say(f"{tag}: {layer_bytes(image) / 1e6:.0f} MB for {image.attrs['Architecture']}, from {folder}")
    return str(image.id)


def _command(options: Mapping[str, str | bool | Mapping[str, str] | None]) -> list[str]:
    """`docker build` with these options, reading its context from standard input; None and False leave one out."""
    command = ["docker", "build", "--progress", "plain"]
    for name, value in options.items():
        if isinstance(value, Mapping):
            command += [part for key, text in value.items() for part in (f"--{name}", f"{key}={text}")]
        elif value is True:
            command.append(f"--{name}")
        elif value:
            command += [f"--{name}", str(value)]
    return [*command, "-"]


def _check_platform(client: docker.DockerClient, cpu: str, platform: str | None) -> None:
    wanted = next((name for family, name in FAMILIES.items() if cpu.startswith(family)), None)
    found = platform or machine(client)
    if wanted != found:
        raise InputError(
            f"the build's engine was exported for {cpu}, and the image would be for {found}: run "
            '"python -m pipeline run export" on such a machine, or, where Docker emulates the other, add '
            f"--platform {wanted}"
        )


def _contents(folder: Path) -> Contents:
    """The files that say what the image is: those of the build folder, and the notices and the card, written here."""
    embedder, cache = read_manifest(folder / "embedder", "embedder"), read_manifest(folder / "cache", "cache")
    engine = read_json(folder / "engine" / MANIFEST, REMEDY)
    read_json(folder / "certificate.json", REMEDY)
    if cache["embedder"] != manifest_digest(folder / "embedder"):
        raise InputError(f"{folder}: the cache was built with another embedder than this; {REMEDY}")
    files = {
        f"build/{name}": (folder / name).read_bytes()
        for name in (f"engine/{MANIFEST}", f"embedder/{MANIFEST}", f"cache/{MANIFEST}", "certificate.json")
    }
    apache = ROOT / "LICENSE"
    files["LICENSE"] = apache.read_bytes()
    for model, manifest in (("engine", engine), ("embedder", embedder)):
        place = {"engine": "model"}.get(model, model)
        for name, text in notices(folder / model, manifest, apache).items():
            files[f"{NOTICES}/{place}/{name}"] = text
    files[CARD] = model_card(folder, engine, embedder).encode()
    return Contents(files=files)


def _context(folder: Path, contents: Contents) -> Iterator[Member]:
    """What is sent: the tree's few files, and the archives of the layers."""
    for name in CONTEXT:
        place = ROOT / name
        for path in files_below(place) if place.is_dir() else [Path()]:
            yield file_member(str(Path(name) / path), place / path)
    for number, members in enumerate(_weight_layers(folder), start=1):
        yield archive_member(f"weights-{number}.tar", members, f"{BUILD}/engine")
    yield archive_member("embedder.tar", _members(folder, "embedder"), BUILD)
    yield archive_member("cache.tar", _cache(folder), BUILD)
    yield archive_member("code.tar", _code(contents), HOME)


def _weight_layers(folder: Path) -> list[list[Member]]:
    """The engine's files in as few layers as they need, and empty ones up to the Dockerfile's number."""
    layers: list[list[Member]] = [[]]
    members = _members(folder, "engine")
    for member in sorted(members, key=lambda member: member.name.endswith(MANIFEST)):
        if sum(other.size for other in layers[-1]) + member.size > LAYER_BYTES and layers[-1]:
            layers.append([])
        layers[-1].append(member)
    if len(layers) > WEIGHT_LAYERS:
        raise InputError(
            f"{folder}/engine: {sum(member.size for member in members) / 1e9:.1f} GB do not fit {WEIGHT_LAYERS} layers "
            f"of {LAYER_BYTES / 1e9:g} GB; add some to Dockerfile and to WEIGHT_LAYERS of pipeline/image/build.py"
        )
    return layers + [[] for _ in range(WEIGHT_LAYERS - len(layers))]


def _cache(folder: Path) -> list[Member]:
    members = [*_members(folder, "cache"), *_members(folder, "reports")]
    return [*members, file_member(f"{BUILD}/certificate.json", folder / "certificate.json")]


def _members(folder: Path, name: str) -> list[Member]:
    return [file_member(f"{BUILD}/{name}/{path}", folder / name / path) for path in files_below(folder / name)]


def _code(contents: Contents) -> list[Member]:
    written = {name: text for name, text in contents.files.items() if not name.startswith("build/")}
    files = [
        file_member(f"{HOME}/{package}/{path}", ROOT / package / path)
        for package in CODE
        for path in files_below(ROOT / package)
        if "__pycache__" not in path.parts
    ]
    return [*files, *(text_member(f"{HOME}/{name}", text) for name, text in sorted(written.items()))]


def _described(engine: dict[str, Any], base: str) -> dict[str, str]:
    """OCI's annotations, without what cannot be known here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    terms = terms_of(engine["licence"], engine["model_id"])
    name, _, digest = base.partition("@")
    known = {
        "title": f"Emerald: {engine['model_id'].rpartition('/')[2]}, {engine['recipe']['scheme']}",
        "description": "A storyteller with certified ready answers in front of an int4 Llama"
        f"{f'. {terms.badge}' if terms.badge else ''}.",
        "licenses": " AND ".join(dict.fromkeys([project["license"], _spdx(engine["licence"])])),
        "version": project["version"],
        "revision": os.environ.get("GITHUB_SHA") or _git("rev-parse", "HEAD"),
        "source": _source(),
        "base.name": name,
        "base.digest": digest,
    }
    return {f"org.opencontainers.image.{name}": value for name, value in known.items() if value}


def _spdx(licence: str) -> str:
    """A licence by an expression that SPDX allows: what it does not list is a LicenseRef."""
    return licence if licence == "Apache-2.0" else f"LicenseRef-{licence}"


def _source() -> str:
    """Where the code is, for people; never with a name or token that an address may carry."""
    if "GITHUB_REPOSITORY" in os.environ:
        return f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
    address = _git("remote", "get-url", "origin")
    found = re.fullmatch(r"(?:https://(?:[^@/]*@)?|git@)([\w.-]+)[:/]([\w./-]+?)(?:\.git)?", address)
    return f"https://{found[1]}/{found[2]}" if found else ""


def _git(*arguments: str) -> str:
    """What git says; nothing where the tree is no repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _official_base(dockerfile: str) -> str:
    """The base that the Dockerfile names, by its digest."""
    found = re.search(r"^FROM (\S+@sha256:[0-9a-f]{64}) AS official$", dockerfile, re.MULTILINE)
    assert found, "Dockerfile has no stage official with a digest"
    return found[1]
