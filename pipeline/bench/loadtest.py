"""Load on a server until it would show what it loses: answers, places, threads, connections, memory.

    python -m pipeline.bench.loadtest                                        (make loadtest; about 12 minutes)
    python -m pipeline.bench.loadtest --clients 16 --seconds 20
    python -m pipeline.bench.loadtest --url http://127.0.0.1:8000 --pid 4711     against a server that runs already

First every question is asked alone, greedily: whatever is answered later, among others, must say the same. Then come a
warm-up, the closed loop and the open loop (see `load.py`), and when all is quiet again the server must hold
what it held before. Memory is its resident pages, counted exactly (`Rss` of /proc/PID/smaps_rollup), from the end of
the warm-up to the end. The KV cache takes its memory page by page as it is used, so the warm-up begins with prompts
that fill all of it.

A server that splits work differently on another CPU may round differently: equal answers are promised on x86-64.
The last line is JSON. Exit code 1 if a check fails.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

from model.cpu import family
from model.errors import InputError
from model.fields import Checked, Range, describe, parse_value
from pipeline.bench.exchange import Exchange, get
from pipeline.bench.load import CHAT, Asked, Load, Target, cached_questions, figures, model_questions
from pipeline.bench.server_process import Footprint, emerald
from pipeline.fingerprint import ROOT
from pipeline.progress import say
from pipeline.verdict import Check
from serving.settings import Settings

READY_SECONDS = 120.0
IDLE_SECONDS = 30.0
EXAMPLES = 5
"""Of requests that went wrong, shown at most."""
SETTLE_SECONDS = 1.0
"""Until the server has noticed that the last connections closed, and freed what they held."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig(Checked):
    """The size of a load test."""

    clients: Annotated[int, Range(1, 1000)] = 64
    """Clients of the closed loop."""
    seconds: Annotated[float, Range(1)] = 600.0
    """Seconds of the closed loop."""
    rate: Annotated[float, Range(0.01, 1000)] = 4.0
    """Visitors a second of the open loop, on average."""
    open_seconds: Annotated[float, Range(0)] = 60.0
    """Seconds of the open loop."""
    warm_up_seconds: Annotated[float, Range(0)] = 30.0
    """Seconds of the same load before anything counts."""
    hang_up: Annotated[float, Range(0, 1)] = 0.2
    """Share of requests whose client hangs up at a random moment."""
    cached: Annotated[float, Range(0, 1)] = 0.3
    """Share of questions that the cache is expected to answer."""
    questions: Annotated[int, Range(1, 60)] = 40
    """Different questions."""
    contexts: Annotated[int, Range(0, 1024)] = Settings.contexts
    """Prompts of full length that the warm-up fills the KV cache with."""
    places: Annotated[int, Range(0, 10000)] = Settings.running_max + Settings.waiting_max
    """Requests that the server takes at once, all of which must be free in the end; 0 leaves that out."""
    growth_percent: Annotated[float, Range(0)] = 2.0
    """Most that resident memory may grow."""
    seed: int = 0
    """Repeats the same questions, arrivals and moments of hanging up."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a load test saw."""

    alone: list[Exchange]
    closed: list[Asked]
    closed_s: float
    opened: list[Asked]
    opened_s: float
    before: Footprint | None
    """After the warm-up; None if the server's process is not known."""
    after: Footprint | None
    still_busy: float
    """Requests that were running or waiting in the end."""
    places_lost: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table to standard output and JSON as its last line; 0 done, 1 a check failed, 2 bad input."""
    options = _options(arguments)
    config = LoadConfig(**{field.name: getattr(options, field.name) for field in fields(LoadConfig)})
    try:
        outcome = _running(options, config) if options.url else _started(options.build, config)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    checks = judge(outcome, config)
    _print(outcome, checks, config)
    for one in _wrong(outcome)[:EXAMPLES]:
        say(f"{one.outcome} after {one.ended_s:.1f} s, status {one.status}: {one.fault or one.text}")
    return 0 if all(check.passed for check in checks) else 1


async def put_under_load(
    target: Target, questions: Sequence[dict[str, Any]], pid: int | None, config: LoadConfig
) -> Outcome:
    """The whole test of one server."""
    load = Load(target, questions, config.seed)
    say(f"asking {len(questions)} questions alone")
    alone = await load.alone()
    if faults := [one.fault or one.text for one in alone if one.outcome != "complete"]:
        raise InputError(f"a question asked alone was not answered: {faults[0]}")
    say("warming up")
    await _fill_memory(target, config.contexts)
    await load.closed(config.clients, config.warm_up_seconds, config.hang_up)
    await _quiet(target)
    load.asked = []
    before = None if pid is None else Footprint.of(pid)
    say(f"{config.clients} clients for {config.seconds:g} s")
    start = time.perf_counter()
    await load.closed(config.clients, config.seconds, config.hang_up)
    between, closed, load.asked = time.perf_counter(), load.asked, []
    say(f"{config.rate:g} visitors a second for {config.open_seconds:g} s")
    await load.open(config.rate, config.open_seconds, config.hang_up)
    end = time.perf_counter()
    still_busy = await _quiet(target)
    lost = await _places_lost(target, config.places)
    await _quiet(target)
    return Outcome(
        alone=alone,
        closed=closed,
        closed_s=between - start,
        opened=load.asked,
        opened_s=end - between,
        before=before,
        after=None if pid is None else Footprint.of(pid),
        still_busy=still_busy,
        places_lost=lost,
    )


def judge(outcome: Outcome, config: LoadConfig) -> list[Check]:
    """Every check; the first ones also that there was a load at all."""
    asked = [*outcome.closed, *outcome.opened]
    by_outcome = {
        name: [one for one in asked if one.exchange.outcome == name]
        for name in ("complete", "refused", "hung up", "failed")
    }
    differing = [one for one in by_outcome["complete"] if one.exchange.text != outcome.alone[one.question].text]
    rude = [one for one in by_outcome["refused"] if not _says_when_to_return(one.exchange)]
    gone = len(by_outcome["hung up"]) / max(1, len(by_outcome["hung up"]) + len(by_outcome["complete"]))
    checks = [
        _at_least("complete answers", len(by_outcome["complete"]), config.clients),
        _at_least("share of admitted requests hung up", gone, config.hang_up / 4),
        _at_most("answers unlike those given alone", len(differing)),
        _at_most("requests that failed", len(by_outcome["failed"])),
        _at_most("refusals that are no 429 with Retry-After", len(rude)),
        _at_most("requests still running or waiting", outcome.still_busy),
        _at_most("places lost", outcome.places_lost),
    ]
    if outcome.before and outcome.after:
        before, after = outcome.before, outcome.after
        growth = 100 * (after.resident_kb / before.resident_kb - 1)
        checks += [
            _at_most("threads gained", after.threads - before.threads),
            _at_most("open files gained", after.files - before.files),
            _at_most("growth of resident memory, %", growth, config.growth_percent),
        ]
    return checks


def _started(build: Path, config: LoadConfig) -> Outcome:
    """On a server of our own, which must also end in order."""
    questions = _questions(build, config)
    with emerald(build) as server:
        server.wait_until_ready(READY_SECONDS)
        target = Target("127.0.0.1", server.port)
        outcome = asyncio.run(put_under_load(target, questions, server.pid, config))
        code = server.stop()
        if code not in (0, -signal.SIGTERM):
            raise InputError(f"the server ended with exit code {code}:\n{server.log()[-2000:]}")
    return outcome


def _running(options: argparse.Namespace, config: LoadConfig) -> Outcome:
    url = urlsplit(options.url)
    if url.scheme != "http" or not url.hostname or url.path not in ("", "/"):
        raise InputError(f"--url {options.url}: expected http://HOST:PORT")
    if options.pid is None:
        say("no --pid: threads, files and memory of the server are not watched")
    target = Target(url.hostname, url.port or 80, os.environ.get("OPENAI_API_KEY", ""))
    return asyncio.run(put_under_load(target, _questions(options.build, config), options.pid, config))


def _questions(build: Path, config: LoadConfig) -> list[dict[str, Any]]:
    random, cached = Random(config.seed), round(config.cached * config.questions)
    return [*model_questions(config.questions - cached, random), *cached_questions(build, cached, random)]


async def _fill_memory(target: Target, contexts: int) -> None:
    """Prompts of full length, one after the other, all different."""
    connection, random = target.connect(), Random(0)
    told = await connection.ask("/tokenize", {"prompt": "x"})
    if told.status != 200:
        raise InputError(f"/tokenize answered {told.status}: {told.text or told.fault}")
    length = json.loads(told.text)["max_model_len"] - 1
    for _ in range(contexts):
        prompt = [random.randrange(1000, 10000) for _ in range(length)]
        await connection.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})
    connection.close()


async def _quiet(target: Target) -> float:
    """Waits until nothing runs or waits, and a little longer; how much still does when patience ends."""
    until = time.monotonic() + IDLE_SECONDS
    while (busy := await _busy(target)) and time.monotonic() < until:
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_SECONDS)
    return busy


async def _busy(target: Target) -> float:
    told = await get(target.host, target.port, "/metrics", target.key)
    lines = [line for line in told.text.splitlines() if line.startswith("vllm:num_requests_")]
    if told.status != 200 or not lines:
        raise InputError(f"/metrics answered {told.status} without vllm:num_requests_running: {told.fault}")
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def _places_lost(target: Target, places: int) -> int:
    """How many of as many requests as the server takes at once are refused though nothing else is under way."""
    body = {"messages": [{"role": "user", "content": "I walk to the end of the road."}], "max_tokens": 8}
    connections = [target.connect(number) for number in range(places)]
    answers = await asyncio.gather(*(connection.ask(CHAT, body) for connection in connections))
    for connection in connections:
        connection.close()
    return sum(answer.status != 200 for answer in answers)


def _wrong(outcome: Outcome) -> list[Exchange]:
    """Requests that failed, and refusals as none should be."""
    asked = [one.exchange for one in (*outcome.closed, *outcome.opened)]
    return [
        one for one in asked if one.outcome == "failed" or (one.outcome == "refused" and not _says_when_to_return(one))
    ]


def _says_when_to_return(refusal: Exchange) -> bool:
    return refusal.status == 429 and refusal.headers.get("retry-after", "").isdecimal()


def _at_most(name: str, value: float, limit: float = 0) -> Check:
    return Check(name=name, value=value, limit=limit, bound="at most")


def _at_least(name: str, value: float, limit: float) -> Check:
    return Check(name=name, value=value, limit=limit, bound="at least")


def _print(outcome: Outcome, checks: Sequence[Check], config: LoadConfig) -> None:
    loops = {
        "closed": figures([one.exchange for one in outcome.closed], outcome.closed_s),
        "open": figures([one.exchange for one in outcome.opened], outcome.opened_s),
        "alone": figures(outcome.alone, sum(one.ended_s for one in outcome.alone)),
    }
    for name, loop in loops.items():
        print(f"{name}: {loop['tokens_s']:g} tokens/s, {loop['answers_s']:g} answers/s, {loop['outcomes']}")
        for source, measured in loop["ms"].items():
            for what, quantiles in measured.items():
                cells = "   ".join(f"{label} {value:9.1f}" for label, value in quantiles.items())
                print(f"  {source:6} {what:11} ms   {cells}")
    faults = [one.exchange.fault for one in [*outcome.closed, *outcome.opened] if one.exchange.outcome == "failed"]
    for fault in sorted(set(faults))[:10]:
        print(f"failed: {fault}")
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED':7} {check}")
    print(
        json.dumps(
            {
                "machine": {"cpu": family(), "cores": os.cpu_count()},
                "config": asdict(config),
                "loops": loops,
                "before": outcome.before and asdict(outcome.before),
                "after": outcome.after and asdict(outcome.after),
                "checks": [{**asdict(check), "passed": check.passed} for check in checks],
                "passed": all(check.passed for check in checks),
            }
        )
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.loadtest", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build/embedded",
                        help="build folder that is served, and whose cached questions are asked")  # fmt: skip
    parser.add_argument("--url", help="a server that runs already; OPENAI_API_KEY has its key, if it asks for one")
    parser.add_argument("--pid", type=int, help="that server's process, to watch its threads, files and memory")
    hints = get_type_hints(LoadConfig, include_extras=True)
    for field in fields(LoadConfig):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, dest=field.name, default=field.default, metavar="N",
                            help=f"{describe(hints[field.name])} (default {field.default})")  # fmt: skip
    options = parser.parse_args(arguments)
    for field in fields(LoadConfig):
        given = getattr(options, field.name)
        if isinstance(given, str):
            try:
                setattr(options, field.name, parse_value(f"--{field.name}", given, hints[field.name]))
            except InputError as fault:
                parser.error(str(fault))
    return options


if __name__ == "__main__":
    sys.exit(main())
