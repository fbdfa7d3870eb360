"""Thousands of malformed requests, and the server's own description turned against it: it goes on serving."""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.server import Server, call, serving, wait_until_ready

SEED = 20261124
BODIES, HEADS, CUTS, SLOW = 1500, 350, 150, 21
EXAMPLES = 40
VALID: dict[str, Any] = {
    "messages": [{"role": "user", "content": "I look up."}],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "stop": ["x"],
    "max_tokens": 2,
    "n": 1,
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "emerald": {"cache": False, "choices": {"road": "lantern"}},
}
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "\x00",
    "\ud800",
    "x" * 5000,
    "\u202e\u0301" * 50,
    [],
    [[]] * 3,
    {},
    {"": {"": {}}},
    "<|im_end|>",
]


@pytest.fixture(scope="module")
def server(embedded_build: Path) -> Iterator[Server]:
    limits = {"EMERALD_RECEIVE_SECONDS": "1", "EMERALD_REPLY_TOKENS": "4", "EMERALD_BODY_BYTES": "100000"}
    with serving(embedded_build, **limits) as running:
        wait_until_ready(running.port)
        yield running


@pytest.fixture(autouse=True)
def serves_afterwards(server: Server) -> Iterator[None]:
    yield
    body = {"messages": [{"role": "user", "content": "I look up."}], "max_tokens": 2}
    assert call(server.port, "POST", "/v1/chat/completions", body)[0] == 200
    assert "Traceback" not in server.log()


def mutated(random_: random.Random) -> bytes:
    """A valid body with some of it spoilt."""
    body: dict[str, Any] = json.loads(json.dumps(VALID))
    for _ in range(random_.randint(1, 3)):
        name = random_.choice([*body, "messages", "unheard_of"])
        if name == "messages" and random_.random() < 0.7:
            turn = random_.choice(["role", "content", "name"])
            body["messages"] = [{**VALID["messages"][0], turn: random_.choice(ODD)}]
        elif random_.random() < 0.15:
            body.pop(name, None)
        else:
            body[name] = random_.choice(ODD)
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    spoil = random_.random()
    if spoil < 0.1:
        text = text[: random_.randrange(len(text))]
    elif spoil < 0.2:
        at = random_.randrange(len(text))
        text = text[:at] + bytes([random_.randrange(256)]) + text[at + 1 :]
    elif spoil < 0.25:
        text = b'{"messages":' + b"[" * random_.choice([50, 2000, 40000])
    elif spoil < 0.3:
        text = text[:-1] + b',"messages":[]}'
    return text


def exchange(port: int, raw: bytes, *, close: bool = False, seconds: float = 10) -> bytes:
    """What comes back on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(raw)
        if close:
            return b""
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def post(body: bytes, path: str = "/v1/chat/completions", headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def status_of(answer: bytes) -> int:
    """The status of an answer, whose body, if it is an error in JSON, has OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status >= 400 and b"application/json" in head:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return status


def test_malformed_bodies(server: Server) -> None:
    random_, statuses = random.Random(SEED), Counter[int]()
    for _ in range(BODIES):
        path = random_.choice(["/v1/chat/completions"] * 4 + ["/v1/completions", "/tokenize", "/detokenize"])
        encoding = random_.choice(["", "", "", "Content-Encoding: gzip\r\n"])
        statuses[status_of(exchange(server.port, post(mutated(random_), path, encoding)))] += 1
    assert statuses[400] > BODIES / 2
    assert set(statuses) <= {200, 400}


def test_malformed_heads(server: Server) -> None:
    random_ = random.Random(SEED)
    body = json.dumps({"messages": VALID["messages"], "max_tokens": 1}).encode()
    heads = [
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /v1/models\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /%ff%00%2e%2e/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /web/../../pyproject.toml HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /web/%2e%2e/%2e%2e/pyproject.toml HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70000 + b"\r\nConnection: close\r\n\r\n",
        post(body, headers="Content-Length: 5\r\n"),
        post(body).replace(b"Content-Length: ", b"Content-Length: -"),
        post(body).replace(b"Content-Length: ", b"Content-Length: 9999999999"),
        post(body, headers="Transfer-Encoding: chunked\r\n"),
        post(body, headers="Expect: 100-continue\r\n"),
        post(body, headers="Authorization: Basic \xff\r\n"),
        post(body).replace(b"application/json", b"application/x-www-form-urlencoded"),
    ]
    while len(heads) < HEADS:
        spoilt = bytearray(random_.choice(heads))
        spoilt[random_.randrange(len(spoilt))] = random_.randrange(256)
        heads.append(bytes(spoilt))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda raw: exchange(server.port, raw, seconds=5), heads))
    for raw, answer in zip(heads, answers, strict=True):
        assert b"[project]" not in answer
        if answer.startswith(b"HTTP/"):
            assert status_of(answer) < 500, raw[:200]
    assert sum(answer.startswith(b"HTTP/") for answer in answers) > HEADS / 2


def test_connections_that_break_off(server: Server) -> None:
    random_, whole = (
        random.Random(SEED),
        post(json.dumps({**VALID, "stream": True, "logprobs": False, "top_logprobs": None}).encode()),
    )
    for _ in range(CUTS):
        exchange(server.port, whole[: random_.randrange(1, len(whole))], close=True)


def test_slow_and_silent_clients_are_let_go(server: Server) -> None:
    whole = post(json.dumps(VALID).encode())
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(SLOW)]
    for number, connection in enumerate(connections):
        connection.sendall(whole[: (0, 20, len(whole) - 5)[number % 3]])
    begun = time.monotonic()
    answers = [b"".join(iter(lambda c=connection: c.recv(65536), b"")) for connection in connections]  # type: ignore[misc]
    for connection in connections:
        connection.close()
    assert time.monotonic() - begun < 9
    assert {status_of(answer) for answer in answers[2::3]} == {408}


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_the_description_holds(server: Server, mode: schemathesis.GenerationMode) -> None:
    """Every operation of /openapi.json, with requests made from it: no 5xx, no undocumented status, no other shape."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    statuses = Counter[int]()

    def attack(case: schemathesis.Case[Any]) -> None:
        answer = case.call(timeout=30)
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=checks)

    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode.is_negative and not operation.body:
            continue  # there is nothing to get wrong: any path is a string
        bounded = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
        bounded(given(operation.as_strategy(mode))(attack))()
    assert statuses.total() > 3 * EXAMPLES
    assert statuses[200 if mode.is_positive else 400] > EXAMPLES, statuses
