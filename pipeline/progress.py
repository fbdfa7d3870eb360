"""Progress of long work: a live bar on a terminal, plain lines (one every few seconds) anywhere else."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
PLAIN_SECONDS = 10.0
console = Console(stderr=True, highlight=False, emoji=False)


def say(message: str) -> None:
    """A line for people, on standard error; standard output is for data."""
    console.print(message, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silences what torchao and torch log at import about GPU kernels and deprecations that do not concern a build."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items, showing how many of them are done."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _bar(items, what, total) if console.is_terminal else _lines(items, what, total)


def _bar(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


def _lines(items: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    spoken = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - spoken >= PLAIN_SECONDS:
            spoken = time.monotonic()
            say(f"  {what}: {done} of {total or '?'}")
            sys.stderr.flush()
