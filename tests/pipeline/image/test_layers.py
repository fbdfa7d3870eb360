import io
import os
import tarfile
from pathlib import Path

from pipeline.image.layers import EPOCH, Member, archive, archive_member, file_member, text_member


def opened(content: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(content))


def members(folder: Path) -> list[Member]:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep/weights").write_bytes(b"x" * 1000)
    (folder / "none").write_bytes(b"")
    return [
        file_member("emerald/build/deep/weights", folder / "deep/weights"),
        file_member("emerald/build/none", folder / "none"),
        text_member("emerald/" + "long/" * 40 + "name", b"said"),
    ]


def test_archive_holds_folders_and_files_of_root(tmp_path: Path) -> None:
    with opened(b"".join(archive(members(tmp_path)))) as read:
        found = read.getmembers()
        weights = read.extractfile("emerald/build/deep/weights")
        assert weights is not None
        assert weights.read() == b"x" * 1000
    assert [member.name for member in found[:5]] == [
        "emerald",
        "emerald/build",
        "emerald/build/deep",
        "emerald/build/deep/weights",
        "emerald/build/none",
    ]
    assert {(member.uid, member.gid, member.mtime) for member in found} == {(0, 0, EPOCH)}
    assert {member.mode for member in found if member.isdir()} == {0o755}
    assert {member.mode for member in found if member.isfile()} == {0o644}
    assert len({member.name for member in found}) == len(found)


def test_archive_does_not_know_dates_owners_or_modes_of_the_disk(tmp_path: Path) -> None:
    first = b"".join(archive(members(tmp_path)))
    os.utime(tmp_path / "none", (1, 1))
    (tmp_path / "deep/weights").chmod(0o600)
    assert b"".join(archive(members(tmp_path))) == first
    unchanged = members(tmp_path)
    (tmp_path / "deep/weights").write_bytes(b"y" * 1000)
    assert b"".join(archive(unchanged)) != first


def test_archive_in_an_archive_is_as_long_as_it_says(tmp_path: Path) -> None:
    inner = members(tmp_path)
    for files in (inner, inner[:1], []):
        member = archive_member("weights.tar", files, "emerald/build/engine")
        content = b"".join(member.content())
        assert len(content) == member.size
        with opened(b"".join(archive([member, text_member("Dockerfile", b"FROM scratch")]))) as outer:
            nested = outer.extractfile("weights.tar")
            assert nested is not None
            assert nested.read() == content
        with opened(content) as read:
            assert "emerald/build/engine" in read.getnames()
            assert set(read.getnames()) >= {file.name for file in files}
