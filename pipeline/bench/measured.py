"""Runs a command to its end, and says what it printed and how much memory it had."""

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from model.errors import InputError

PATIENCE = 6 * 3600.0
"""Seconds after which a command counts as hung."""


class Ended(NamedTuple):
    """A finished command."""

    text: str
    """Standard output and error."""
    peak_mb: float
    """The most memory that was resident in the process itself, its children not counted."""


def measured(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Ended:
    """Runs a command; its output, and the most memory that was resident. Raises InputError if it fails."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            except OSError:
                return
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak = max(peak, int(found[1]) / 1e3 if found else 0)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        text, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise InputError(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return Ended(text, peak)
