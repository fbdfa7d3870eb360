"""How a build shares the machine: how long its threads wait by spinning, and how many cores it takes.

GNU's OpenMP spins for some milliseconds after every product, which is best on a machine that does nothing else: the
next product comes sooner than a thread wakes. Beside another busy process it is ruinous, since threads spin on the
cores that the work needs: training went at a sixth of its idle speed. A build gives up a little of its idle speed to be
safe from that. What is measured for servers is measured as they run: with OpenMP's own default.

A product also waits for the slowest of its threads, and beside a busy process one of them gets half a core: two threads
are then slower than one. A stage whose outputs are the same for any number of threads takes the cores that are free;
one that embeds single questions takes one, as the server does, since such products are too small to be shared.

OpenMP reads the environment once, when it is loaded; so `spin_briefly` is called before torch is imported.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from model.cpu import available_cores
from pipeline.progress import say

SPINS, TURNS = "GOMP_SPINCOUNT", "10000"
"""OpenMP's default is 300,000 turns, a few milliseconds."""
Cores = Literal["all", "free", "one"]
"""Which cores a stage computes on."""
THREADS = "OMP_NUM_THREADS"
LOOKED_SECONDS = 0.25
"""How long the processors are watched."""
CHOSEN = ("OMP_WAIT_POLICY", SPINS)
"""What people set who know better: theirs stays."""


def spin_briefly() -> None:
    """For this process and those that it starts, unless the environment says something of it already."""
    if not any(name in os.environ for name in CHOSEN):
        os.environ[SPINS] = TURNS


def take_cores(which: Cores) -> None:
    """How many threads torch uses from now on, unless the environment says it."""
    if THREADS in os.environ or (which == "all" and "torch" not in sys.modules):
        return
    import torch

    cores = available_cores()
    taken = {"all": cores, "one": 1}.get(which) or free_cores()
    if which == "free" and taken < cores:
        say(f"  {taken} of {cores} cores {'is' if taken == 1 else 'are'} free, and used")
    torch.set_num_threads(taken)


def free_cores(stat: Path = Path("/proc/stat")) -> int:
    """How many of the cores that this process may use nobody used just now; at least one."""
    before = _ticks(stat)
    time.sleep(LOOKED_SECONDS)
    idle, total = (now - then for now, then in zip(_ticks(stat), before, strict=True))
    cores = available_cores()
    return max(1, min(cores, round(cores * idle / total))) if total else cores


def _ticks(stat: Path) -> tuple[int, int]:
    """Of all processors together: idle ones, waits for disks among them, and all (proc_stat(5))."""
    fields = [int(field) for field in stat.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def as_served(run: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, in which threads wait as they do where nothing was set.

    Whatever interrupts the call ends that process; one that outlives its caller ends by itself.
    """
    before = os.environ.get(SPINS)
    if before == TURNS:
        del os.environ[SPINS]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, run, arguments))
    try:
        process.start()
        theirs.close()
        value, fault = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{run.__module__} ended without a word, exit code {process.exitcode}") from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        if before is not None:
            os.environ[SPINS] = before
    if fault is not None:
        raise fault
    return value


def _call(caller: Connection, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Sends what the function returns, or what it raises, with where that came from."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the caller answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        caller.send((run(*arguments), None))
    except BaseException as fault:
        fault.add_note("".join(traceback.format_exception(fault)))
        caller.send((None, fault))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
