"""What goes wrong around a server: kills, shutdowns, clients that vanish, fall silent or read slowly."""

import contextlib
import http.client
import json
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.server import LONG, Server, call, serving, wait_until_ready


@pytest.fixture(scope="module")
def server(embedded_build: Path) -> Iterator[Server]:
    with serving(embedded_build, EMERALD_RUNNING="1", EMERALD_WAITING="4") as running:
        wait_until_ready(running.port)
        yield running


@pytest.fixture(autouse=True)
def serves_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running: Server = request.getfixturevalue("server")
        assert busy(running.port) == 0
        assert ask(running.port, "I look up.") != ""
        assert "Traceback" not in running.log()


def body(question: str, **wishes: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24, **wishes}


def ask(port: int, question: str, **wishes: Any) -> str:
    """The text of a complete answer, streamed or whole."""
    status, _, text = call(port, "POST", "/v1/chat/completions", body(question, **wishes))
    assert status == 200, text
    if not wishes.get("stream"):
        return str(json.loads(text)["choices"][0]["message"]["content"])
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def connected(port: int, question: str, **wishes: Any) -> socket.socket:
    """A connection whose question was sent."""
    content = json.dumps(body(question, **wishes)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def reset(connection: socket.socket) -> None:
    """Hangs up without a word: what was not read is thrown away."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


ADMITTED = ("vllm:num_requests_", "vllm:request_success_total")
"""What runs, waits and has ended."""


def figure(port: int, name: str | tuple[str, ...]) -> float:
    """The sum of all series whose names begin so."""
    lines = call(port, "GET", "/metrics")[2].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def until(port: int, name: str | tuple[str, ...], value: float) -> float:
    """The figure, once it has that value, or after ten seconds."""
    for _ in range(200):
        found = figure(port, name)  # not read again: between two counters a request that ends is in neither
        if found == value:
            break
        time.sleep(0.05)
    return found


def busy(port: int) -> float:
    return until(port, "vllm:num_requests_", 0)


def test_killed_under_load_it_starts_again_and_says_the_same(embedded_build: Path) -> None:
    question = "I walk through the gates and look up."
    with serving(embedded_build) as first:
        wait_until_ready(first.port)
        said = ask(first.port, question)
        streams = [connected(first.port, f"I open door {number}.", stream=True, **LONG) for number in range(8)]
        for stream in streams:
            assert stream.recv(12) == b"HTTP/1.1 200"
        first.process.kill()
        first.process.wait(timeout=20)
        for stream in streams:
            with contextlib.suppress(ConnectionResetError):
                while stream.recv(65536):
                    pass
            stream.close()
    with serving(embedded_build, PORT=str(first.port)):
        wait_until_ready(first.port)
        assert ask(first.port, question) == said


def test_a_killed_server_leaves_nothing_behind(embedded_build: Path, tmp_path: Path) -> None:
    with serving(embedded_build, TMPDIR=str(tmp_path)) as server:
        wait_until_ready(server.port)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_lets_every_admitted_request_end_and_refuses_later_ones(embedded_build: Path) -> None:
    questions = [f"I open door {number}." for number in range(8)]
    wishes: list[dict[str, Any]] = [{"max_tokens": 60, "stream": number % 2 == 0} for number in range(8)]
    with serving(embedded_build, EMERALD_RUNNING="2") as server:
        port = server.port
        wait_until_ready(port)
        alone = [ask(port, question, **wish) for question, wish in zip(questions, wishes, strict=True)]
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(idle), ThreadPoolExecutor(8) as pool:
            idle.request("GET", "/health/live")
            assert idle.getresponse().read()
            asked = [pool.submit(ask, port, question, **wish) for question, wish in zip(questions, wishes, strict=True)]
            assert until(port, ADMITTED, len(alone) + len(asked)) == len(alone) + len(asked)
            server.process.send_signal(signal.SIGTERM)
            assert refuses(port)
            with pytest.raises((http.client.HTTPException, OSError)):
                idle.request("GET", "/health/live")
                idle.getresponse()
            assert not all(map(Future.done, asked))
            assert [one.result(timeout=60) for one in asked] == alone
        assert server.process.wait(timeout=20) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log()


def refuses(port: int) -> bool:
    """Whether no one is let in any more, within a few seconds."""
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_while_queued_leave_the_queue(server: Server, stream: bool) -> None:
    port = server.port
    running = connected(port, "I wander.", stream=True, **LONG)
    assert running.recv(12) == b"HTTP/1.1 200"
    queued = [connected(port, f"I open door {number}.", stream=stream) for number in range(4)]
    assert until(port, "vllm:num_requests_waiting", 4) == 4
    for number, connection in enumerate(queued):
        reset(connection) if number % 2 else connection.close()
    assert until(port, "vllm:num_requests_waiting", 0) == 0
    assert figure(port, "vllm:num_requests_running") == 1
    reset(running)


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_connection_frees_its_place(server: Server, stream: bool) -> None:
    """The client sends no more and goes on listening, or has gone: nobody can tell, and it costs one place at most."""
    half = connected(server.port, "I wander.", stream=stream, **LONG)
    assert until(server.port, "vllm:num_requests_running", 1) == 1
    half.shutdown(socket.SHUT_WR)
    assert busy(server.port) == 0
    half.close()


def test_silent_connections_keep_nobody_waiting(server: Server) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(200)]
    for number, connection in enumerate(silent):
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"[: number % 45])
    assert ask(server.port, "I look up.") != ""
    for connection in silent:
        connection.close()


def test_a_slow_reader_gets_it_all_and_holds_nobody_up(server: Server) -> None:
    """Its answer is far larger than what lies on the way: the server must hold the rest, and go on."""
    wishes: dict[str, Any] = {**LONG, "stream": True, "max_tokens": 250, "logprobs": True, "top_logprobs": 20}
    whole = ask(server.port, "I wander.", **wishes)
    slow = connected_with_little_room(server.port, "I wander.", **wishes)
    assert until(server.port, "vllm:num_requests_running", 1) == 1
    assert ask(server.port, "I look up.") != ""
    assert busy(server.port) == 0
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        piece = slow.recv(65536)
        assert piece, "the stream was cut"
        received += piece
        time.sleep(0.001)
    slow.close()
    assert len(received) > 400_000
    events = [line.removeprefix(b"data: ") for line in received.split(b"\n") if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole


def connected_with_little_room(port: int, question: str, **wishes: Any) -> socket.socket:
    """The same with a small buffer for what comes."""
    content = json.dumps(body(question, **wishes)).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection
