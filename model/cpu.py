"""Which CPU this is, and which instructions a program compiled for a CPU family may use.

A family is a base and the features beyond it that our kernels use, such as "x86-64-v4+vnni" or "aarch64+bf16+i8mm".
"""

import os
import platform
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


def available_cores() -> int:
    """How many cores this process may run on, which is often fewer than the machine has."""
    return len(os.sched_getaffinity(0))
