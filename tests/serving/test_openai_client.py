"""OpenAI's own client, sync and async, against a real server: it must not notice whose server it is."""

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import (
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAI,
    RateLimitError,
)

from tests.conftest import ROOT
from tests.serving.server import LONG, Server, call, serving, wait_until_ready

STORY: Any = [{"role": "user", "content": "I walk through the gates and look up"}]
GREEDY: Any = {"model": "emerald", "messages": STORY, "temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def server(embedded_build: Path) -> Iterator[Server]:
    with serving(embedded_build) as running:
        wait_until_ready(running.port)
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_stream_and_whole_say_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert [choice.finish_reason for choice in chunks[-2].choices] == [whole.choices[0].finish_reason] == ["length"]
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 16
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_completions_go_on_with_plain_text(client: OpenAI) -> None:
    whole = client.completions.create(model="emerald", prompt="Once upon a", max_tokens=8, temperature=0)
    stream = client.completions.create(model="emerald", prompt="Once upon a", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text != ""
    tokens = call_tokens(client, "Once upon a")
    again = client.completions.create(model="emerald", prompt=tokens, max_tokens=8, temperature=0)
    assert again.choices[0].text == whole.choices[0].text


def call_tokens(client: OpenAI, text: str) -> list[int]:
    port = client.base_url.port
    assert port is not None
    status, _, body = call(port, "POST", "/tokenize", {"prompt": text})
    assert status == 200
    tokens: list[int] = json.loads(body)["tokens"]
    return tokens


def test_models_are_listed_and_named(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert client.chat.completions.create(**{**GREEDY, "model": model.id}).model == model.id
    with pytest.raises(NotFoundError, match="gpt-4"):
        client.chat.completions.create(**{**GREEDY, "model": "gpt-4"})
    with pytest.raises(NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_logprobs_are_those_of_a_distribution(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        **GREEDY, logprobs=True, top_logprobs=5, extra_body={"repetition_penalty": 1}
    )
    found = reply.choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) == 16
    for token in found.content:
        top = [one.logprob for one in token.top_logprobs]
        assert top == sorted(top, reverse=True) and len(top) == 5
        assert token.logprob == top[0] and token.token == token.top_logprobs[0].token
        assert sum(map(math.exp, top)) <= 1 + 1e-5
    spelt = b"".join(bytes(token.bytes or []) for token in found.content)
    assert spelt.decode() == reply.choices[0].message.content
    older = client.completions.create(model="emerald", prompt="Once upon a", max_tokens=4, temperature=0, logprobs=2)
    legacy = older.choices[0].logprobs
    assert legacy is not None and legacy.tokens is not None and legacy.text_offset is not None
    assert "".join(legacy.tokens) == older.choices[0].text
    assert legacy.text_offset == [len("".join(legacy.tokens[:at])) for at in range(4)]


def test_stop_ends_before_its_text(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY).choices[0].message.content or ""
    word = whole.split()[3]
    cut = client.chat.completions.create(**GREEDY, stop=[word])
    assert cut.choices[0].message.content == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_limits_and_penalties_are_honoured(client: OpenAI) -> None:
    def reply(seed: int | None, **wishes: Any) -> str:
        asked = {**GREEDY, "temperature": 1.2, "seed": seed, **wishes}
        return client.chat.completions.create(**asked).choices[0].message.content or ""

    assert reply(3) == reply(3) != reply(4)
    short = client.chat.completions.create(model="emerald", messages=STORY, max_completion_tokens=3)
    assert short.usage is not None and short.usage.completion_tokens == 3
    greedy = {**GREEDY, "max_tokens": 60}
    plain = client.chat.completions.create(**greedy).choices[0].message.content
    penalised = client.chat.completions.create(**greedy, frequency_penalty=2.0, presence_penalty=2.0)
    assert penalised.choices[0].message.content != plain
    repeated = client.chat.completions.create(**greedy, extra_body={"repetition_penalty": 2.0})
    assert repeated.choices[0].message.content != plain


@pytest.mark.parametrize("wish", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_a_choice_of_one_token_is_the_greedy_one_however_hot(client: OpenAI, wish: dict[str, Any]) -> None:
    hot = {**GREEDY, "temperature": 1.9, "seed": 3}
    greedy = client.chat.completions.create(**GREEDY, n=1).choices[0].message.content
    assert client.chat.completions.create(**hot, **wish).choices[0].message.content == greedy
    assert client.chat.completions.create(**hot).choices[0].message.content != greedy


def test_the_async_client_streams_and_counts_as_the_other_does(server: Server, client: OpenAI) -> None:
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    told = client.chat.completions.create(**GREEDY)
    gone_on = client.completions.create(model="emerald", prompt="Once upon a", max_tokens=8, temperature=0)

    async def streamed() -> tuple[str, int, str, int]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as own:
            chat = [chunk async for chunk in await own.chat.completions.create(**GREEDY, **usage)]
            asked: Any = {"model": "emerald", "prompt": "Once upon a", "max_tokens": 8, "temperature": 0}
            plain = [chunk async for chunk in await own.completions.create(**asked, **usage)]
        assert chat[-1].usage is not None and plain[-1].usage is not None
        return (
            "".join(choice.delta.content or "" for chunk in chat for choice in chunk.choices),
            chat[-1].usage.completion_tokens,
            "".join(choice.text for chunk in plain for choice in chunk.choices),
            plain[-1].usage.completion_tokens,
        )

    assert told.usage is not None and gone_on.usage is not None
    whole = (told.choices[0].message.content, told.usage.completion_tokens)
    assert asyncio.run(streamed()) == (*whole, gone_on.choices[0].text, gone_on.usage.completion_tokens)


def test_an_error_carries_openais_fields(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**{**GREEDY, "logit_bias": {"5": 1}})
    assert (refused.value.status_code, refused.value.type) == (400, "invalid_request_error")
    assert refused.value.param == "logit_bias"
    assert isinstance(refused.value.body, dict) and set(refused.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "wish",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"temperature": 7},
        {"modalities": ["audio"]},
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: OpenAI, wish: dict[str, Any]) -> None:
    (name,) = wish
    with pytest.raises(BadRequestError, match=name):
        client.chat.completions.create(**{**GREEDY, **wish})


def test_own_answers_may_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(**GREEDY).choices[0].message
    turns: Any = [*STORY, first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "I go on."}]}]
    second = client.chat.completions.create(model="emerald", messages=turns, max_tokens=4)
    assert second.choices[0].message.content


def test_many_at_once_say_what_each_says_alone(server: Server, client: OpenAI) -> None:
    messages = [[{"role": "user", "content": f"I open door number {number}."}] for number in range(8)]
    alone = [client.chat.completions.create(**{**GREEDY, "messages": one}).choices[0].message for one in messages]

    async def together() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as own:
            asked = [own.chat.completions.create(**{**GREEDY, "messages": one}) for one in messages]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == [message.content for message in alone]


def test_a_closed_stream_frees_its_place_sync_and_async(server: Server, client: OpenAI) -> None:
    asked = {**GREEDY, **LONG, "stream": True}
    stream = client.chat.completions.create(**asked)
    next(iter(stream))
    stream.close()

    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as own:
            coming = await own.chat.completions.create(**asked)
            await anext(aiter(coming))
            await coming.close()

    asyncio.run(leave())
    for _ in range(100):
        if "vllm:num_requests_running 0.0" in call(server.port, "GET", "/metrics")[2]:
            return
        time.sleep(0.05)
    raise AssertionError("a reply went on although its client had gone")


def test_a_full_server_says_when_to_come_back(embedded_build: Path) -> None:
    limits = {"EMERALD_RUNNING": "1", "EMERALD_WAITING": "0"}
    with serving(embedded_build, **limits) as server:
        wait_until_ready(server.port)
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(**{**GREEDY, **LONG}, stream=True)
            next(iter(stream))
            with pytest.raises(RateLimitError) as refused:
                client.chat.completions.create(**GREEDY)
            assert int(refused.value.response.headers["retry-after"]) >= 1
            assert client.chat.completions.create(
                model="emerald", messages=[{"role": "user", "content": "Who is Toto?"}]
            )
            stream.close()


def test_keys_and_how_many_requests_one_may_have(embedded_build: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "serving", "key"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    key, digest = made.stdout.strip(), made.stderr.strip().partition("=")[2]
    with serving(embedded_build, EMERALD_API_KEYS=digest, EMERALD_PER_KEY="1") as server:
        wait_until_ready(server.port)
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
            pytest.raises(AuthenticationError, match="API key"),
        ):
            stranger.models.list()
        with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            stream = client.chat.completions.create(**{**GREEDY, **LONG}, stream=True)
            next(iter(stream))
            with pytest.raises(RateLimitError, match="this key has 1 requests under way"):
                client.chat.completions.create(**GREEDY)
            stream.close()


def test_time_that_runs_out_cuts_the_reply(embedded_build: Path) -> None:
    with serving(embedded_build, EMERALD_REPLY_SECONDS="0.5", EMERALD_RUNNING="1") as server:
        wait_until_ready(server.port)
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            long: Any = {**GREEDY, **LONG, "seed": 1}
            reply = client.chat.completions.create(**long)
            assert reply.choices[0].finish_reason == "length"
            assert reply.usage is not None and 0 < reply.usage.completion_tokens < 500
