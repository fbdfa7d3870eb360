"""What is refused before the application sees it, in a server of its own with a small application."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from serving import listener
from tests.serving.server import free_port

CHUNK, CHUNKS = b"x" * 65536, 300


async def endless(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Far more than buffers hold."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
    await send({"type": "http.response.body"})


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    protocol = listener._protocol(5)
    server = uvicorn.Server(
        uvicorn.Config(endless, port=port, http=protocol, lifespan="off", ws="none", log_config=None)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield port
    server.should_exit = True
    thread.join(timeout=20)


def answered(port: int, *pieces: bytes) -> tuple[int, bytes, bytes]:
    """Status, head and body of what comes before the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((GET + b"X: ", b"y" * 40000, b"y" * 40000), 431),
        ((b"GET /", b"y" * 40000, b"y" * 40000), 431),
        ((b"\x16\x03\x01\x02\x00\r\n\r\n",), 400),
    ],
)
def test_what_is_no_request_gets_openais_shape(port: int, pieces: tuple[bytes, ...], status: int) -> None:
    found, head, body = answered(port, *pieces)
    assert found == status
    assert b"connection: close" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_beyond_its_connections_it_says_when_to_come_back(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS_MAX", 1)
    status, head, body = answered(port, GET + b"\r\n")
    assert (status, json.loads(body)["error"]["type"]) == (503, "overloaded_error")
    assert b"retry-after: 1" in head
    assert b"x-frame-options: deny" in head


def test_a_client_that_does_not_read_is_let_go(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "UNREAD_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(GET + b"\r\n")
        time.sleep(1)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 20):
                received += len(part)
    assert 0 < received < CHUNKS * len(CHUNK)
