import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model.artifact import file_digest, files_below, manifest_digest, read_manifest, write_json, write_manifest
from model.errors import InputError

Damage = Callable[[Path], object]


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A small sealed folder of kind "bread" with a file in a folder of its own."""
    folder = tmp_path / "sealed"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "notes.txt").write_text("rye", encoding="utf-8")
    write_manifest(folder, "bread", {"model_id": "Émile"})
    return folder


def flip_byte(path: Path, at: int = 5000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_manifest_lists_every_file_and_the_facts(sealed: Path) -> None:
    manifest = read_manifest(sealed, "bread")
    assert (manifest["kind"], manifest["model_id"]) == ("bread", "Émile")
    assert manifest["files"] == {
        "inner/notes.txt": {"bytes": 3, "sha256": hashlib.sha256(b"rye").hexdigest()},
        "weights.bin": {"bytes": 10240, "sha256": hashlib.sha256(bytes(range(256)) * 40).hexdigest()},
    }


def test_sealing_again_leaves_the_manifest_out_of_itself(sealed: Path) -> None:
    digest = manifest_digest(sealed)
    write_manifest(sealed, "bread", {"model_id": "Émile"})
    assert manifest_digest(sealed) == digest == file_digest(sealed / "manifest.json")


def test_manifest_digest_follows_the_content(sealed: Path) -> None:
    digest = manifest_digest(sealed)
    flip_byte(sealed / "weights.bin")
    write_manifest(sealed, "bread", {"model_id": "Émile"})
    assert manifest_digest(sealed) != digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin: missing"),
        (lambda folder: (folder / "inner/notes.txt").unlink(), "inner/notes.txt: missing"),
        (
            lambda folder: (folder / "weights.bin").write_bytes(b"short"),
            "weights.bin: 5 bytes found, 10240 expected",
        ),
        (lambda folder: flip_byte(folder / "weights.bin"), "weights.bin: SHA-256 [0-9a-f]{12}… found"),
        (lambda folder: edit(folder, kind="cake"), "holds kind 'cake' in format 1, expected 'bread' in format 1"),
        (lambda folder: edit(folder, format=99), "holds kind 'bread' in format 99, expected 'bread' in format 1"),
        (lambda folder: (folder / "manifest.json").unlink(), "no .*manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"kind": "bre'), "manifest.json: not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json: not valid JSON"),
        (
            lambda folder: (folder / "weights-9.safetensors").touch(),
            "weights-9.safetensors: not listed in manifest.json",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: a JSON list where an object"),
    ],
    ids=[
        "missing",
        "missing-inner",
        "truncated",
        "flipped",
        "kind",
        "format",
        "no-manifest",
        "cut-json",
        "not-utf8",
        "unlisted",
        "list",
    ],
)
def test_every_damage_is_named_with_the_remedy(sealed: Path, damage: Damage, message: str) -> None:
    damage(sealed)
    with pytest.raises(InputError, match=message) as caught:
        read_manifest(sealed, "bread")
    assert str(sealed) in str(caught.value)
    assert str(caught.value).endswith('run "python -m pipeline run"')


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no .*nowhere/manifest\.json: run"):
        read_manifest(tmp_path / "nowhere", "bread")


def test_files_are_listed_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/b", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path) for path in files_below(tmp_path)] == ["a/b", "a/z", "b", "c"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert files_below(tmp_path) == [Path("facts.json")]
