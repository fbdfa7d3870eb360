"""The load test, short: what `make loadtest` checks for ten minutes holds for some seconds."""

import json
from pathlib import Path

import pytest

from pipeline.bench.loadtest import main

SHORT = {
    "clients": 48,
    "seconds": 5,
    "open-seconds": 2,
    "warm-up-seconds": 2,
    "questions": 10,
    "contexts": 1,
    "growth-percent": 20,  # of 48 clients in seconds this shows that something grows, not that little does
}


def test_a_short_load_loses_nothing(embedded_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [text for name, value in SHORT.items() for text in (f"--{name}", str(value))]
    code = main(["--build", str(embedded_build), *options])
    seen = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, [check for check in seen["checks"] if not check["passed"]]
    assert seen["passed"] and len(seen["checks"]) == 10
    closed = seen["loops"]["closed"]
    assert {"cache", "model"} == set(closed["ms"])
    assert {"complete", "refused", "hung up"} == set(closed["outcomes"]), "48 clients are more than there are places"
    assert set(closed["statuses"]) == {"200", "429"}
