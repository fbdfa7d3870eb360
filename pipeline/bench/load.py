"""Load as visitors make it, from outside the server: clients that ask, wait, hang up and come back.

Two loops, because each hides what the other shows (Schroeder et al. 2006, "Open versus closed"):

- closed: N clients, each asks its next question when the last was answered. A slow server is asked less.
- open: arrivals at random moments (Poisson) whatever the server does, as independent visitors come. Their latency
  counts from the moment at which they meant to arrive, so that a stall is charged to everyone it kept waiting and not
  only to the one request that saw it (Tene: "coordinated omission").
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from model.artifact import REMEDY, read_json
from model.errors import InputError
from pipeline.bench.exchange import Connection, Exchange

CHAT = "/v1/chat/completions"
ADDRESSES = 200
"""Clients on loopback come from so many addresses of it, since a server is fair between addresses."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "most": 1.0}
PLACES = ("gate", "green wall", "fountain", "market", "watchtower", "long bridge", "old mill", "throne room")
DEEDS = ("look up", "knock twice", "hum a tune", "count the lamps", "wait for the guard", "read what is carved there")
REPLY_TOKENS = (8, 24, 48, 96)
STREAMED = 0.75
FOLLOW_UPS = 0.25
"""Shares of the questions."""


class Target(NamedTuple):
    """A server."""

    host: str
    port: int
    key: str = ""

    def connect(self, client: int = 0) -> Connection:
        """A client's connection."""
        local = f"127.0.0.{2 + client % ADDRESSES}" if self.host == "127.0.0.1" else None
        return Connection(self.host, self.port, key=self.key, local=local)


class Asked(NamedTuple):
    """A question by its number, and what came of it."""

    question: int
    exchange: Exchange


def model_questions(count: int, random: Random, system: str | None = None) -> list[dict[str, Any]]:
    """Bodies of requests that no ready answer fits, of several lengths, some in the middle of a conversation."""
    pairs = [(place, deed) for place in PLACES for deed in DEEDS]
    if count > len(pairs):
        raise InputError(f"{count} different questions for the model were asked for, and there are {len(pairs)}")
    head = [{"role": "system", "content": system}] if system else []
    return [
        _body([*head, *_earlier(random), _user(f"I walk to the {place} and {deed}.")], random)
        for place, deed in random.sample(pairs, count)
    ]


def cached_questions(build: Path, count: int, random: Random) -> list[dict[str, Any]]:
    """The same for questions of a build's cache: half of them to the letter, half with a word more."""
    content = read_json(build / "cache/entries.json", REMEDY) if count else {"entries": []}
    phrasings = random.sample([text for entry in content["entries"] for text in entry["phrasings"]], count)
    words = [text if number % 2 else f"Please, {text}" for number, text in enumerate(phrasings)]
    return [_body([_user(text)], random) for text in words]


def _earlier(random: Random) -> list[dict[str, str]]:
    if random.random() > FOLLOW_UPS:
        return []
    told = f"You stand before the {random.choice(PLACES)}, and evening falls."
    return [_user("I go on along the road."), {"role": "assistant", "content": told}]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _body(messages: list[dict[str, str]], random: Random) -> dict[str, Any]:
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if random.random() < STREAMED else {}
    return {"messages": messages, "temperature": 0, "max_tokens": random.choice(REPLY_TOKENS), **streamed}


class Load:
    """Asks a server one set of questions in several ways."""

    def __init__(self, target: Target, questions: Sequence[Mapping[str, Any]], seed: int) -> None:
        self._target, self._questions, self._seed = target, questions, seed
        self._usual_s = [1.0] * len(questions)
        self.asked: list[Asked] = []
        """What came of every question; the caller may empty it."""

    async def alone(self) -> list[Exchange]:
        """Every question once, one after the other."""
        connection = self._target.connect()
        answers = [await connection.ask(CHAT, body) for body in self._questions]
        connection.close()
        self._usual_s = [answer.ended_s for answer in answers]
        return answers

    async def closed(self, clients: int, seconds: float, hang_up: float = 0.0) -> None:
        """Clients that ask until the time is over, and then wait for their last answers."""
        until = time.perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(number, until, hang_up))

    async def open(self, rate: float, seconds: float, hang_up: float = 0.0) -> None:
        """Visitors that come at `rate` per second on average, ask once, and leave."""
        random = Random(f"{self._seed} arrivals")
        at = start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (at := at + random.expovariate(rate)) < start + seconds:
                await asyncio.sleep(at - time.perf_counter())
                group.create_task(self._visitor(at, Random(random.random()), hang_up))

    async def _client(self, number: int, until: float, hang_up: float) -> None:
        random, connection = Random(f"{self._seed} {number}"), self._target.connect(number)
        while time.perf_counter() < until:
            exchange = await self._ask(connection, random, hang_up)
            if exchange.outcome == "refused":
                again = float(exchange.headers.get("retry-after", 1))
                await asyncio.sleep(max(0.0, min(again, until - time.perf_counter())))
        connection.close()

    async def _visitor(self, at: float, random: Random, hang_up: float) -> None:
        connection = self._target.connect(random.randrange(ADDRESSES))
        await self._ask(connection, random, hang_up, since=at)
        connection.close()

    async def _ask(
        self, connection: Connection, random: Random, hang_up: float, since: float | None = None
    ) -> Exchange:
        """One question; who hangs up does it at any moment of the time that its answer usually takes."""
        number = random.randrange(len(self._questions))
        moment = random.uniform(0, self._usual_s[number]) if random.random() < hang_up else None
        exchange = await connection.ask(
            CHAT, self._questions[number], since=since, hang_up_after=moment, abruptly=random.random() < 0.5
        )
        if exchange.outcome == "complete":
            self._usual_s[number] += 0.2 * (exchange.ended_s - self._usual_s[number])
        self.asked.append(Asked(number, exchange))
        return exchange


def figures(exchanges: Sequence[Exchange], seconds: float) -> dict[str, Any]:
    """Outcomes, generated tokens per second of complete answers, and times in ms by where answers came from."""
    complete = [one for one in exchanges if one.outcome == "complete"]
    sources = sorted({_source(one) for one in complete})
    return {
        "seconds": round(seconds, 2),
        "outcomes": dict(Counter(one.outcome for one in exchanges)),
        "statuses": dict(sorted(Counter(str(one.status) for one in exchanges if one.status).items())),
        "tokens_s": round(sum(one.tokens for one in complete) / seconds, 2),
        "answers_s": round(len(complete) / seconds, 2),
        "ms": {source: times([one for one in complete if _source(one) == source]) for source in sources},
    }


def times(complete: Sequence[Exchange]) -> dict[str, dict[str, float]]:
    """Quantiles in ms: to the first token and per token after it, both of streams alone, and from end to end."""
    measured = {
        "ttft": [one.first_s for one in complete if one.first_s is not None],
        "tpot": [one.tpot_s for one in complete if one.tpot_s is not None],
        "end_to_end": [one.ended_s for one in complete],
    }
    return {
        name: {label: round(1e3 * float(np.quantile(values, share)), 2) for label, share in QUANTILES.items()}
        for name, values in measured.items()
        if values
    }


def _source(exchange: Exchange) -> str:
    return exchange.headers.get("x-emerald-source", "model")
