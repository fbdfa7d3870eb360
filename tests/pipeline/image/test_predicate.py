"""The statement about an image: made of what its gates wrote, and of nothing that does not belong together."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.artifact import manifest_digest, write_json, write_manifest
from pipeline.image.__main__ import main
from pipeline.verdict import Check, write_report

DIGEST = f"sha256:{'1' * 64}"
SEAL = "5ea1"


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder as the gates see it, with a report of verifying its image beside it."""
    folder = tmp_path / "build"
    (folder / "engine").mkdir(parents=True)
    (folder / "reports").mkdir()
    facts = dict.fromkeys(("model_id", "licence", "source", "cpu", "torch"), "some")
    write_manifest(folder / "engine", "engine", {**facts, "recipe": {"scheme": "int4-g32"}})
    false = {"hits": 493, "false": 3, "upper": 0.0157}
    certificate = {"certified": True, "confidence": 0.95, "risk": 0.02, "false_hits": false, "seal": SEAL}
    write_json(folder / "certificate.json", certificate)
    for gate in ("quality", "replies", "latency", "cache"):
        write_report(folder / f"reports/{gate}.json", gate, [Check(name="a", value=1, limit=2, bound="at most")])
    labels = {"emerald.model.manifest": f"sha256:{manifest_digest(folder / 'engine')}", "emerald.certificate": SEAL}
    checks = [Check(name="hit", value=1, limit=1, bound="at least")]
    write_report(folder / "image.json", "image", checks, digest=DIGEST, labels=labels)
    return folder


def run(build: Path, digest: str = DIGEST) -> int:
    return main(["predicate", "--build", str(build), "--digest", digest, str(build / "image.json")])


def change(path: Path, **fields: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **fields})


def test_statement_has_every_gate_and_the_digest(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build) == 0
    statement = json.loads(capsys.readouterr().out)
    assert [(gate["gate"], gate["passed"]) for gate in statement["gates"]] == [
        ("quality", True),
        ("replies", True),
        ("latency", True),
        ("cache", True),
        ("image", True),
    ]
    assert statement["gates"][-1]["digest"] == DIGEST
    assert statement["certificate"]["seal"] == SEAL
    assert statement["model"]["manifest"].startswith("sha256:")


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        ("reports/quality.json", {"passed": False}, "its gate failed"),
        ("image.json", {"passed": False}, "its gate failed"),
        ("image.json", {"gate": "quality"}, "no report of verifying an image by its digest"),
        ("image.json", {"labels": {"emerald.certificate": SEAL}}, "its image holds another model"),
        ("certificate.json", {"seal": "another"}, "its image holds another certificate"),
        ("certificate.json", {"certified": False}, "its image holds another certificate"),
    ],
)
def test_nothing_is_stated_of_what_does_not_belong_together(
    build: Path, capsys: pytest.CaptureFixture[str], file: str, fields: dict[str, Any], says: str
) -> None:
    change(build / file, **fields)
    assert run(build) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err.replace("\n", " ")


@pytest.mark.parametrize("gone", ["reports/latency.json", "image.json", "certificate.json"])
def test_missing_report_is_named(build: Path, capsys: pytest.CaptureFixture[str], gone: str) -> None:
    (build / gone).unlink()
    assert run(build) == 2
    assert f"{build / gone}: missing" in capsys.readouterr().err.replace("\n", "")


def test_a_verdict_on_another_image_is_none_on_this_one(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build, f"sha256:{'2' * 64}") == 1
    ended = capsys.readouterr()
    assert (ended.out, f"it is about {DIGEST}" in ended.err) == ("", True)
