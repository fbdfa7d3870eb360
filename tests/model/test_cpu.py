import os
from pathlib import Path

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


def affinity() -> int:
    return len(os.sched_getaffinity(0))


def limited(folder: Path, membership: str, files: dict[str, str]) -> int:
    """The cores that are available in control groups with these files."""
    for name, text in files.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(text)
    (folder / "membership").write_text(membership)
    return cpu.available_cores(folder / "cgroup", folder / "membership")


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.cpu.os.sched_getaffinity", lambda _process: set(range(16)))


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("max 100000\n", 16),
        ("3200000 100000\n", 16),
    ],
)
def test_quota_of_version_2_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    assert limited(tmp_path, "0::/\n", {"cpu.max": quota}) == cores


@pytest.mark.usefixtures("many_cores")
def test_quota_of_a_group_above_binds_too(tmp_path: Path) -> None:
    files = {"pods/cpu.max": "300000 100000", "pods/one/cpu.max": "800000 100000"}
    assert limited(tmp_path, "0::/pods/one\n", files) == 3


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("membership", "folder"),
    [
        ("4:memory:/\n1:cpu,cpuacct:/pods/one\n0::/\n", "cpu,cpuacct/pods/one"),
        ("1:cpu,cpuacct:/docker/0123\n", "cpu,cpuacct"),  # in a container, the path is the host's
        ("1:cpu:/\n", "cpu"),
        ("2:cpu:/../../elsewhere\n", "cpu"),  # a process that was moved out of its namespace's root
    ],
)
def test_quota_of_version_1_limits_the_cores(tmp_path: Path, membership: str, folder: str) -> None:
    files = {f"{folder}/cpu.cfs_quota_us": "250000\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert limited(tmp_path, membership, files) == 3


@pytest.mark.usefixtures("many_cores")
@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/\n", {"cgroup.controllers": "cpu"}),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}),
        ("3:cpuset:/\n2:cpuacct:/\n", {"cpuacct/cpu.cfs_quota_us": "100000", "cpuacct/cpu.cfs_period_us": "100000"}),
        ("", {}),
    ],
)
def test_without_a_quota_all_cores_are_available(tmp_path: Path, membership: str, files: dict[str, str]) -> None:
    assert limited(tmp_path, membership, files) == 16


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert cpu.available_cores(tmp_path / "none", tmp_path / "none") == affinity()
