"""The tree keeps its promises: imports point one way, and what is written twice agrees."""

import ast
from pathlib import Path

import pytest

from pipeline.configs import embedded
from pipeline.stages import table
from tests.conftest import ROOT

ALLOWED = {"model": {"model"}, "serving": {"serving", "model"}, "pipeline": {"pipeline", "serving", "model"}}
PACKAGES = sorted(ALLOWED)


def imported_roots(file: Path) -> set[str]:
    """Top-level names of everything a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported_roots(file) & set(PACKAGES) <= ALLOWED[package], file


@pytest.mark.parametrize("package", PACKAGES)
def test_package_files_stay_empty(package: str) -> None:
    for file in (ROOT / package).rglob("__init__.py"):
        assert file.read_text(encoding="utf-8") == "", file


def test_serving_needs_no_training_library() -> None:
    for package in ("serving", "model"):
        for file in (ROOT / package).rglob("*.py"):
            assert not imported_roots(file) & {"transformers", "sentence_transformers"}, file


def test_readme_shows_the_stage_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for stage in table(embedded()):
        writes = ", ".join(f"`{path}`" for path in stage.outputs)
        assert f"| `{stage.name}` | {stage.purpose} | {writes} |" in readme


def test_readme_shows_every_file_with_its_purpose() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.name != "__init__.py":
                docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                indented = "  " * (len(file.relative_to(ROOT).parts) - 1) + file.name
                assert f"\n{indented:22} {docstring.splitlines()[0]}\n" in readme, file


def test_locks_pin_everything_and_name_no_cuda() -> None:
    for lock in (ROOT / "requirements").glob("linux-*.txt"):
        pins = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert all("==" in pin for pin in pins)
        assert not any(pin.startswith(("nvidia", "cuda", "triton")) for pin in pins)
        assert any(pin.startswith("torch==") for pin in pins)
