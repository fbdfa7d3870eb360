"""The installer refuses what cannot work before it downloads anything."""

import ast
import hashlib
import json
import platform
import re
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

from pipeline import install
from pipeline.install import Environment
from tests.conftest import ROOT

PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which nothing is set up, and no Python is asked for."""
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.delenv("PYTHON", raising=False)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    assert install.main() == 2
    return capsys.readouterr().err


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "Linux on riscv64: Emerald runs on Linux on x86_64 and aarch64" in refusal(capsys)


def program(folder: Path, name: str, script: str) -> Path:
    """A program of that name in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


def old_python(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Sets up with Python 3.9, and has no other programs than those in `path` and a compiler."""
    program(path, "g++", "true")
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.2")


def test_an_old_python_is_told_how_to_get_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old_python(monkeypatch, tmp_path / "bin")
    told = refusal(capsys)
    assert "this is Python 3.9.2, and Emerald runs on 3.11 to 3.14" in told
    assert 'run uv python install 3.13 && make setup PYTHON="$(uv python find 3.13)"' in told


def test_an_old_python_names_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program(tmp_path / "bin", "python3.14", "exit 127")  # as a version manager's stand-in does
    program(tmp_path / "bin", "python3.12", "true")
    old_python(monkeypatch, tmp_path / "bin")
    assert "run make setup PYTHON=python3.12" in refusal(capsys)


def test_an_old_python_refuses_what_serving_needs_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old_python(monkeypatch, tmp_path / "bin")
    assert install.main(["--serving", str(tmp_path / "serving")]) == 2
    assert "Emerald runs on 3.11 to 3.14" in capsys.readouterr().err


def test_the_installer_starts_on_python_3_8() -> None:
    source = (ROOT / "pipeline/install.py").read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source


def test_pythons_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (first, oldest), (second, newest) = install.OLDEST, install.NEWEST
    assert project["requires-python"] == f">={first}.{oldest},<{second}.{newest + 1}"
    locked = re.findall(r"(?<!\S)3\.\d+", (ROOT / "requirements/lock.sh").read_text())
    assert locked == [f"3.{minor}" for minor in range(oldest, newest + 1)]
    tested = dict(re.findall(r"\[(\w+)\]=(3\.\d+)", (ROOT / "tests/python/run.sh").read_text()))
    assert tested["sid"] == f"{second}.{newest}"


def test_a_missing_venv_module_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert f"apt-get install {PYTHON}-venv" in refusal(capsys)


def test_missing_headers_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environment("", monkeypatch)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    assert install.main() == 0
    told = capsys.readouterr().err
    assert f"warning: no {tmp_path}/Python.h" in told
    assert f"apt-get install {PYTHON}-dev" in told


def environment(python: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """One that holds that Python, set up for the lock as it is; returns the calls of pip."""
    version = f"echo {python}" if python else "exit 1"
    program(install.VENV / "bin", "python", version)
    lock, models = ROOT / f"requirements/linux-{platform.machine()}.txt", ROOT / "requirements/models.txt"
    state = hashlib.sha256(python.encode() + lock.read_bytes() + models.read_bytes()).hexdigest()
    (install.VENV / "installed.sha256").write_text(state)
    monkeypatch.setattr(venv, "create", lambda folder, **_options: program(folder / "bin", "python", "echo 3.12.99"))
    monkeypatch.setattr(Environment, "install_torch", lambda _environment, _version: None)
    return offline(monkeypatch, [])


OTHER = "3.12.99" if sys.version_info[:2] != (3, 12) else "3.13.99"


@pytest.mark.parametrize("held", [platform.python_version(), OTHER])
def test_an_environment_stays(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    calls = environment(held, monkeypatch)
    assert install.main() == 0
    assert calls == []


def test_an_environment_stays_though_the_systems_python_is_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = environment(OTHER, monkeypatch)
    old_python(monkeypatch, tmp_path / "bin")
    assert install.main() == 0
    assert calls == []


@pytest.mark.parametrize("held", [OTHER, "3.9.2", ""])
def test_an_environment_of_another_python_than_asked_for_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: str
) -> None:
    calls = environment(held, monkeypatch)
    monkeypatch.setenv("PYTHON", "python3")
    assert install.main() == 0
    told = f"Python {held}" if held else "no working Python"
    assert f"creating .venv with Python {platform.python_version()}; it held {told}" in capsys.readouterr().out
    assert [call[0] for call in calls] == ["install", "install"]


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
