"""A build folder whose model does not load until it may."""

import fcntl
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held_up(build: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """Makes `folder` that build; its model loads when the function that is given is called, or in the end.

    Whoever else opens the file waits as long as we hold a lease on it, of which the kernel tells us by a signal.
    """
    for name in ("embedder", "cache", "certificate.json"):
        (folder / name).symlink_to(build / name)
    shutil.copytree(build / "engine", folder / "engine")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with (folder / "engine/head.so").open("rb+") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield file.close
    finally:
        signal.signal(signal.SIGIO, before)
