"""The load generator against servers that misbehave, and the load test's verdict with each defect planted."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from pipeline.bench.exchange import Exchange
from pipeline.bench.load import CHAT, Asked, Load, Target, figures, model_questions
from pipeline.bench.loadtest import LoadConfig, Outcome, judge, main
from pipeline.bench.server_process import Footprint

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "I look up."}], "stream": True}
Answer = Callable[[dict[str, Any]], Awaitable[bytes]]
LEAVES = b" and the server hangs up"
"""At the end of an answer: not sent, but done."""


def with_server(answer: Answer, use: Callable[[Target], Awaitable[Any]]) -> Any:
    """What `use` makes of a server whose whole replies, heads included, are `answer`'s."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                told = await answer(json.loads(await reader.readexactly(length)))
                writer.write(told.removesuffix(LEAVES))
                await writer.drain()
                if told.endswith(LEAVES):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            return await use(Target("127.0.0.1", server.sockets[0].getsockname()[1]))

    return asyncio.run(run())


def reply(body: bytes, kind: str = "text/event-stream", status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def events(*texts: str, done: bool = True) -> bytes:
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    chunks.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(texts)}})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + (
        b"data: [DONE]\n\n" if done else b""
    )


async def at_once(_body: dict[str, Any]) -> bytes:
    return reply(events("I ", "see."))


def asked(answer: bytes) -> Exchange:
    """One question to a server that answers with these bytes."""

    async def given(_body: dict[str, Any]) -> bytes:
        return answer

    async def ask(target: Target) -> Exchange:
        connection = target.connect()
        exchange = await connection.ask(CHAT, QUESTION)
        connection.close()
        return exchange

    exchange: Exchange = with_server(given, ask)
    return exchange


def test_a_stream_and_a_whole_answer_are_read_alike() -> None:
    streamed = asked(reply(events("I ", "see.")))
    content = {"choices": [{"message": {"content": "I see."}}], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    whole = asked(reply(json.dumps(content).encode(), "application/json"))
    assert (streamed.outcome, streamed.text, streamed.tokens) == ("complete", "I see.", 2)
    assert (whole.outcome, whole.text, whole.tokens) == ("complete", "I see.", 2)
    assert whole.first_s is None
    assert 0 < (streamed.first_s or 0) <= streamed.ended_s


@pytest.mark.parametrize(
    ("answer", "outcome", "status"),
    [
        (reply(events("I ", done=False)), "failed", 200),
        (reply(b'data: {"error": {"message": "lost"}}\n\ndata: [DONE]\n\n'), "failed", 200),
        (reply(b"data: {nonsense\n\n"), "failed", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nI" + LEAVES, "failed", 200),
        (b"BREW\r\n\r\n", "failed", 0),
        (reply(b'{"error": {"message": "full"}}', "application/json", "429 Too Many"), "refused", 429),
        (reply(b"oh no", "text/plain", "500 Error"), "refused", 500),
    ],
)
def test_broken_answers_are_told_from_refusals(answer: bytes, outcome: str, status: int) -> None:
    exchange = asked(answer)
    assert (exchange.outcome, exchange.status) == (outcome, status)


def test_no_server_is_a_failure() -> None:
    async def nothing(_body: dict[str, Any]) -> bytes:
        return b""

    async def later(target: Target) -> Target:
        return target

    gone = with_server(nothing, later)
    load = Load(gone, [QUESTION], 0)
    (exchange,) = asyncio.run(load.alone())
    assert exchange.outcome == "failed"
    assert "refused" in exchange.fault.lower()


@pytest.mark.parametrize("abruptly", [False, True])
def test_who_hangs_up_closes_the_connection(abruptly: bool) -> None:
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                pass
            seen.append("closed")
        except ConnectionResetError:
            seen.append("reset")
        writer.close()

    async def run() -> Exchange:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            connection = Target("127.0.0.1", server.sockets[0].getsockname()[1]).connect()
            exchange = await connection.ask(CHAT, QUESTION, hang_up_after=0.05, abruptly=abruptly)
            await asyncio.sleep(0.05)
        return exchange

    assert asyncio.run(run()).outcome == "hung up"
    assert len(seen) == 1


def stalling(from_s: float, to_s: float) -> Answer:
    """Answers at once, but for a time in which it answers nobody."""
    start = time.perf_counter()

    async def answer(_body: dict[str, Any]) -> bytes:
        now = time.perf_counter() - start
        if from_s < now < to_s:
            await asyncio.sleep(to_s - now)
        return reply(events("I ", "see."))

    return answer


def test_a_stall_is_charged_to_everyone_it_kept_waiting() -> None:
    """The closed loop's one client is caught once; the open loop's visitors come all the while."""

    def caught(use: Callable[[Load], Awaitable[None]]) -> tuple[int, int]:
        async def run(target: Target) -> list[Asked]:
            load = Load(target, [QUESTION], 0)
            await use(load)
            return load.asked

        everyone = with_server(stalling(0.3, 1.3), run)
        assert all(one.exchange.outcome == "complete" for one in everyone)
        return sum(one.exchange.ended_s > 0.2 for one in everyone), len(everyone)

    closed, _ = caught(lambda load: load.closed(1, 2))
    opened, visitors = caught(lambda load: load.open(40, 2))
    assert closed <= 2
    assert opened > 20
    assert visitors > 50


def test_visitors_come_whatever_the_server_does() -> None:
    async def run(target: Target) -> int:
        load = Load(target, [QUESTION], 7)
        await load.open(50, 1)
        return len(load.asked)

    assert with_server(at_once, run) == with_server(stalling(0.1, 1), run)


def test_a_refused_client_waits_as_long_as_it_is_told() -> None:
    async def full(_body: dict[str, Any]) -> bytes:
        return reply(b"{}", "application/json", "429 Too Many", "Retry-After: 60\r\n")

    async def run(target: Target) -> int:
        load = Load(target, [QUESTION], 0)
        await load.closed(3, 0.5)
        return len(load.asked)

    assert with_server(full, run) == 3


def test_some_hang_up_and_the_figures_count_complete_answers_alone() -> None:
    async def slowly(_body: dict[str, Any]) -> bytes:
        await asyncio.sleep(0.02)
        return reply(events("I ", "see."))

    async def run(target: Target) -> list[Asked]:
        load = Load(target, [QUESTION], 0)
        await load.alone()
        await load.closed(8, 1, hang_up=0.5)
        return load.asked

    everyone = [one.exchange for one in with_server(slowly, run)]
    found = figures(everyone, 2.0)
    assert set(found["outcomes"]) == {"complete", "hung up"}
    assert found["tokens_s"] == found["outcomes"]["complete"] == 2 * found["answers_s"]
    assert found["ms"]["model"]["ttft"]["p50"] <= found["ms"]["model"]["end_to_end"]["most"]


def test_questions_repeat_with_their_seed_and_differ() -> None:
    first, again, other = (model_questions(20, Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({one["messages"][-1]["content"] for one in first}) == 20


CONFIG = LoadConfig(clients=2, hang_up=0.2)
WELL = Footprint(resident_kb=100_000, anonymous_kb=50_000, threads=9, files=30)
SAID = Exchange(outcome="complete", status=200, text="I see.", tokens=2)


def outcome(**changes: Any) -> Outcome:
    """What a faultless server leaves, with changes."""
    gone = Exchange(outcome="hung up")
    full = Exchange(outcome="refused", status=429, headers={"retry-after": "3"})
    fine = Outcome(
        alone=[SAID],
        closed=[Asked(0, SAID), Asked(0, SAID), Asked(0, gone), Asked(0, full)],
        closed_s=1,
        opened=[Asked(0, SAID)],
        opened_s=1,
        before=WELL,
        after=WELL,
        still_busy=0,
        places_lost=0,
    )
    return replace(fine, **changes)


def with_one(exchange: Exchange) -> dict[str, Any]:
    return {"opened": [Asked(0, SAID), Asked(0, exchange)]}


def test_a_faultless_server_passes() -> None:
    assert all(check.passed for check in judge(outcome(), CONFIG))


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        ({"closed": [Asked(0, Exchange(outcome="hung up"))], "opened": []}, "complete answers"),
        ({"closed": [Asked(0, SAID)] * 9}, "share of admitted requests hung up"),
        (with_one(replace(SAID, text="I sea.")), "answers unlike those given alone"),
        (with_one(Exchange(outcome="failed", status=200)), "requests that failed"),
        (with_one(Exchange(outcome="refused", status=429)), "refusals that are no 429 with Retry-After"),
        (
            with_one(Exchange(outcome="refused", status=503, headers={"retry-after": "1"})),
            "refusals that are no 429 with Retry-After",
        ),
        ({"still_busy": 1.0}, "requests still running or waiting"),
        ({"places_lost": 1}, "places lost"),
        ({"after": replace(WELL, threads=10)}, "threads gained"),
        ({"after": replace(WELL, files=31)}, "open files gained"),
        ({"after": replace(WELL, resident_kb=102_100)}, "growth of resident memory, %"),
    ],
)
def test_each_defect_fails_its_check(defect: dict[str, Any], name: str) -> None:
    assert [check.name for check in judge(outcome(**defect), CONFIG) if not check.passed] == [name]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--url", "ftp://x"], "--url"),
        (["--url", "http://127.0.0.1:1", "--cached", "0"], "asked alone"),
        (["--build", "nowhere"], "nowhere"),
        (["--build", "nowhere", "--cached", "0"], "nowhere"),
    ],
)
def test_bad_input_is_named(arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert names in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--clients", "none"], ["--hang-up", "2"]])
def test_settings_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected" in capsys.readouterr().err
