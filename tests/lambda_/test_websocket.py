"""Conversations over a WebSocket API, in the emulator, on the real model."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lambda_ import events
from tests.lambda_.emulator import Function, emulated
from tests.lambda_.management import Management, Posted
from tests.serving.loading import held_up
from tests.serving.server import LONG, call, serving, wait_until_ready

STORY = "I walk through the Emerald City gates and look up"
LIKENESS = "Could you tell me who the Wizard is, please?"
KEY = "a-key-of-the-tests"
ENDS = ("ready", "done", "error")


@pytest.fixture(scope="module")
def http_port(embedded_build: Path) -> Iterator[int]:
    """The HTTP server, for what it answers to the same."""
    with serving(embedded_build) as server:
        wait_until_ready(server.port)
        yield server.port


def asked(function: Function, management: Management, event: events.Event, status: int = 200) -> list[dict[str, Any]]:
    """The frames that an event brings, numbered without a gap and ended by the last one alone."""
    connection = event["requestContext"]["connectionId"]
    before = len(management.frames[connection])
    assert function.invoke(event)["statusCode"] == status
    frames = management.received(connection)[before:]
    assert [frame["seq"] for frame in frames] == list(range(len(frames)))
    assert len({frame["request"] for frame in frames}) <= 1
    if status == 200:
        assert [frame["type"] in ENDS for frame in frames] == [False] * (len(frames) - 1) + [True]
    return frames


def text_of(frames: list[dict[str, Any]]) -> str:
    chunks = [frame["data"] for frame in frames if frame["type"] == "chunk"]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def answered(port: int, question: str, **fields: Any) -> Any:
    body = json.loads(events.chat("any", question, **fields)["body"])["body"]
    status, _, text = call(port, "POST", "/v1/chat/completions", body)
    return status, json.loads(text)


def tokens_logged(function: Function, connection: str) -> int:
    """How many tokens the connection's last reply had, by the log."""
    found = re.findall(rf"connection {connection}: \w+ after (\d+) tokens", function.log())
    return int(found[-1])


def test_a_conversation(embedded_build: Path, management: Management, http_port: int, tmp_path: Path) -> None:
    """A cold function from its first connection on: prologue, ready answer, generated answer, a client that leaves."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with (
        held_up(embedded_build, tmp_path) as load,
        emulated(tmp_path, management.url, EMERALD_API_KEYS=digest) as function,
    ):
        at = "cold"
        refused = events.websocket("$connect", at, headers={"Authorization": "Bearer another"})
        assert function.invoke(refused)["statusCode"] == 401
        welcome = events.websocket("$connect", at, headers={"Authorization": f"Bearer {KEY}"})
        assert function.invoke(welcome) == {"statusCode": 200}
        assert management.posts[at] == 0, "API Gateway takes no posts before $connect has been answered"

        management.behaviours[at] = at_loading(load)
        frames = asked(function, management, events.prologue(at))
        kinds = [frame["type"] for frame in frames]
        scenes = frames[0]["scenes"]
        assert kinds[: scenes + 1] == ["prologue", *["scene"] * scenes]
        assert set(kinds[scenes + 1 : -1]) == {"loading"}
        assert kinds[-1] == "ready"
        progress = [frame["progress"] for frame in frames if frame["type"] == "loading"]
        assert progress == sorted(progress)
        assert "shapes" not in json.dumps(frames), "what a choice tells the model stays with the server"

        frames = asked(function, management, events.chat(at, "Who is the Wizard?"))
        assert (frames[0]["type"], frames[0]["source"], frames[0]["entry"]) == ("origin", "cache", "who-is-the-wizard")
        assert text_of(frames) == answered(http_port, "Who is the Wizard?")[1]["choices"][0]["message"]["content"]

        frames = asked(function, management, events.chat(at, STORY))
        assert (frames[0]["source"], frames[0]["dropped_turns"]) == ("model", 0)
        assert text_of(frames) == answered(http_port, STORY)[1]["choices"][0]["message"]["content"] != ""
        assert (frames[-1]["usage"]["completion_tokens"], frames[-2]["data"]["choices"][0]["finish_reason"]) == (
            24,
            "length",
        )
        assert frames[-1]["usage"]["energy"]["cpu_seconds"] > 0

        management.behaviours[at] = gone_after_two_chunks()
        frames = asked(function, management, events.chat(at, STORY, name="cut", **LONG), status=410)
        assert [frame["type"] for frame in frames] == ["origin", "chunk", "chunk"]
        assert management.posts[at] == len(management.frames[at]) + 1, "nothing is posted after the 410"
        assert tokens_logged(function, at) < 200
        figures = function.invoke(events.http("GET", "/metrics", authorization=f"Bearer {KEY}"))["body"]
        assert "vllm:num_requests_running 0.0" in figures, "its place is free when the invocation ends"
        assert function.invoke(events.websocket("$disconnect", at)) == {"statusCode": 200}

        assert text_of(asked(function, management, events.chat("next", STORY)))


def at_loading(act: Callable[[], None]) -> Callable[[Posted], int]:
    def behave(posted: Posted) -> int:
        if posted.content["type"] == "loading":
            act()
        return 200

    return behave


def slow(_: Posted) -> int:
    time.sleep(0.7)
    return 200


def gone_after_two_chunks() -> Any:
    chunks = 0

    def behave(posted: Posted) -> int:
        nonlocal chunks
        chunks += posted.content["type"] == "chunk"
        return 410 if chunks > 2 else 200

    return behave


def test_an_answer_by_likeness_names_its_certificate_and_no_similarity(
    function: Function, management: Management, embedded_build: Path
) -> None:
    sealed = json.loads((embedded_build / "certificate.json").read_text())
    origin = asked(function, management, events.chat("likeness", LIKENESS))[0]
    assert origin == {
        "type": "origin",
        "request": "q",
        "seq": 0,
        "source": "cache",
        "entry": "who-is-the-wizard",
        "tier": "semantic",
        "certificate": sealed["seal"],
        "false_hit_bound": round(sealed["false_hits"]["upper"], 4),
    }


def test_choices_of_the_prologue_shape_the_prompt(function: Function, management: Management) -> None:
    question = "I step closer and open my bag."
    plain = asked(function, management, events.chat("choices", question))
    chosen = {"cache": False, "choices": {"road": "lantern", "wall": "bell"}}
    shaped = asked(function, management, events.chat("choices", question, emerald=chosen))
    assert shaped[-1]["usage"]["prompt_tokens"] > plain[-1]["usage"]["prompt_tokens"]
    assert shaped[0]["miss"] == "the cache was bypassed"


def test_browsers_bring_their_key_as_a_subprotocol(embedded_build: Path, management: Management) -> None:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    with emulated(embedded_build, management.url, EMERALD_API_KEYS=digest) as function:

        def status(**headers: Any) -> Any:
            return function.invoke(events.websocket("$connect", "browser", **headers))

        right, wrong = f"emerald, emerald.key.{KEY}", "emerald, emerald.key.guess"
        assert status(headers={"Sec-WebSocket-Protocol": right}) == {
            "statusCode": 200,
            "headers": {"Sec-WebSocket-Protocol": "emerald"},
        }
        assert status(multiValueHeaders={"sec-websocket-protocol": right.split(", ")})["statusCode"] == 200
        for refused in (wrong, "emerald", "emerald.key.", "", f"emerald.key.{digest}"):
            assert status(headers={"Sec-WebSocket-Protocol": refused})["statusCode"] == 401
        assert status(headers={"Authorization": f"Bearer {KEY}\u20ac"})["statusCode"] == 401
        assert status(headers=None)["statusCode"] == 401
        assert status(queryStringParameters={"key": KEY})["statusCode"] == 401, "addresses end up in logs"


def test_posts_that_are_refused_for_now_are_repeated(
    function: Function, management: Management, http_port: int
) -> None:
    refused = {1: 429, 3: 500, 5: 503}
    management.behaviours["busy"] = lambda posted: refused.get(posted.number, 200)
    frames = asked(function, management, events.chat("busy", STORY))
    assert text_of(frames) == answered(http_port, STORY)[1]["choices"][0]["message"]["content"]
    assert management.posts["busy"] == len(frames) + len(refused)


@pytest.mark.parametrize("status", [500, 403])
def test_a_connection_that_takes_nothing_is_given_up(function: Function, management: Management, status: int) -> None:
    at = f"broken-{status}"
    management.behaviours[at] = lambda posted: 200 if posted.content["type"] == "origin" else status
    frames = asked(function, management, events.chat(at, STORY, **LONG), status=502)
    assert [frame["type"] for frame in frames] == ["origin"]
    assert text_of(asked(function, management, events.chat("after", STORY)))


def test_a_slow_connection_gets_fewer_and_fuller_frames(
    function: Function, management: Management, http_port: int
) -> None:
    management.behaviours["slow"] = slow
    frames = asked(function, management, events.chat("slow", STORY, max_tokens=60))
    whole = answered(http_port, STORY, max_tokens=60)[1]
    assert text_of(frames) == whole["choices"][0]["message"]["content"]
    assert len(frames) < whole["usage"]["completion_tokens"]


def test_frames_stay_below_the_limit_with_every_probability(function: Function, management: Management) -> None:
    """The endpoint refuses frames above 32 KB, as API Gateway does, and the fixture then fails."""
    management.behaviours["heavy"] = slow
    event = events.chat("heavy", STORY, max_tokens=60, logprobs=True, top_logprobs=20)
    frames = asked(function, management, event)
    chunks = [frame["data"]["choices"][0] for frame in frames if frame["type"] == "chunk"]
    known = [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"]["content"]]
    assert len(known) == frames[-1]["usage"]["completion_tokens"]
    assert "".join(one["token"] for one in known) == text_of(frames)


def test_a_reply_ends_with_its_time(embedded_build: Path, management: Management) -> None:
    with emulated(embedded_build, management.url, EMERALD_REPLY_SECONDS="0.5") as function:
        frames: list[dict[str, Any]] = []
        for attempt in range(100):  # while the model loads, that time ends with an error
            frames = asked(function, management, events.chat(f"hurry-{attempt}", STORY, **LONG))
            if frames[-1]["type"] == "done":
                break
            assert (frames[-1]["status"], frames[-1]["retry_after"] > 0) == (503, True)
            assert frames[-1]["error"]["type"] == "overloaded_error"
        assert frames[-2]["data"]["choices"][0]["finish_reason"] == "length"
        assert frames[-1]["usage"]["completion_tokens"] < LONG["max_tokens"]


def test_a_model_that_cannot_load_is_said_without_a_path(
    embedded_build: Path, management: Management, tmp_path: Path
) -> None:
    for name in ("embedder", "cache", "certificate.json"):
        (tmp_path / name).symlink_to(embedded_build / name)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/manifest.json").write_text("{}")
    with emulated(tmp_path, management.url) as function:
        frames = asked(function, management, events.prologue("damaged"))
        assert frames[0]["type"] == "prologue"
        assert (frames[-1]["status"], frames[-1]["error"]["type"]) == (503, "overloaded_error")
        assert "retry_after" not in frames[-1]
        assert str(tmp_path) not in json.dumps(frames)
        assert asked(function, management, events.chat("damaged", "Who is the Wizard?"))[0]["source"] == "cache"
        assert str(tmp_path) in function.log()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"tools": []},
        {"max_tokens": 100_000},
        {"n": 2},
        {"messages": []},
        {"messages": [{"role": "system", "content": "obey"}]},
        {"messages": [{"role": "user", "content": "wizard " * 9000}]},
        {"messages": [{"role": "user", "content": "half \ud800"}]},
        {"emerald": {"choices": {"road": "sword"}}},
        {"model": "another"},
        {"a-field-\ud800": 1},
    ],
)
def test_bad_requests_get_the_error_that_http_gives(
    function: Function, management: Management, http_port: int, fields: dict[str, Any]
) -> None:
    (frame,) = asked(function, management, events.chat("bad", STORY, **fields))
    status, answer = answered(http_port, STORY, **fields)
    assert (frame["status"], frame["error"]) == (status, answer["error"])


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("{", "JSON object"),
        ("", "JSON object"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ("[" * 60_000, "JSON object"),
        ({}, "action"),
        ({"action": "sing"}, "action"),
        ({"action": ["chat"]}, "action"),
        ({"action": "chat"}, "body"),
        ({"action": "chat", "body": []}, "body"),
        ({"action": "prologue", "body": {}}, "body"),
        ({"action": "chat", "body": {}, "extra": 1}, "extra"),
        ({"action": "chat", "body": {}, "x" * 100_000: 1}, "xxx"),
        ({"action": "chat", "body": {"x" * 100_000: 1}}, "messages"),
        ({"action": "chat", "id": "", "body": {}}, "id"),
        ({"action": "chat", "id": "n" * 65, "body": {}}, "id"),
        ({"action": "chat", "id": 7, "body": {}}, "id"),
        ({"action": "chat", "body": {"messages": [{"role": "user", "content": "hi"}], "stream": False}}, "stream"),
    ],
)
def test_messages_that_are_none_get_an_error(
    function: Function, management: Management, message: object, names: str
) -> None:
    (frame,) = asked(function, management, events.websocket("$default", "none", message, invocation="Event"))
    assert (frame["type"], frame["status"]) == ("error", 400)
    assert names in frame["error"]["message"]
    assert frame["request"] == "request-of-none"


def test_the_log_holds_no_prompt(function: Function, management: Management) -> None:
    secret = "my grandmother's maiden name"
    asked(function, management, events.chat("secret", f"I whisper {secret}", max_tokens=1))
    assert "characters, SHA-256" in function.log()
    assert secret not in function.log()
