"""How long OpenMP's threads wait for work by spinning, before they sleep.

GNU's OpenMP spins for some milliseconds after every product, which is best on a machine that does nothing else: the
next product comes sooner than a thread wakes. Beside another busy process it is ruinous, since threads spin on the
cores that the work needs: training went at a sixth of its idle speed. A build gives up a little of its idle speed to be
safe from that. What is measured for servers is measured as they run: with OpenMP's own default.

OpenMP reads the environment once, when it is loaded; so this is called before torch is imported.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

SPINS, TURNS = "GOMP_SPINCOUNT", "10000"
"""OpenMP's default is 300,000 turns, a few milliseconds."""
CHOSEN = ("OMP_WAIT_POLICY", SPINS)
"""What people set who know better: theirs stays."""


def spin_briefly() -> None:
    """For this process and those that it starts, unless the environment says something of it already."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ[SPINS] = TURNS


def as_served(run: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, in which threads wait as they do where nothing was set."""
    before = os.environ.get(SPINS)
    if before == TURNS:
        del os.environ[SPINS]
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(run, *arguments).result()
    finally:
        if before is not None:
            os.environ[SPINS] = before
