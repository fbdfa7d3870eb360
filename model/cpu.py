"""Which CPU this is, as far as compiled programs and packed weights care."""

import os
import platform
from pathlib import Path

X86_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
}
"""Micro-architecture levels of the x86-64 psABI, best first, by the flags that set each apart."""


def features() -> frozenset[str]:
    """The kernel's names of this CPU's features, empty where /proc/cpuinfo does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def family() -> str:
    """The most capable family this CPU belongs to: "x86-64-v4", "aarch64+bf16+i8mm", "aarch64"."""
    found = features()
    if platform.machine() == "x86_64":
        return next((level for level, flags in X86_LEVELS.items() if flags <= found), "x86-64")
    return "+".join([platform.machine(), *(name for name in ("bf16", "i8mm") if name in found)])


def runs(compiled_for: str) -> bool:
    """Whether this CPU executes programs compiled for that family."""
    here = family()
    if here.startswith("x86-64") and compiled_for.startswith("x86-64"):
        return compiled_for <= here
    return compiled_for.split("+")[0] == here.split("+")[0] and set(compiled_for.split("+")) <= set(here.split("+"))


def available_cores() -> int:
    """How many cores this process may run on, which is often fewer than the machine has."""
    return len(os.sched_getaffinity(0))
