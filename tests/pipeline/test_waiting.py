"""How threads of a build wait, and that what is measured waits as a server does."""

import os

import pytest

from model.errors import InputError
from pipeline.configs import embedded
from pipeline.stages import table
from pipeline.waiting import CHOSEN, SPINS, TURNS, as_served, spin_briefly


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


def refuse(what: str) -> None:
    raise InputError(f"{what}: no")


def test_an_error_there_is_an_error_here() -> None:
    with pytest.raises(InputError, match="the engine: no"):
        as_served(refuse, "the engine")


def test_the_stages_that_measure_are_those_that_time_the_engine() -> None:
    assert [stage.name for stage in table(embedded()) if stage.measures] == ["gate_latency", "savings"]
