"""Whether a machine will do, before time is spent on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.cpu import family
from model.errors import InputError
from pipeline.configs import CONFIGS
from pipeline.workflow.probe import NEEDS, Needs, check, main, memory_gb
from tests.conftest import ROOT

NOTHING = Needs(memory_gb=0, disk_gb=0)


def test_every_configuration_says_what_it_takes() -> None:
    assert NEEDS.keys() == CONFIGS.keys()


def test_a_machine_that_will_do() -> None:
    assert check(NOTHING, family()).startswith(f"this machine will do: {family()}")


@pytest.mark.parametrize(
    ("needs", "target", "lack"),
    [
        (Needs(memory_gb=1e6, disk_gb=0), family(), "1e+06 GB of memory are needed"),
        (Needs(memory_gb=0, disk_gb=1e6), family(), "1e+06 GB of free disk are needed"),
        (NOTHING, "aarch64+bf16+i8mm" if family().startswith("x86") else "x86-64-v3", "cannot run programs for"),
        (NOTHING, "power9", "no program can be compiled for power9"),
    ],
)
def test_what_a_machine_lacks_is_named(needs: Needs, target: str, lack: str) -> None:
    with pytest.raises(InputError) as refused:
        check(needs, target)
    assert lack in str(refused.value)


def test_all_that_is_lacking_is_named_at_once() -> None:
    with pytest.raises(InputError, match=r"memory.*disk"):
        check(Needs(memory_gb=1e6, disk_gb=1e6), family())


def test_memory_in_the_units_of_the_error(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384000 kB\nMemFree: 1 kB\n")
    assert memory_gb(tmp_path / "meminfo") == pytest.approx(16.777, abs=0.001)


def test_the_command_takes_the_workflows_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "embedded", "--set", "export.cpu=power9; quantize.scheme=int4-channel"]) == 2
    assert "power9" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["pipeline.workflow.probe", "pipeline.workflow.plan", "pipeline.workflow.conclude"])
def test_what_a_runner_starts_with_needs_no_package(module: str) -> None:
    """These run before anything is installed."""
    bare = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}"]
    assert subprocess.run(bare, capture_output=True, check=False).returncode == 0
