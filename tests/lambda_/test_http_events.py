"""Function URL, HTTP API and REST API events, and events that are none, in the emulator."""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lambda_ import events
from tests.lambda_.emulator import Function, emulated
from tests.lambda_.management import Management
from tests.serving.server import call, serving, wait_until_ready

STORY = {
    "messages": [{"role": "user", "content": "I walk through the Emerald City gates and look up"}],
    "temperature": 0,
    "max_tokens": 12,
}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def story(embedded_build: Path) -> str:
    """What the HTTP server goes on with."""
    with serving(embedded_build) as server:
        wait_until_ready(server.port)
        said: str = json.loads(call(server.port, "POST", CHAT, STORY)[2])["choices"][0]["message"]["content"]
        return said


@pytest.mark.parametrize(
    "event",
    [events.http("POST", CHAT, STORY), events.http("POST", CHAT, STORY, encode=True), events.rest("POST", CHAT, STORY)],
    ids=["payload 2.0", "in base64", "payload 1.0"],
)
def test_an_answer_is_that_of_the_http_server(function: Function, story: str, event: events.Event) -> None:
    answer = function.invoke(event)
    assert (answer["statusCode"], answer["isBase64Encoded"]) == (200, False)
    assert answer["headers"]["x-emerald-source"] == "model"
    assert answer["headers"]["x-content-type-options"] == "nosniff"
    assert json.loads(answer["body"])["choices"][0]["message"]["content"] == story


def test_a_stream_comes_in_one_piece_and_says_so(function: Function, story: str) -> None:
    answer = function.invoke(events.http("POST", CHAT, {**STORY, "stream": True}))
    assert answer["headers"]["x-emerald-stream"] == "in one piece"
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer["body"].splitlines()[:-2] if line]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == story
    assert answer["body"].endswith("data: [DONE]\n\n")


def test_a_ready_answer_has_its_headers(function: Function) -> None:
    body = {"messages": [{"role": "user", "content": "Could you tell me who the Wizard is, please?"}]}
    headers = function.invoke(events.http("POST", CHAT, body))["headers"]
    assert (headers["x-emerald-source"], headers["x-emerald-entry"]) == ("cache", "who-is-the-wizard")
    assert 0 < float(headers["x-emerald-false-hit-bound"]) <= 0.02


def test_the_page_comes_too(function: Function) -> None:
    page = function.invoke(events.http("GET", "/"))
    assert page["headers"]["content-type"].startswith("text/html")
    assert "<html" in page["body"]
    icon = function.invoke(events.http("GET", "/web/icon.svg"))
    assert (icon["statusCode"], icon["isBase64Encoded"]) == (200, True)
    assert json.loads(function.invoke(events.http("GET", "/prologue"))["body"])["prologue"]["scenes"]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (events.http("GET", "/nowhere"), 404),
        (events.http("GET", CHAT), 405),
        (events.http("POST", CHAT, "{"), 400),
        (events.http("POST", CHAT, STORY, content_type="text/plain"), 415),
        (events.http("POST", CHAT, {"messages": [{"role": "user", "content": "x" * 1_100_000}]}), 413),
        (events.rest("POST", CHAT, {"messages": []}), 400),
    ],
)
def test_errors_keep_openais_shape(function: Function, event: events.Event, status: int) -> None:
    answer = function.invoke(event)
    assert answer["statusCode"] == status
    assert json.loads(answer["body"])["error"]["message"]


def test_a_cold_function_answers_once_it_has_loaded(embedded_build: Path, management: Management) -> None:
    """It does not send the client away, for it would be frozen and load no further until the next request."""
    with emulated(embedded_build, management.url) as function:
        for _ in range(20):
            answer = function.invoke(events.http("GET", "/health/ready"))
            if answer["statusCode"] == 200:
                break
        progress = json.loads(answer["body"])
    assert (answer["statusCode"], progress["status"], progress["progress"]) == (200, "ready", 1.0)


def test_keys_guard_every_request_that_aws_has_not_checked(embedded_build: Path, management: Management) -> None:
    digest = hashlib.sha256(b"the-key").hexdigest()
    with emulated(embedded_build, management.url, EMERALD_API_KEYS=digest) as function:
        plain = events.http("GET", "/prologue")
        signed = copy.deepcopy(plain)
        signed["requestContext"]["authorizer"] = {"iam": {"accountId": "123456789012", "userId": "AIDAEXAMPLE"}}
        pretended = events.http("GET", "/prologue", authorizer="iam", authorization="AWS4-HMAC-SHA256 Credential=x")
        assert function.invoke(plain)["statusCode"] == 401
        assert function.invoke(pretended)["statusCode"] == 401
        assert function.invoke(events.http("GET", "/prologue", authorization="Bearer the-key"))["statusCode"] == 200
        assert function.invoke(signed)["statusCode"] == 200
        assert function.invoke(plain)["statusCode"] == 401, "a signed request opens the door for itself alone"


BAD: tuple[object, ...] = (None, 7, "x", [], {}, True, "\ud800", [None])


def damaged() -> Iterator[object]:
    """Every event with every field, at any depth, taken out or replaced by something else."""
    yield from (None, 7, "x", [], {}, [{}], {"requestContext": {}}, {"requestContext": None}, {"source": "aws.events"})
    for event in (
        events.http("POST", CHAT, "{", encode=True),
        events.rest("GET", "/health/live"),
        events.websocket("$connect", "damaged", headers={"Authorization": "Bearer x"}),
        events.websocket("$default", "damaged", "{", invocation="Event"),
    ):
        for path in paths(event):
            for value in (*BAD, "left out"):
                yield replaced(event, path, value)


def paths(content: object) -> Iterator[tuple[str, ...]]:
    for name, value in content.items() if isinstance(content, dict) else ():
        yield (name,)
        yield from ((name, *rest) for rest in paths(value))


def replaced(event: events.Event, path: tuple[str, ...], value: object) -> events.Event:
    changed: Any = copy.deepcopy(event)
    place = changed
    for name in path[:-1]:
        place = place[name]
    if value == "left out":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed  # type: ignore[no-any-return]


def test_damaged_events_get_an_answer_and_leave_it_serving(function: Function) -> None:
    started = function.log().count("INIT START")
    for event in damaged():
        answer = function.invoke(event)
        assert answer.get("statusCode") in (200, 400, 401, 404, 405, 415), (event, answer)
        if "body" in answer and answer["statusCode"] >= 400:
            assert json.loads(answer["body"])["error"]["message"], event
    assert function.log().count("INIT START") == started, "the process went on"
    assert function.invoke(events.http("GET", "/health/live"))["statusCode"] == 200
