"""Errors that nobody foresaw: they are logged, counted, and say nothing of themselves."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.testclient import TestClient

from model.sampling import Sampling
from serving.app import create_app
from serving.calls import Call
from serving.completion import Completion
from serving.energy import EnergyModel
from serving.scheduler import Ticket
from serving.security import SECURITY_HEADERS
from serving.service import Service
from serving.settings import Settings


def test_an_error_of_the_server_has_the_doors_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_name: str) -> None:
        raise MemoryError("in /srv/secret")

    service = Service(Settings())
    monkeypatch.setattr(service, "check_model", failing)
    answer = TestClient(create_app(Settings(), service), raise_server_exceptions=False).get("/v1/models/any")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert all(answer.headers[name] == value for name, value in SECURITY_HEADERS.items())


def test_an_error_within_a_stream_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        raise MemoryError("in /srv/secret")

    async def seen() -> list[str]:
        return [one async for one in call.watched(events(), completion)]

    refused: list[int] = []
    ticket = Ticket(Sampling(), "a", 60, lambda _piece: None)
    call, completion = Call(ticket, lambda *_: None, refused.append), Completion("m", ticket, None, EnergyModel(400))
    first, last = asyncio.run(seen())
    assert first == "data: 1\n\n"
    assert "server_error" in last
    assert "secret" not in last
    assert "MemoryError: in /srv/secret" in caplog.text
    assert (refused, call.reason) == ([500], "error")
