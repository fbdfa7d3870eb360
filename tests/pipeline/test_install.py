"""The installer refuses what cannot work before it downloads anything."""

import json
import platform
import sys
from pathlib import Path

import pytest

from pipeline import install
from pipeline.install import Environment
from tests.conftest import ROOT


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    assert install.main() == 2
    return capsys.readouterr().err


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "Linux on riscv64: Emerald runs on Linux on x86_64 and aarch64" in refusal(capsys)


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert "install 3.11 to 3.13" in refusal(capsys)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "apt-get install g++" in refusal(capsys)


def offline(monkeypatch: pytest.MonkeyPatch, packages: list[str]) -> list[tuple[str, ...]]:
    """No CPU index, and an index that would install `packages`; returns the calls of pip."""
    calls: list[tuple[str, ...]] = []

    def pip(_environment: Environment, *arguments: str, capture: bool = False) -> str:
        calls.append(arguments)
        return json.dumps({"install": [{"metadata": {"name": name}} for name in packages]}) if capture else ""

    monkeypatch.setattr(install, "_reachable", lambda _url: False)
    monkeypatch.setattr(Environment, "pip", pip)
    return calls


def test_cuda_packages_are_never_installed_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = offline(monkeypatch, ["torch", "nvidia-cublas", "triton"])
    monkeypatch.delenv(install.ALLOW_CUDA, raising=False)
    with pytest.raises(install.SetupError, match=r"2 CUDA packages \(nvidia-cublas and others\)"):
        Environment(Path(sys.prefix)).install_torch("9.9.9")
    assert [call[:2] for call in calls] == [("install", "--dry-run")]


def test_cuda_packages_are_installed_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = offline(monkeypatch, ["torch", "nvidia-cublas"])
    monkeypatch.setenv(install.ALLOW_CUDA, "1")
    Environment(Path(sys.prefix)).install_torch("9.9.9")
    assert calls[-1] == ("install", "--quiet", "torch==9.9.9")


def test_a_cpu_build_of_the_configured_index_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = offline(monkeypatch, ["torch", "sympy"])
    Environment(Path(sys.prefix)).install_torch("9.9.9")
    assert calls[-1] == ("install", "--quiet", "torch==9.9.9")


def test_serving_gets_its_own_dependencies_in_locked_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = offline(monkeypatch, ["torch"])
    assert install.main(["--serving", str(tmp_path / "venv")]) == 0
    asked = calls[-1]
    assert asked[:4] == (
        "install",
        "--quiet",
        "--constraint",
        str(ROOT / f"requirements/linux-{platform.machine()}.txt"),
    )
    assert {"torch", "fastapi", "faiss-cpu"} <= set(asked)
    assert not {"pytest", "sentence-transformers", "docker"} & set(asked)
    assert (tmp_path / "venv/bin/python").exists()
    assert not (tmp_path / "venv/bin/pip").exists()
