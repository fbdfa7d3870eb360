"""A folder that can be trusted: files, and a manifest that names every one with its size and SHA-256.

The manifest also says what the folder is (kind, model, licence, architecture, recipe, versions). Opening one
verifies all of it, so that a truncated file, a flipped byte or a folder of another kind is an error with a remedy
before anything is computed from it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from model.cpu import available_cores
from model.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 4 << 20
"""Bytes of a file that are read at once; after each, Python's lock must be waited for."""
REMEDY = 'run "python -m pipeline run"'


Progress = Callable[[float], None]
"""Is told how much of an artifact has been verified, from 0 to 1; by several threads, one at a time."""


def unwatched(_done: float) -> None:
    """The progress that no one watches."""


def file_digest(path: Path, read: Callable[[int], None] = unwatched) -> str:
    """SHA-256 of a file's content, in hexadecimal; `read` is told the size of every block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            read(size)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All regular files below a folder, relative to it, in a fixed order."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def write_json(path: Path, content: object) -> None:
    """Writes JSON with a stable layout, in one atomic step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, remedy: str = "fetch the model again") -> dict[str, Any]:
    """A JSON object from a file; InputError names the file and the place of a fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise InputError(f"{path}: not valid JSON ({fault}); {remedy}") from fault
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON {type(content).__name__} where an object is expected; {remedy}")
    return content


def link_or_copy(file: Path, place: Path) -> None:
    """The same file in another place; a copy only where it cannot be linked, as on another disk."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def write_manifest(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    """Seals a folder: lists all its files and states `facts` about them."""
    files = {
        str(name): {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        for name in files_below(folder)
        if str(name) != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": FORMAT_VERSION, "kind": kind, **facts, "files": files})


def read_manifest(folder: Path, kind: str, progress: Progress = unwatched) -> dict[str, Any]:
    """Opens a sealed folder: checks its kind and every file's size and SHA-256. Raises InputError on any difference."""
    if not (folder / MANIFEST).exists():
        raise InputError(f"no {folder / MANIFEST}: {REMEDY}")
    manifest = read_json(folder / MANIFEST, REMEDY)
    found = (manifest.get("kind"), manifest.get("format"))
    if found != (kind, FORMAT_VERSION):
        raise InputError(
            f"{folder}: holds kind {found[0]!r} in format {found[1]!r}, expected {kind!r} in format {FORMAT_VERSION}: "
            f"{REMEDY}"
        )
    unlisted = sorted({str(name) for name in files_below(folder)} - {*manifest["files"], MANIFEST})
    if unlisted:
        raise InputError(f"{folder / unlisted[0]}: not listed in {MANIFEST}; remove it, or {REMEDY}")
    total, done, counting = sum(facts["bytes"] for facts in manifest["files"].values()), 0, Lock()

    def read(size: int) -> None:
        nonlocal done
        with counting:
            done += size
            progress(done / total)

    with ThreadPoolExecutor(available_cores()) as pool:
        faults = list(pool.map(lambda entry: _fault(folder / entry[0], entry[1], read), manifest["files"].items()))
    for found_fault in filter(None, faults):
        raise InputError(f"{found_fault}: {REMEDY}")
    return manifest


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a sealed folder's manifest, and so of all it lists."""
    return file_digest(folder / MANIFEST)


def _fault(path: Path, expected: dict[str, Any], read: Callable[[int], None]) -> str | None:
    if not path.is_file():
        return f"{path}: missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path}: {size} bytes found, {expected['bytes']} expected"
    digest = file_digest(path, read)
    if digest != expected["sha256"]:
        return f"{path}: SHA-256 {digest[:12]}… found, {expected['sha256'][:12]}… expected"
    return None
