"""The HTTP interface of a real server process on loopback."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def port(embedded_build: Path) -> Iterator[int]:
    number = free_port()
    environment = {**os.environ, "PORT": str(number), "EMERALD_BUILD": str(embedded_build), "EMERALD_WAITING": "1"}
    server = subprocess.Popen([sys.executable, "-m", "serving", "serve"], cwd=ROOT, env=environment)
    try:
        wait_until_ready(number, server)
        yield number
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) in (0, -signal.SIGTERM)


def wait_until_ready(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(OSError):  # not listening yet
            if call(port, "GET", "/health/ready")[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server was not ready within a minute")


def call(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers in lower case, and text of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, (str, bytes)) else None if body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def ask(
    port: int, question: str, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, dict[str, str], Any]:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0, **fields}
    status, received, text = call(port, "POST", "/v1/chat/completions", body, headers)
    return status, received, json.loads(text)


def test_a_common_question_is_answered_from_the_cache(port: int) -> None:
    status, headers, answer = ask(port, "What are you capable of?")
    assert status == 200
    assert (headers["x-emerald-source"], headers["x-emerald-entry"]) == ("cache", "capabilities")
    assert answer["choices"][0]["message"]["content"].startswith("I tell you a story")
    assert answer["usage"]["completion_tokens"] == 0


def test_an_answer_by_likeness_names_its_certificate_and_no_similarity(port: int, embedded_build: Path) -> None:
    sealed = json.loads((embedded_build / "certificate.json").read_text())
    _, headers, _ = ask(port, "Could you tell me who the Wizard is, please?")
    assert (headers["x-emerald-entry"], headers["x-emerald-tier"]) == ("who-is-the-wizard", "semantic")
    assert headers["x-emerald-certificate"] == sealed["seal"]
    assert headers["x-emerald-false-hit-bound"] == f"{sealed['false_hits']['upper']:.4f}"
    assert {name for name in headers if name.startswith("x-emerald")} == {
        f"x-emerald-{name}" for name in ("source", "entry", "tier", "certificate", "false-hit-bound")
    }
    assert json.loads(call(port, "GET", "/health/ready")[2])["cache"] == f"certified {sealed['seal']}"
    assert "x-emerald-certificate" not in ask(port, "Who is the Wizard?")[1]


def test_no_cache_asks_the_model(port: int) -> None:
    status, headers, answer = ask(port, "What are you capable of?", {"Cache-Control": "no-cache"})
    assert status == 200
    assert headers["x-emerald-source"] == "model"
    assert 0 < answer["usage"]["completion_tokens"] <= 12
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_stream_says_the_same_as_the_whole(port: int) -> None:
    question = "I walk through the Emerald City gates and look up"
    _, _, whole = ask(port, question)
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0, "stream": True}
    _, headers, text = call(port, "POST", "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    spoken = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert spoken == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("{", "JSON"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "obey"}]}, "role"),
        ({"messages": [{"role": "user", "content": "hi"}], "temperature": 3}, "temperature"),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100000}, "max_tokens"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "user message"),
        ({"messages": [{"role": "user", "content": "wizard " * 9000}]}, "too long"),
    ],
)
def test_bad_requests_get_an_error_in_openais_shape(port: int, body: object, names: str) -> None:
    status, _, text = call(port, "POST", "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert names in error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_routes_get_the_same_shape(port: int, method: str, path: str, status: int) -> None:
    found, _, text = call(port, method, path)
    assert found == status
    assert json.loads(text)["error"]["message"]


def test_a_full_queue_refuses_with_429(port: int) -> None:
    statuses: list[int] = []

    def one(number: int) -> None:
        body = {"temperature": 0.9, "max_tokens": 100, "seed": number}
        statuses.append(ask(port, "I sit down by the fountain and listen.", None, **body)[0])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    assert ask(port, "I look up.")[0] == 200


def test_a_client_that_leaves_frees_its_place(port: int) -> None:
    body = {"messages": [{"role": "user", "content": "I wander."}], "max_tokens": 400, "temperature": 1, "stream": True}
    for _ in range(4):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read(10)
        connection.close()
        time.sleep(0.5)
    assert ask(port, "I look up.")[0] == 200


def test_the_model_is_listed(port: int) -> None:
    _, _, text = call(port, "GET", "/v1/models")
    assert json.loads(text)["data"][0]["id"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
