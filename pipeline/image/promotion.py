"""Which digest a tag stands for, and which ones it stood for before: recorded in the registry itself, by tags.

Every promotion leaves a tag that is never moved again, such as `latest-promoted-0007-1a2b3c4d5e6f-r12345678901`, and
every return to an earlier image a `latest-returned-0008-…`: the name has a number, the beginning of the digest and the
GitHub run that made it. So the history needs no other place, is seen by all who see the images, and keeps them from
being swept away as untagged.

GitHub counts the runs of all workflows of a repository together, and a run that is repeated keeps its number: a greater
number was asked for later. The history is ordered by run, and within a run by number, in whatever order the records
came. A promotion by hand has no run, and a rollback may wait until newer runs than its own have promoted; both are
asked for on purpose. Their records bear the newest run that they found: they follow all that was there, and any newer
run follows them. Old records, which bear no run, come first.

The tag names the digest of the last record. Whoever moves it reads the history again, until both agree: so promotions
at the same time end at the newest run's digest, in whatever order the registry got their requests.

Replayed, the history is a stack: a promotion lays its digest on top, a return takes away what lies above its own. After
a return from C to B, and a promotion of D, the one before D is B.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import InputError
from pipeline.image.registry import Manifest, Registry, check_tag
from pipeline.progress import say

PROMOTED, RETURNED = "promoted", "returned"
SHOWN_DIGITS = 12
ROUNDS = 10
"""How often a tag is moved before a registry that never names what it was given is given up."""


class Entry(NamedTuple):
    """One record of a tag's history; they sort as the history does. The run is 0 where none was recorded."""

    run: int
    number: int
    kind: str
    tag: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a promotion: faults stood against it, a record of a newer run did, or neither."""

    digest: str | None
    """What the tag names now."""
    faults: tuple[str, ...] = ()
    superseded_by: Entry | None = None


def history(registry: Registry, tag: str, known: Sequence[Entry] = ()) -> list[Entry]:
    """All that was promoted under a tag, oldest first. Raises InputError if a record was tampered with.

    What is known is not asked for again: a registry may list a new tag late, and a record never changes.
    """
    form = re.compile(rf"{re.escape(tag)}-({PROMOTED}|{RETURNED})-(\d{{4,}})-([0-9a-f]{{{SHOWN_DIGITS}}})(?:-r(\d+))?")
    entries = {entry.tag: entry for entry in known}
    for name in registry.tags():
        match = form.fullmatch(name)
        if match and name not in entries:
            digest = registry.digest_of(name)
            if digest is None or not digest.startswith(f"sha256:{match[3]}"):
                raise InputError(
                    f"{registry.repository}:{name} points to {digest}, not to what it was made for: a record was "
                    "moved; find out by whom, and delete that tag"
                )
            entries[name] = Entry(int(match[4] or 0), int(match[2]), match[1], name, digest)
    return sorted(entries.values())


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


def promote(registry: Registry, digest: str, tag: str, verdict: Path | None, run: int | None) -> Outcome:
    """Points a tag to a digest that was verified, unless something stands against it.

    Without a verdict, only a digest that was promoted before may be. Without a run, it may be older than what it
    replaces.
    """
    manifest = registry.manifest(digest)
    entries = history(registry, check_tag(tag))
    faults = _faults(digest, verdict, {entry.digest for entry in entries})
    if faults:
        return Outcome(digest=registry.digest_of(tag), faults=tuple(faults))
    if run is not None and _newest(entries) > run:
        return Outcome(digest=registry.digest_of(tag), superseded_by=entries[-1])
    last = _record_and_move(registry, tag, PROMOTED, manifest, entries, run)
    if last.digest != digest:
        return Outcome(digest=last.digest, superseded_by=last)
    say(f"{registry.repository}:{tag} is {digest}, {len(manifest.content)} bytes of manifest as they were verified")
    return Outcome(digest=digest)


def rollback(registry: Registry, tag: str, to: str | None, run: int | None) -> str:
    """Points a tag back to the digest before the current one, or to `to`, which must be recorded.

    Gives the digest that the tag names now: another one if a newer run has promoted it meanwhile.
    """
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
    last = _record_and_move(registry, tag, RETURNED, registry.manifest(target), entries, run)
    how = f"is {target} already" if target == now else f"went back from {now} to {target}"
    say(f"{registry.repository}:{tag} {how}")
    if last.digest != target:
        say(f"{registry.repository}:{tag} is {last.digest} now, by {last.tag}, which came meanwhile")
    return last.digest


def _newest(entries: Sequence[Entry]) -> int:
    """The newest run that is recorded."""
    return entries[-1].run if entries else 0


def _record_and_move(
    registry: Registry, tag: str, kind: str, manifest: Manifest, entries: Sequence[Entry], run: int | None
) -> Entry:
    """Records a digest, then moves the tag; the record that the tag follows in the end.

    A death in between leaves a record too many, never a tag without one. The digest that the tag has already is
    recorded too when the run is newer, so that no older run's comes after it.
    """
    run = max(run or 0, _newest(entries))
    if not entries or (entries[-1].digest, entries[-1].run) != (manifest.digest, run):
        number = 1 + max((entry.number for entry in entries), default=0)
        name = f"{tag}-{kind}-{number:04}-{manifest.digest.removeprefix('sha256:')[:SHOWN_DIGITS]}"
        name = check_tag(f"{name}-r{run}" if run else name)
        registry.tag(manifest, name)
        entries = [*entries, Entry(run, number, kind, name, manifest.digest)]
    return _move(registry, tag, manifest, entries)


def _move(registry: Registry, tag: str, manifest: Manifest, entries: Sequence[Entry]) -> Entry:
    """Moves a tag to the digest of the last record, until history and tag agree; that record."""
    for _ in range(ROUNDS):
        entries = history(registry, tag, entries)
        last = entries[-1]
        if registry.digest_of(tag) == last.digest:
            return last
        if last.digest != manifest.digest:
            manifest = registry.manifest(last.digest)
        registry.put(manifest, tag)
    raise InputError(
        f"{registry.repository}:{tag} is not {last.digest} after it was set to it {ROUNDS} times: others move it, or "
        "the registry forgets: run again"
    )


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
