"""The HTTP interface of a real server process on loopback."""

import base64
import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.serving.loading import held_up
from tests.serving.server import LONG, call, figure, serving, wait_until_ready

ROLES = ("user", "assistant")
ENERGY = ("cpu-seconds", "joules", "grams-co2e", "energy-source")


@pytest.fixture(scope="module")
def port(embedded_build: Path) -> Iterator[int]:
    limits = {"EMERALD_WAITING": "1", "EMERALD_RUNNING": "1", "EMERALD_BODY_BYTES": "200000"}
    with serving(embedded_build, **limits) as server:
        wait_until_ready(server.port)
        yield server.port
        assert server.stop() in (0, -signal.SIGTERM)


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
        f"x-emerald-{name}" for name in ("source", "entry", "tier", "certificate", "false-hit-bound", *ENERGY)
    }
    assert json.loads(call(port, "GET", "/health/ready")[2])["cache"] == f"certified {sealed['seal']}"
    assert "x-emerald-certificate" not in ask(port, "Who is the Wizard?")[1]


def test_no_cache_asks_the_model(port: int) -> None:
    status, headers, answer = ask(port, "What are you capable of?", {"Cache-Control": "no-cache"})
    assert status == 200
    assert headers["x-emerald-source"] == "model"
    assert 0 < answer["usage"]["completion_tokens"] <= 12
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_persona_speaks_with_its_own_sampling_unless_a_client_says_otherwise(port: int) -> None:
    persona = yaml.safe_load((ROOT / "cache_data/persona.yaml").read_text(encoding="utf-8"))
    own = persona["sampling"][json.loads(call(port, "GET", "/v1/models")[2])["data"][0]["id"]]
    wishes = {"max_tokens": 60, "seed": 3, "temperature": None}

    def told(**fields: Any) -> str:
        answer = ask(port, "I wander through the market.", **{**wishes, **fields})[2]
        return str(answer["choices"][0]["message"]["content"])

    plain = {"temperature": 0.7, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1}
    assert told() == told(**own)
    assert told(temperature=own["temperature"]) == told(), "one that is given leaves the others as they are"
    assert told(**plain) != told()
    text = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 3}  # no persona speaks
    of = [json.loads(call(port, "POST", "/v1/completions", {**text, **more})[2])["choices"] for more in ({}, plain)]
    assert of[0] == of[1]


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
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][count] == whole["usage"][count]
    assert chunks[-1]["usage"]["energy"]["cpu_seconds"] > 0
    assert chunks[-1]["timings"]["tokens_per_second"] > 0


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
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 2}, "logprobs"),
        ({"messages": [{"role": "user", "content": "hi"}], "n": 2}, "n"),
        ({"messages": [{"role": "user", "content": "hi"}], "stop": "x" * 501}, "stop"),
        ({"messages": [{"role": "user", "content": "hi"}], "stop": ["x", "y" * 501]}, "stop"),
        ({"messages": [{"role": "user", "content": "hi"}], "emerald": {"choices": {"road": "sword"}}}, "sword"),
        ({"messages": [{"role": "user", "content": "hi"}], "emerald": {"choices": {"sea": "ship"}}}, "sea"),
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
    body = {"messages": [{"role": "user", "content": "I wander."}], **LONG, "stream": True}
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


def test_a_follow_up_is_not_answered_from_the_cache(port: int) -> None:
    earlier = [{"role": "user", "content": "I walk on."}, {"role": "assistant", "content": "You meet the Wizard."}]

    def source(question: str) -> str:
        body = {"messages": [*earlier, {"role": "user", "content": question}], "max_tokens": 2}
        return call(port, "POST", "/v1/chat/completions", body)[1]["x-emerald-source"]

    assert source("What are you capable of?") == "cache"
    assert source("And who is he?") == "model"


def test_choices_of_the_prologue_shape_the_prompt(port: int) -> None:
    def asked(**fields: Any) -> dict[str, Any]:
        answer: dict[str, Any] = ask(port, "I step closer and open my bag.", **fields)[2]
        return answer

    plain = asked()
    shaped = asked(emerald={"choices": {"road": "lantern", "wall": "bell"}})
    assert shaped["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    scenes = json.loads(call(port, "GET", "/prologue")[2])["prologue"]["scenes"]
    assert [scene["id"] for scene in scenes][:2] == ["road", "companion"]
    assert all("shapes" not in option for scene in scenes for option in scene.get("choices", ()))


def test_a_field_bypasses_the_cache(port: int) -> None:
    _, headers, _ = ask(port, "What are you capable of?", emerald={"cache": False})
    assert (headers["x-emerald-source"], headers["x-emerald-miss"]) == ("model", "the cache was bypassed")


def test_tokens_there_and_back(port: int) -> None:
    status, _, text = call(port, "POST", "/tokenize", {"prompt": "The green city <|im_end|>"})
    assert status == 200
    tokens = json.loads(text)["tokens"]
    _, _, text = call(port, "POST", "/detokenize", {"tokens": tokens})
    assert json.loads(text)["prompt"].replace("\N{WORD JOINER}", "") == "The green city <|im_end|>"
    assert call(port, "POST", "/detokenize", {"tokens": [10**9]})[0] == 400
    assert call(port, "POST", "/tokenize", {})[0] == 400


def test_tokens_of_a_conversation_are_those_of_its_usage(port: int) -> None:
    question = "I open the third door on the left."
    _, _, text = call(port, "POST", "/tokenize", {"messages": [{"role": "user", "content": question}]})
    assert json.loads(text)["count"] == ask(port, question)[2]["usage"]["prompt_tokens"]


def test_nobody_speaks_for_the_persona(port: int) -> None:
    system = [{"role": "system", "content": "obey"}, {"role": "user", "content": "hi"}]
    status, _, text = call(port, "POST", "/tokenize", {"messages": system})
    assert (status, "system prompt" in text) == (400, True)
    for prompt in ([1, 9690, 198], [504, 2, 28]):
        status, _, text = call(port, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert (status, "is special" in json.loads(text)["error"]["message"]) == (400, True)
    assert call(port, "POST", "/v1/completions", {"prompt": [504, 28], "max_tokens": 1})[0] == 200


def test_null_is_the_default(port: int) -> None:
    assert ask(port, "Who is Toto?", n=None, stream=None, logprobs=None)[0] == 200
    body = {"prompt": "Once", "max_tokens": 1, "echo": None, "n": None, "stream": None}
    assert call(port, "POST", "/v1/completions", body)[0] == 200


def test_what_is_far_too_long_is_no_question(port: int) -> None:
    _, headers, _ = ask(port, "Who is Toto" + "-" * 4500)
    assert headers["x-emerald-miss"] == "it is longer than 500 characters"
    assert ask(port, "Who is Toto" + "-" * 400)[1]["x-emerald-source"] == "cache"


def test_the_latest_turns_that_fit_are_read(port: int) -> None:
    turns = [{"role": role, "content": f"{number} " + "wizard " * 300} for number in range(12) for role in ROLES]
    body = {"messages": [*turns, {"role": "user", "content": "I look up."}], "max_tokens": 2}
    status, headers, text = call(port, "POST", "/v1/chat/completions", body)
    dropped = int(headers["x-emerald-dropped-turns"])
    assert (status, dropped % 2) == (200, 0)
    assert 0 < dropped < 24
    _, _, fewer = call(port, "POST", "/tokenize", {"messages": body["messages"][dropped:]})  # type: ignore[index]
    _, _, more = call(port, "POST", "/tokenize", {"messages": body["messages"][dropped - 2 :]})  # type: ignore[index]
    assert json.loads(fewer)["count"] == json.loads(text)["usage"]["prompt_tokens"]
    assert json.loads(more)["count"] > json.loads(text)["usage"]["prompt_tokens"] + 300
    assert json.loads(more)["count"] > json.loads(more)["max_model_len"] - 2


def test_a_streams_offsets_go_on_and_its_end_is_counted(port: int) -> None:
    def counted() -> float:
        return figure(port, 'vllm:request_success_total{finished_reason="length"}')

    before = counted()
    body = {"prompt": "Once upon a", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    whole = json.loads(call(port, "POST", "/v1/completions", body)[2])["choices"][0]["logprobs"]
    assert counted() == before + 1
    _, _, text = call(port, "POST", "/v1/completions", {**body, "stream": True})
    chunks = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    known = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for one in known if one for offset in one["text_offset"]] == whole["text_offset"]
    assert counted() == before + 2


def test_files_are_sent_whole_whatever_range_is_asked_for(port: int) -> None:
    for path in ("/", "/web/app.js"):
        for asked in ("bytes=9999999-", "nonsense", "bytes=0-3"):
            assert call(port, "GET", path, headers={"Range": asked})[0] == 200


def test_metrics_carry_known_names_and_count(port: int) -> None:
    before = figure(port, "vllm:generation_tokens_total"), figure(port, 'emerald_cache_lookups_total{result="exact"}')
    ask(port, "I look up.")
    ask(port, "Who is the Wizard?")
    after = figure(port, "vllm:generation_tokens_total"), figure(port, 'emerald_cache_lookups_total{result="exact"}')
    assert after[0] > before[0]
    assert after[1] == before[1] + 1
    assert figure(port, "vllm:num_requests_running") == 0
    assert figure(port, "emerald_load_progress") == 1
    assert 0 < figure(port, "emerald_certificate_false_hit_bound") <= 0.02


def test_the_page_and_its_policy(port: int) -> None:
    for path in ("/", "/docs", "/openapi.json"):
        status, headers, _ = call(port, "GET", path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in call(port, "GET", "/", headers={"Origin": "https://example.org"})[1]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "text/plain"}, "{}", 415),
        ({}, json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}]}), 413),
    ],
)
def test_what_the_door_refuses(port: int, headers: dict[str, str], body: str, status: int) -> None:
    found, _, text = call(port, "POST", "/v1/chat/completions", body, headers)
    assert found == status
    assert json.loads(text)["error"]["type"] == "invalid_request_error"


def test_log_holds_no_prompt(embedded_build: Path) -> None:
    secret = "my grandmother's maiden name"
    with serving(embedded_build) as server:
        wait_until_ready(server.port)
        ask(server.port, f"I whisper {secret}")
        logged = server.log()
    assert "characters, SHA-256" in logged
    assert secret not in logged


def test_keys_guard_every_route_but_health(embedded_build: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serving", "key"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    key, digest = made.stdout.strip(), made.stderr.strip().partition("=")[2]
    origin = "https://example.org"
    with serving(
        embedded_build,
        EMERALD_API_KEYS=digest,
        EMERALD_CORS_ORIGINS=origin,
        EMERALD_SYSTEM_PROMPT="true",
    ) as server:
        port = server.port
        wait_until_ready(port)
        for path in ("/", "/metrics", "/docs", "/openapi.json", "/v1/models", "/prologue", "/web/docs.js", "/nowhere"):
            status, headers, text = call(port, "GET", path)
            assert (status, json.loads(text)["error"]["type"]) == (401, "authentication_error"), path
            assert headers["www-authenticate"].startswith("Basic")
            assert call(port, "GET", path, headers={"Authorization": f"Bearer {key}x"})[0] == 401
        basic = base64.b64encode(f"anyone:{key}".encode()).decode()
        for authorization in (f"Bearer {key}", f"Basic {basic}"):
            assert call(port, "GET", "/v1/models", headers={"Authorization": authorization})[0] == 200
        assert call(port, "GET", "/v1/models", headers={"Authorization": "Basic ***"})[0] == 401
        assert call(port, "GET", "/v1/models", headers={"Authorization": f"Bearer {digest}"})[0] == 401
        _, allowed, _ = call(port, "GET", "/health/live", headers={"Origin": origin})
        assert allowed["access-control-allow-origin"] == origin
        assert (
            "access-control-allow-origin"
            not in call(port, "GET", "/health/live", headers={"Origin": "https://example.com"})[1]
        )
        system = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What are you?"}]
        body = {"messages": system, "max_tokens": 3}
        status, headers, _ = call(port, "POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})
        assert (status, headers["x-emerald-source"]) == (200, "model")


def test_ready_answers_come_while_the_model_loads(embedded_build: Path, tmp_path: Path) -> None:
    with held_up(embedded_build, tmp_path), serving(tmp_path) as server:
        port = server.port
        for _ in range(200):
            with contextlib.suppress(OSError):
                if call(port, "GET", "/prologue")[0] == 200:
                    break
            time.sleep(0.1)
        status, _, text = call(port, "GET", "/health/ready")
        assert (status, json.loads(text)["status"]) == (503, "loading")
        assert ask(port, "What are you capable of?")[1]["x-emerald-source"] == "cache"
        status, headers, answer = ask(port, "I look up.")
        assert (status, headers["retry-after"], answer["error"]["type"]) == (503, "1", "overloaded_error")
        assert call(port, "POST", "/tokenize", {"prompt": "hi"})[0] == 503


def test_a_damaged_model_is_said_without_a_path(embedded_build: Path, tmp_path: Path) -> None:
    for name in ("embedder", "cache", "certificate.json"):
        (tmp_path / name).symlink_to(embedded_build / name)
    (tmp_path / "engine").mkdir()
    with serving(tmp_path) as server:
        port = server.port
        for _ in range(200):
            with contextlib.suppress(OSError):
                answer = json.loads(call(port, "GET", "/health/ready")[2])
                if answer["status"] != "loading":
                    break
            time.sleep(0.1)
        assert answer["status"] == "the model cannot be loaded; the server's log says why"
        assert ask(port, "I look up.")[0] == 503
        assert "manifest.json" in server.log()
    assert str(tmp_path) not in answer["status"]


def test_a_cache_that_does_not_load_is_the_servers_fault_and_said_without_a_path(
    embedded_build: Path, tmp_path: Path
) -> None:
    for name in ("engine", "cache", "certificate.json"):
        (tmp_path / name).symlink_to(embedded_build / name)
    embedder = tmp_path / "embedder"
    embedder.mkdir()
    for file in (embedded_build / "embedder").iterdir():
        (embedder / file.name).symlink_to(file)
    (embedder / "program.so").unlink()
    with serving(tmp_path) as server:
        for _ in range(300):
            with contextlib.suppress(OSError):
                if json.loads(call(server.port, "GET", "/health/ready")[2])["status"] != "loading":
                    break
            time.sleep(0.1)
        status, _, answer = ask(server.port, "I look up.")
        assert (status, answer["error"]["message"]) == (503, "the model cannot be loaded; the server's log says why")
        assert ask(server.port, "Who is Toto?")[0] == 200


def test_why_there_is_no_certificate_stays_in_the_log(embedded_build: Path, tmp_path: Path) -> None:
    for name in ("embedder", "cache", "engine"):
        (tmp_path / name).symlink_to(embedded_build / name)
    with serving(tmp_path) as server:
        wait_until_ready(server.port)
        miss = ask(server.port, "Could you tell me who the Wizard is, please?")[1]["x-emerald-miss"]
        assert miss == "only exact matches answer: no certificate fits"
        assert str(tmp_path) in server.log()
