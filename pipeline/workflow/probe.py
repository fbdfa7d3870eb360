"""Whether this machine can build a configuration, before time is spent on it: python3 -m pipeline.workflow.probe.

Uses the standard library alone, so that a runner is judged before anything is installed. Exit code 2 names what is
missing and what to do.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from model.cpu import COMPILER_FLAGS, available_cores, family, runs
from model.errors import InputError
from pipeline.configs import CONFIGS, named_config, with_settings


class Needs(NamedTuple):
    """What a build takes at its peak."""

    memory_gb: float
    disk_gb: float


NEEDS = {
    "embedded": Needs(memory_gb=3.5, disk_gb=6),
    # 2.9 GiB of process at most, the rest is page cache; 10.0 GB of disk (make test-8b), 4 of packages
    "llama31-8b": Needs(memory_gb=14, disk_gb=14),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if this machine will do, 2 if not."""
    parser = argparse.ArgumentParser(prog="python3 -m pipeline.workflow.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="embedded", metavar="NAME", help=f"one of {', '.join(CONFIGS)}")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="STAGE.FIELD=VALUE")
    options = parser.parse_args(arguments)
    try:
        target = with_settings(named_config(options.config), options.settings).export.cpu
        print(check(NEEDS[options.config], family() if target == "native" else target))
    except InputError as fault:
        print(f"::error::{fault}" if os.environ.get("GITHUB_ACTIONS") else f"error: {fault}")
        return 2
    return 0


def check(needs: Needs, target: str) -> str:
    """What this machine has, in a line. Raises InputError with everything that it lacks."""
    memory, disk = memory_gb(Path("/proc/meminfo")), shutil.disk_usage(Path.cwd()).free / 1e9
    here = f"{family()}, {available_cores()} cores, {memory:.1f} GB of memory, {disk:.1f} GB of free disk"
    lacks = []
    if target not in COMPILER_FLAGS:
        lacks.append(f"no program can be compiled for {target}: export.cpu takes {', '.join(COMPILER_FLAGS)}")
    elif not runs(target):
        lacks.append(f"it cannot run programs for {target}: choose another runner, or set export.cpu to what it has")
    if memory < needs.memory_gb:
        lacks.append(f"{needs.memory_gb:g} GB of memory are needed: choose a larger runner")
    if disk < needs.disk_gb:
        lacks.append(f"{needs.disk_gb:g} GB of free disk are needed: free some, or choose a larger runner")
    if lacks:
        raise InputError(f"this machine ({here}) will not do: {'; '.join(lacks)}")
    return f"this machine will do: {here}"


def memory_gb(meminfo: Path) -> float:
    """All memory of the machine, in units of 1e9 bytes."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
    return int(lines["MemTotal"].split()[0]) * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
