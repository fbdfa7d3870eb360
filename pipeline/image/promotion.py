"""Which digest a tag stands for, and which ones it stood for before: recorded in the registry itself, by tags.

Every promotion leaves a tag that is never moved again, such as `latest-promoted-0007-1a2b3c4d5e6f`, and every return to
an earlier image a `latest-returned-0008-…`: the name has the order and the beginning of the digest. So the history
needs no other place, is seen by all who see the images, and keeps them from being swept away as untagged.

Replayed, the history is a stack: a promotion lays its digest on top, a return takes away what lies above its own. After
a return from C to B, and a promotion of D, the one before D is B.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import InputError
from pipeline.image.registry import Registry, check_tag
from pipeline.progress import say

PROMOTED, RETURNED = "promoted", "returned"
SHOWN_DIGITS = 12


class Entry(NamedTuple):
    """One line of a tag's history."""

    number: int
    kind: str
    tag: str
    digest: str


def history(registry: Registry, tag: str) -> list[Entry]:
    """All that was promoted under a tag, oldest first. Raises InputError if a record was tampered with."""
    form = re.compile(rf"{re.escape(tag)}-({PROMOTED}|{RETURNED})-(\d{{4,}})-([0-9a-f]{{{SHOWN_DIGITS}}})")
    found = []
    for name in registry.tags():
        match = form.fullmatch(name)
        if match:
            digest = registry.digest_of(name)
            if digest is None or not digest.startswith(f"sha256:{match[3]}"):
                raise InputError(
                    f"{registry.repository}:{name} points to {digest}, not to what it was made for: a record was "
                    "moved; find out by whom, and delete that tag"
                )
            found.append(Entry(int(match[2]), match[1], name, digest))
    return sorted(found)


def stack(entries: list[Entry]) -> list[str]:
    """The digests that lie on each other after all entries; the last one is current."""
    digests: list[str] = []
    for entry in entries:
        if entry.kind == RETURNED and entry.digest in digests:
            last = len(digests) - 1 - digests[::-1].index(entry.digest)
            del digests[last + 1 :]
        elif digests[-1:] != [entry.digest]:
            digests.append(entry.digest)
    return digests


def promote(registry: Registry, digest: str, tag: str, verdict: Path | None) -> list[str]:
    """Points a tag to a digest that was verified; what stands against it, in words, if anything does.

    Without a verdict, only a digest that was promoted before may be.
    """
    manifest = registry.manifest(digest)
    entries = history(registry, check_tag(tag))
    faults = _faults(digest, verdict, {entry.digest for entry in entries})
    if faults:
        return faults
    _point(registry, tag, PROMOTED, digest, entries)
    say(f"{registry.repository}:{tag} is {digest}, {len(manifest.content)} bytes of manifest as they were verified")
    return []


def rollback(registry: Registry, tag: str, to: str | None) -> str:
    """Points a tag back to the digest before the current one, or to `to`, which must be recorded; that digest."""
    entries = history(registry, check_tag(tag))
    digests, now = stack(entries), registry.digest_of(tag)
    if to is not None and to not in {entry.digest for entry in entries}:
        raise InputError(
            f"{registry.repository}:{tag} was never {to}: only what was promoted can be returned to; recorded are "
            f"{', '.join(dict.fromkeys(entry.digest for entry in entries)) or 'none'}"
        )
    before = digests[:-1] if digests[-1:] == [now] else digests  # a tag that was moved by hand goes back to its record
    if to is None and not before:
        raise InputError(f"{registry.repository}:{tag}: nothing was promoted before {now}; there is no way back")
    target = to or before[-1]
    if target == now:
        say(f"{registry.repository}:{tag} is {target} already")
        return target
    _point(registry, tag, RETURNED, target, entries)
    say(f"{registry.repository}:{tag} went back from {now} to {target}")
    return target


def _point(registry: Registry, tag: str, kind: str, digest: str, entries: list[Entry]) -> None:
    """Records, then moves the tag: a death in between leaves a record too many, never a tag without one."""
    manifest = registry.manifest(digest)
    if stack(entries)[-1:] != [digest]:
        number = entries[-1].number + 1 if entries else 1
        name = f"{tag}-{kind}-{number:04}-{digest.removeprefix('sha256:')[:SHOWN_DIGITS]}"
        registry.tag(manifest, check_tag(name))
    registry.tag(manifest, tag)


def _faults(digest: str, verdict: Path | None, recorded: set[str]) -> list[str]:
    if verdict is None:
        if digest in recorded:
            return []
        return [f"{digest} was never promoted: give the report of its verification with --verdict"]
    try:
        report: Any = json.loads(verdict.read_text(encoding="utf-8"))
        gate, passed, found = report["gate"], report["passed"], report.get("digest")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise InputError(
            f"{verdict}: no report of a verification ({fault}): write one with python -m pipeline.image verify "
            "REPOSITORY@DIGEST --report FILE"
        ) from fault
    faults = []
    if gate != "image" or passed is not True:
        faults.append(f"{verdict} does not say that an image passed")
    if found != digest:
        faults.append(f"{verdict} is about {found}, and {digest} was to be promoted")
    return faults
