import os

import pytest

from model import cpu

V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VNNI = V4 | {"avx512_vnni"}
GRAVITON2 = {"asimd", "asimddp", "asimdhp", "fphp"}
GRAVITON3 = GRAVITON2 | {"bf16", "i8mm", "sve"}


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str]) -> None:
    monkeypatch.setattr("model.cpu.platform.machine", lambda: machine)
    monkeypatch.setattr("model.cpu.features", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("machine", "flags", "family"),
    [
        ("x86_64", VNNI | {"sse2", "amx_tile"}, "x86-64-v4+vnni"),
        ("x86_64", V4 | {"avx_vnni"}, "x86-64-v4"),  # VNNI of 256 bits is another feature
        ("x86_64", V3 | {"avx512f", "avx512_vnni"}, "x86-64-v3"),
        ("x86_64", {"sse2"}, "x86-64"),
        ("aarch64", GRAVITON3, "aarch64+bf16+i8mm"),
        ("aarch64", GRAVITON2 | {"i8mm"}, "aarch64"),
        ("aarch64", GRAVITON2 | {"bf16"}, "aarch64"),
        ("aarch64", GRAVITON2, "aarch64"),
        ("aarch64", GRAVITON3 - {"asimddp"}, "armv8-a"),
        ("aarch64", {"asimd"}, "armv8-a"),
        ("riscv64", set(), "riscv64"),
    ],
)
def test_family(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], family: str) -> None:
    pretend(monkeypatch, machine, flags)
    assert cpu.family() == family


@pytest.mark.parametrize(
    ("machine", "flags", "runs"),
    [
        ("x86_64", VNNI, {"x86-64-v4+vnni", "x86-64-v4", "x86-64-v3"}),
        ("x86_64", V4, {"x86-64-v4", "x86-64-v3"}),
        ("x86_64", V3, {"x86-64-v3"}),
        ("x86_64", {"sse2"}, set()),
        ("aarch64", GRAVITON3, {"aarch64+bf16+i8mm", "aarch64"}),
        ("aarch64", GRAVITON2, {"aarch64"}),
        ("aarch64", {"asimd"}, set()),
        ("riscv64", set(), set()),
    ],
)
def test_older_families_run_here_and_newer_do_not(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], runs: set[str]
) -> None:
    """Of all that can be compiled for."""
    pretend(monkeypatch, machine, flags)
    assert {family for family in cpu.COMPILER_FLAGS if cpu.runs(family)} == runs


@pytest.mark.parametrize("unknown", ["x86-64-v5", "x86-64-v4+amx", "aarch64+sve2", "riscv64", ""])
def test_other_families_do_not_run_here(monkeypatch: pytest.MonkeyPatch, unknown: str) -> None:
    for machine, flags in (("x86_64", VNNI), ("aarch64", GRAVITON3)):
        pretend(monkeypatch, machine, flags)
        assert not cpu.runs(unknown)


def test_this_machine_runs_what_it_compiles() -> None:
    assert cpu.family() in cpu.COMPILER_FLAGS
    assert cpu.runs(cpu.family())
    assert 1 <= cpu.available_cores() <= (os.cpu_count() or 1)
