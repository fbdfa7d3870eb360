"""Which CPU this is, which instructions a program compiled for a CPU family may use, and how many cores we may use.

A family is a base and the features beyond it that our kernels use, such as "x86-64-v4+vnni" or "aarch64+bf16+i8mm".
"""

import math
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

X86_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
"""Micro-architecture levels of the x86-64 psABI, best first, by the flags that set each apart."""
COMPILER_FLAGS = {
    "x86-64-v4+vnni": ("-march=x86-64-v4", "-mavx512vnni"),
    "x86-64-v4": ("-march=x86-64-v4",),
    "x86-64-v3": ("-march=x86-64-v3",),
    "aarch64+bf16+i8mm": ("-march=armv8.2-a+dotprod+fp16+bf16+i8mm",),
    "aarch64": ("-march=armv8.2-a+dotprod+fp16",),
}
"""What can be compiled for, and how: AVX-512 with and without VNNI, AVX2; Graviton 3 and Cobalt, Graviton 2."""


AARCH64 = {"asimddp", "asimdhp", "fphp"}
"""What every family of aarch64 has: Armv8.2-A with dot products and half precision."""


def features() -> frozenset[str]:
    """The kernel's names of this CPU's features, empty where /proc/cpuinfo does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def family() -> str:
    """The most capable family this CPU belongs to; one that is not in `COMPILER_FLAGS` is not supported."""
    found = features()
    if platform.machine() == "x86_64":
        level = next((level for level, flags in X86_LEVELS.items() if flags <= found), "x86-64")
        return f"{level}+vnni" if level == "x86-64-v4" and "avx512_vnni" in found else level
    if platform.machine() == "aarch64" and not found >= AARCH64:
        return "armv8-a"
    return f"{platform.machine()}+bf16+i8mm" if {"bf16", "i8mm"} <= found else platform.machine()


def runs(compiled_for: str) -> bool:
    """Whether this CPU executes programs compiled for that family."""
    base, *wanted = compiled_for.split("+")
    here, *found = family().split("+")
    older = here.startswith("x86-64") and base.startswith("x86-64") and base <= here
    return (base == here or older) and set(wanted) <= set(found)


def available_cores(control_groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process may run on, which is often fewer than the machine has.

    A container's limit (`docker run --cpus`, Kubernetes' limits.cpu) is a quota of time, on all cores of the machine:
    more threads than the quota pays for would stop all of them, in the middle of a product, until the next period.
    Part of a core counts as one, as in Go and Java.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [math.ceil(quota) for quota in _cpu_quotas(control_groups, membership)]
    return max(1, min([cores, *quotas]))


def _cpu_quotas(control_groups: Path, membership: Path) -> Iterator[float]:
    """Cores' worth of time that each control group we are in allows us; a group's own limit binds all below it."""
    for line in membership.read_text(encoding="utf-8").splitlines() if membership.exists() else []:
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2
            yield from _quotas_up_to(control_groups, group, _quota)
        elif "cpu" in controllers.split(","):  # version 1; in a container the path may be the host's, and not exist
            yield from _quotas_up_to(control_groups / controllers, group, _legacy_quota)


def _quotas_up_to(root: Path, group: str, quota: Callable[[Path], float | None]) -> Iterator[float]:
    folder = Path(os.path.normpath(f"{root}/{group}"))
    for place in [folder, *folder.parents] if folder.is_relative_to(root) else [root]:
        found = quota(place)
        if found is not None:
            yield found
        if place == root:
            return


def _quota(folder: Path) -> float | None:
    """From cpu.max, "QUOTA PERIOD" in microseconds; None for "max" and where there is none, as in the root group."""
    file = folder / "cpu.max"
    quota, period = file.read_text(encoding="utf-8").split() if file.exists() else ("max", "1")
    return None if quota == "max" else int(quota) / int(period)


def _legacy_quota(folder: Path) -> float | None:
    files = (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
    if not all(file.exists() for file in files):
        return None
    quota, period = (int(file.read_text(encoding="utf-8")) for file in files)
    return quota / period if quota > 0 else None
