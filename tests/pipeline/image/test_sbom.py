"""The image's list of packages before the push: what the attestation would refuse after it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.image.sbom import main

LIMIT = 16 * 1024 * 1024


def written(folder: Path, **fields: Any) -> Path:
    """A list of one package, with these fields changed."""
    file = folder / "sbom.spdx.json"
    file.write_text(json.dumps({"spdxVersion": "SPDX-2.3", "packages": [{"name": "python"}], **fields}))
    return file


@pytest.mark.parametrize(("bytes_", "code"), [(1000, 0), (LIMIT, 0), (LIMIT + 1, 1)])
def test_size_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str], bytes_: int, code: int) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes().ljust(bytes_))
    assert main([str(file)]) == code
    said = capsys.readouterr().err
    assert f"{file}: 1 packages, {bytes_ / 2**20:.1f} MiB of 16" in said
    assert ("1 bytes too many; leave the files out" in said) is (code == 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"spdxVersion": "SPDX-3.0"}, "spdxVersion is 'SPDX-3.0'"),
        ({"spdxVersion": None}, "spdxVersion is None"),
        ({"packages": []}, "it lists no packages"),
        ({"packages": {"name": "python"}}, "it lists no packages"),
    ],
)
def test_another_kind_of_list_is_named_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], says: str
) -> None:
    file = written(tmp_path, **fields)
    assert main([str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}: {says}" in said
    assert "list the image's packages again, as spdx-json" in said


def test_truncated_or_missing_list_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert main([str(file)]) == 2
    assert f"{file}: not valid JSON" in capsys.readouterr().err
    file.unlink()
    assert main([str(file)]) == 2
    assert f"{file}: missing; list the image's packages again" in capsys.readouterr().err
