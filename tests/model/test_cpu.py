import os

import pytest

from model import cpu

V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str]) -> None:
    monkeypatch.setattr("model.cpu.platform.machine", lambda: machine)
    monkeypatch.setattr("model.cpu.features", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("machine", "flags", "family"),
    [
        ("x86_64", V4 | {"sse2", "amx_tile"}, "x86-64-v4"),
        ("x86_64", V3 | {"avx512f"}, "x86-64-v3"),
        ("x86_64", {"sse2"}, "x86-64"),
        ("aarch64", {"asimd", "i8mm", "bf16"}, "aarch64+bf16+i8mm"),
        ("aarch64", {"asimd", "i8mm"}, "aarch64+i8mm"),
        ("aarch64", {"asimd"}, "aarch64"),
    ],
)
def test_family(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], family: str) -> None:
    pretend(monkeypatch, machine, flags)
    assert cpu.family() == family


@pytest.mark.parametrize(
    ("machine", "flags", "runs", "refuses"),
    [
        ("x86_64", V4, ["x86-64-v4", "x86-64-v3", "x86-64"], ["aarch64"]),
        ("x86_64", V3, ["x86-64-v3", "x86-64"], ["x86-64-v4", "aarch64+bf16+i8mm"]),
        ("aarch64", {"bf16", "i8mm"}, ["aarch64", "aarch64+i8mm", "aarch64+bf16+i8mm"], ["x86-64", "aarch64+sve"]),
        ("aarch64", {"i8mm"}, ["aarch64", "aarch64+i8mm"], ["aarch64+bf16+i8mm", "aarch64+bf16"]),
    ],
)
def test_older_families_run_here_and_newer_do_not(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], runs: list[str], refuses: list[str]
) -> None:
    pretend(monkeypatch, machine, flags)
    assert all(cpu.runs(family) for family in runs)
    assert not any(cpu.runs(family) for family in refuses)


def test_this_machine_runs_what_it_compiles() -> None:
    assert cpu.runs(cpu.family())
    assert 1 <= cpu.available_cores() <= (os.cpu_count() or 1)
