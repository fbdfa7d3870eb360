"""One function in the emulator, with the model loaded, for all tests that need no fresh one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lambda_ import events
from tests.lambda_.emulator import Function, emulated
from tests.lambda_.management import Management, managing


@pytest.fixture(scope="session")
def management() -> Iterator[Management]:
    with managing() as running:
        yield running
        assert running.faults == []


@pytest.fixture(scope="session")
def function(embedded_build: Path, management: Management) -> Iterator[Function]:
    with emulated(embedded_build, management.url) as running:
        running.invoke(events.prologue("warming"))
        assert management.received("warming")[-1]["type"] == "ready"
        yield running
