"""How threads of a build wait, and that what is measured waits as a server does."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from model.cpu import available_cores
from model.errors import InputError
from pipeline.configs import embedded
from pipeline.stages import table
from pipeline.waiting import CHOSEN, SPINS, TURNS, as_served, free_cores, spin_briefly, take_cores
from tests.conftest import ROOT
from tests.pipeline.conftest import PATIENCE


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)


def test_a_build_spins_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SPINS, "")  # restored afterwards
    monkeypatch.delenv(SPINS)
    spin_briefly()
    assert os.environ[SPINS] == TURNS


@pytest.mark.parametrize("name", CHOSEN)
def test_what_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "ACTIVE")
    spin_briefly()
    assert {other: os.environ.get(other) for other in CHOSEN} == {**dict.fromkeys(CHOSEN), name: "ACTIVE"}


@pytest.mark.parametrize(("given", "seen"), [(TURNS, None), ("77", "77"), (None, None)])
def test_what_is_measured_waits_as_a_server_does(
    monkeypatch: pytest.MonkeyPatch, given: str | None, seen: str | None
) -> None:
    if given is not None:
        monkeypatch.setenv(SPINS, given)
    assert as_served(os.getenv, SPINS) == seen
    assert os.environ.get(SPINS) == given


def written(file: Path, *ticks: int) -> None:
    file.write_text(f"cpu  {' '.join(map(str, ticks))}\ncpu0 1 2 3\n")


@pytest.mark.parametrize(
    ("idle", "busy", "free"),
    [(100, 0, 1.0), (50, 50, 0.5), (0, 100, 0.0), (95, 5, 0.95)],
)
def test_free_cores_are_those_that_nobody_used(tmp_path: Path, idle: int, busy: int, free: float) -> None:
    """By the kernel's counters before and after; a little noise counts for nothing."""
    stat, cores = tmp_path / "stat", available_cores()
    written(stat, 1000, 0, 500, 9000, 100, 0, 0, 0, 0, 0)
    later = threading.Timer(0.05, written, (stat, 1000 + busy, 0, 500, 9000 + idle, 100, 0, 0, 0, 0, 0))
    later.start()
    assert free_cores(stat) == max(1, round(cores * free))
    later.join()


def test_threads_follow_the_free_cores_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pipeline.waiting.free_cores", lambda: 1)
    before = torch.get_num_threads()
    take_cores("free")
    assert torch.get_num_threads() == 1
    take_cores("all")
    assert torch.get_num_threads() == available_cores()
    take_cores("one")
    assert torch.get_num_threads() == 1
    take_cores("all")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # somebody chose
    take_cores("free")
    assert torch.get_num_threads() == available_cores()
    torch.set_num_threads(before)


def refuse(what: str) -> None:
    raise InputError(f"{what}: no")


def test_an_error_there_is_an_error_here() -> None:
    with pytest.raises(InputError, match="the engine: no"):
        as_served(refuse, "the engine")


CALLER = """
import os, signal, time
from pipeline.waiting import as_served
def served():
    print(os.getpid(), flush=True)
    time.sleep(60)
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    as_served(served)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_served_ends_with_its_caller(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        served = int(caller.stdout.readline())
        caller.send_signal(how)
        assert caller.wait(PATIENCE) != 0
    until = time.monotonic() + PATIENCE
    while Path(f"/proc/{served}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{served}").exists()


def end() -> None:
    os._exit(7)


def test_a_process_that_ends_without_a_word_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit code 7"):
        as_served(end)


def test_the_stages_that_measure_are_those_that_time_the_engine() -> None:
    assert [stage.name for stage in table(embedded()) if stage.measures] == ["gate_latency", "savings"]


def test_what_a_training_gives_depends_on_its_threads_and_so_it_takes_all_cores() -> None:
    taken = {stage.name: stage.cores for stage in table(embedded()) if stage.cores != "all"}
    assert taken == {"quantize": "free", "gate_quality": "free", "build_cache": "one", "certify_cache": "one"}
