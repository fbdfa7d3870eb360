"""Layers whose bytes depend on their files and on nothing else: tar archives with fixed dates, owners, modes and order.

Docker names a layer by the digest of its archive, dates included. Archives that it makes itself of copied files hold
the moment of the copy; these do not, so the weights of two builds are one layer, which is pushed and pulled once. They
are written as they are read: 5 GB of weights pass through without a copy on the disk.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

EPOCH = 315532800
"""The date of every file, in seconds: the first of January 1980, before which zip files know no time."""
BLOCK = 1 << 20
"""Bytes of a file that are read at once."""


class Member(NamedTuple):
    """A file of an archive."""

    name: str
    size: int
    content: Callable[[], Iterator[bytes]]
    """Its bytes, from the beginning at every call."""


def file_member(name: str, path: Path) -> Member:
    """A file of the disk."""

    def content() -> Iterator[bytes]:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block

    return Member(name, path.stat().st_size, content)


def text_member(name: str, content: bytes) -> Member:
    """A file whose content is at hand."""
    return Member(name, len(content), lambda: iter([content]))


def archive_member(name: str, members: Sequence[Member], folder: str) -> Member:
    """An archive within an archive; `folder` is in it even when no file is."""
    sizes = (len(part) if isinstance(part, bytes) else part.size for part in _parts(members, folder))
    return Member(name, sum(sizes), lambda: archive(members, folder))


def archive(members: Sequence[Member], folder: str = "") -> Iterator[bytes]:
    """The bytes of an archive: members in the given order, each after the folders it lies in, all of root's."""
    for part in _parts(members, folder):
        if isinstance(part, bytes):
            yield part
        else:
            yield from _whole(part)


def _parts(members: Iterable[Member], folder: str) -> Iterator[bytes | Member]:
    """What stands between the members' contents, and the members, one after the other."""
    made = {PurePosixPath()}
    yield from _folders(PurePosixPath(folder), made)
    for member in members:
        yield from _folders(PurePosixPath(member.name).parent, made)
        yield _header(member.name, member.size)
        yield member
        yield bytes(-member.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _whole(member: Member) -> Iterator[bytes]:
    sent = 0
    for block in member.content():
        sent += len(block)
        yield block
    assert sent == member.size, f"{member.name} changed while it was read"


def _folders(path: PurePosixPath, made: set[PurePosixPath]) -> Iterator[bytes]:
    """Headers of a folder and those above it, unless they were made before."""
    for folder in [*reversed(path.parents), path]:
        if folder not in made:
            made.add(folder)
            yield _header(f"{folder}/", 0)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, EPOCH
    info.type, info.mode = (tarfile.DIRTYPE, 0o755) if name.endswith("/") else (tarfile.REGTYPE, 0o644)
    info.uname = info.gname = "root"
    return info.tobuf(tarfile.GNU_FORMAT)
