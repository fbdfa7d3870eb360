"""Measures the server: beside llama.cpp's under the same load, beside its own engine, its cache, and its start.

    python -m pipeline.bench.server --build build/embedded    (make bench-server; first run builds llama.cpp's server)
    python -m pipeline.bench.server --part restart_s          (one part alone)

Both servers get the same questions with the persona as an explicit system prompt, the same threads and as many replies
at once, and take turns, repetition by repetition, so that drift of a shared machine hits both; likewise the server and
the bare engine, which decode the same greedy reply. Clients run on the same machine and take their share of it.
Medians with their spread; ratios are taken within a repetition. The last line is JSON.
"""

import argparse
import asyncio
import json
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from model.artifact import REMEDY, read_json
from model.cpu import available_cores, family
from model.engine import Engine
from model.errors import InputError
from model.program import torch_version
from model.sampling import Sampling
from pipeline.bench.engine import spread
from pipeline.bench.load import Load, Target, figures, model_questions
from pipeline.bench.peer import REQUIREMENTS, peer_file
from pipeline.bench.peer_server import llama_server
from pipeline.bench.server_process import HOST, ServerProcess, emerald
from pipeline.configs import CONFIGS
from pipeline.fingerprint import ROOT
from pipeline.progress import say
from pipeline.statistics import bootstrap
from serving.prologue import model_id

PARTS = ("under_load", "one_client", "cache_hit_ms", "restart_s")
"""What is measured, by its name in the result."""
CLIENTS = (1, 8, 64)
SLOTS = 8
"""Replies that each server generates at once."""
QUESTIONS = 32
LOAD_SECONDS = 15.0
REPLY_TOKENS = 128
PAIRS = 40
"""Replies by the server and by its engine, in turn."""
HITS = 200
READY_SECONDS = 120.0
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables to standard output and JSON as its last line."""
    options = _options(arguments)
    try:
        result = _measure(options)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    _print(result)
    print(json.dumps(result))
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    parts, settings = options.part or PARTS, {"EMERALD_THREADS": str(options.threads), "EMERALD_RUNNING": str(SLOTS)}
    torch.set_num_threads(options.threads)
    gguf = (options.gguf or peer_file(options.config)) if "under_load" in parts else None
    found: dict[str, Any] = {
        "machine": {"cpu": family(), "threads": options.threads, "python": platform.python_version()},
        "versions": {"torch": torch_version(), "llama.cpp": REQUIREMENTS[0] if gguf else None},
        "model": model_id(options.build),
    }
    if set(parts) - {"restart_s"}:
        found |= _of_running(options, parts, settings, gguf)
    if "restart_s" in parts:
        say("killed under load and started again")
        starts = [_restart(options.build, settings) for _ in range(options.repetitions + 1)][1:]
        found["restart_s"] = {name: spread([one[name] for one in starts]) for name in starts[0]}
    return found


def _of_running(
    options: argparse.Namespace, parts: Sequence[str], settings: Mapping[str, str], gguf: Path | None
) -> dict[str, Any]:
    """Those parts that ask a server which keeps running; `gguf` is what llama.cpp serves beside it, if anything."""
    persona = read_json(options.build / "cache/entries.json", REMEDY)["persona"]["system_prompt"].strip()
    open_ = {"EMERALD_WAITING": str(max(CLIENTS)), "EMERALD_SYSTEM_PROMPT": "true", "EMERALD_CONTEXTS": str(SLOTS)}
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(emerald(options.build, {**settings, **open_}))
        servers = {"emerald": ours}
        if gguf:
            context = read_json(options.build / "engine/manifest.json", REMEDY)["context"]
            servers["llama.cpp"] = stack.enter_context(
                llama_server(gguf, threads=options.threads, slots=SLOTS, context=context)
            )
        for server in servers.values():
            server.wait_until_ready(READY_SECONDS)
        if "under_load" in parts:
            found["under_load"] = _under_load(servers, persona, options.repetitions)
        if "one_client" in parts:
            say("one client beside the bare engine")
            engine = Engine.load(options.build / "engine", sequences=1)
            found["one_client"] = _beside_engine(ours.port, engine, persona, PAIRS)
        if "cache_hit_ms" in parts:
            say("ready answers")
            found["cache_hit_ms"] = _hits(ours.port, options.build)
    return found


def _under_load(servers: Mapping[str, ServerProcess], persona: str, repetitions: int) -> dict[str, Any]:
    """By number of clients: each server's figures, medians of the repetitions, and our share of the other's speed."""
    questions = [{**body, "stream": True, "stream_options": {"include_usage": True}}
                 for body in model_questions(QUESTIONS, Random(0), persona)]  # fmt: skip
    loads = {name: Load(Target(HOST, server.port), questions, 0) for name, server in servers.items()}
    found: dict[str, Any] = {}
    for clients in CLIENTS:
        say(f"{clients} clients, {repetitions} repetitions of {LOAD_SECONDS:g} s for each of {', '.join(servers)}")
        rounds = [
            {name: asyncio.run(_round(load, clients)) for name, load in loads.items()} for _ in range(repetitions + 1)
        ][1:]  # the first warms up
        found[str(clients)] = {
            **{name: {key: spread([one[name][key] for one in rounds]) for key in rounds[0][name]} for name in servers},
            "ratio": {
                name: spread([one["emerald"]["tokens_s"] / one[name]["tokens_s"] for one in rounds])
                for name in servers
                if name != "emerald"
            },
        }
    return found


async def _round(load: Load, clients: int) -> dict[str, float]:
    load.asked = []
    start = time.perf_counter()
    await load.closed(clients, LOAD_SECONDS)
    exchanges = [one.exchange for one in load.asked]
    if faults := [one.fault or one.text for one in exchanges if one.outcome != "complete"]:
        raise InputError(f"{len(faults)} of {len(exchanges)} questions were not answered: {faults[0]}")
    found = figures(exchanges, time.perf_counter() - start)
    times = found["ms"]["model"]
    return {
        "tokens_s": found["tokens_s"],
        "prompt_tokens": float(np.mean([one.prompt_tokens for one in exchanges])),
        "ttft_ms_p50": times["ttft"]["p50"],
        "ttft_ms_p99": times["ttft"]["p99"],
        "tpot_ms_p50": times["tpot"]["p50"],
        "end_to_end_ms_p50": times["end_to_end"]["p50"],
    }


def _beside_engine(port: int, engine: Engine, persona: str, repetitions: int) -> dict[str, Any]:
    """Tokens per second after the first of one greedy reply: from the engine, and as a client of the server sees it."""
    messages = [{"role": "system", "content": persona}, {"role": "user", "content": "I walk to the gate and look up."}]
    greedy = {"temperature": 0, "repetition_penalty": 1, "max_tokens": REPLY_TOKENS}  # not the persona's own
    body = {"messages": messages, **greedy, "stop": "no such text", "stream": True}
    prompt = engine.tokenizer.encode_chat(messages)
    sampling = Sampling(temperature=0, max_tokens=REPLY_TOKENS, stop=("no such text",))
    rows = []
    for _ in range(repetitions + 1):
        alone, text = _alone(engine, prompt, sampling)
        served, said = _served(port, json.dumps(body).encode())
        if said != text:
            raise InputError(f"the server and its engine gave different replies: {said!r} and {text!r}")
        rows.append((alone, served))
    rows = rows[1:]
    overhead = bootstrap(lambda mean: 1 - mean[..., 1] / mean[..., 0], rows, confidence=0.95)
    return {
        "engine_tokens_s": spread([alone for alone, _ in rows]),
        "server_tokens_s": spread([served for _, served in rows]),
        "overhead": overhead.rounded(4),
    }


def _alone(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> tuple[float, str]:
    """Tokens per second after the first, and the text."""
    text, first, tokens = "", 0.0, 0
    for piece in engine.generate(prompt, sampling):
        first = first or time.perf_counter()
        text, tokens = text + piece.text, piece.tokens
    return (tokens - 1) / (time.perf_counter() - first), text


def _served(port: int, body: bytes) -> tuple[float, str]:
    """The same of a streamed reply, by a client that only takes the time while it reads: it shares the processor."""
    came: list[tuple[float, bytes]] = []
    with socket.create_connection((HOST, port), timeout=READY_SECONDS) as connection:
        connection.sendall(HEAD % len(body) + body)
        while not came or b"[DONE]" not in came[-1][1]:
            received = connection.recv(1 << 16)
            if not received:
                raise InputError("the server closed the connection in the middle of its answer")
            came.append((time.perf_counter(), received))
    spoken = [at for at, received in came if b'"content": "' in received]
    chunks = [
        json.loads(line[6:]) for line in b"".join(part for _, part in came).split(b"\n") if line[:7] == b"data: {"
    ]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return (REPLY_TOKENS - 1) / (spoken[-1] - spoken[0]), text


def _hits(port: int, build: Path) -> dict[str, Any]:
    """Milliseconds from question to ready answer over a connection that is kept, by how the question was matched."""
    entries = read_json(build / "cache/entries.json", REMEDY)["entries"]
    phrasings = Random(0).sample([text for entry in entries for text in entry["phrasings"]], HITS)
    by_tier = dict[str, list[float]]()
    with socket.create_connection((HOST, port), timeout=READY_SECONDS) as connection:
        for text in [word for phrasing in phrasings for word in (phrasing, f"Please, {phrasing}")]:
            seconds, headers = _answered(connection, text)
            if headers["x-emerald-source"] == "cache":
                by_tier.setdefault(headers["x-emerald-tier"], []).append(seconds)
            else:
                _answered(connection, phrasings[0])
    return {tier: {"hits": len(hits), **_quantiles(hits)} for tier, hits in by_tier.items()}


def _answered(connection: socket.socket, question: str) -> tuple[float, Message]:
    """Seconds until the last byte of a whole answer, and its headers, which are read only then."""
    body = json.dumps({"messages": [{"role": "user", "content": question}]}).encode()
    start, lines = time.perf_counter(), list[bytes]()
    connection.sendall(HEAD % len(body) + body)
    with connection.makefile("rb") as answer:
        while (line := answer.readline()).strip():
            lines.append(line.lower())
        if not lines:
            raise InputError("the server closed the connection without an answer")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        answer.read(length)
    return time.perf_counter() - start, message_from_bytes(b"".join(lines[1:]))


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    return {name: round(1e3 * float(np.quantile(seconds, share)), 3) for name, share in (("p50", 0.5), ("p99", 0.99))}


def _restart(build: Path, settings: Mapping[str, str]) -> dict[str, float]:
    """Seconds from starting the process to ready, after the one before was killed under load; and of `import torch`."""
    with emerald(build, settings) as server:
        server.wait_until_ready(READY_SECONDS)
        asyncio.run(_killed_under_load(server))
    start = time.perf_counter()
    with emerald(build, settings, server.port) as again:
        again.wait_until_ready(READY_SECONDS)
        ready = time.perf_counter() - start
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return {"ready": ready, "import_torch": time.perf_counter() - start}


async def _killed_under_load(server: ServerProcess) -> None:
    load = Load(Target(HOST, server.port), model_questions(QUESTIONS, Random(0)), 0)
    async with asyncio.TaskGroup() as group:
        clients = group.create_task(load.closed(SLOTS, 3600))
        await asyncio.sleep(1)
        server.process.send_signal(signal.SIGKILL)
        clients.cancel()
    server.process.wait(timeout=20)


def _print(result: Mapping[str, Any]) -> None:
    machine = result["machine"]
    print(f"{result['model']} on {machine['cpu']}, {machine['threads']} threads; medians (least to most)\n")
    for clients, found in result.get("under_load", {}).items():
        print(f"{clients} clients")
        for name, one in found.items():
            for key, value in one.items():
                _row(f"{name}, {key}" if name != "ratio" else f"emerald / {key}, tokens_s", value)
    if one_client := result.get("one_client"):
        print("one client")
        for key in ("engine_tokens_s", "server_tokens_s"):
            _row(key, one_client[key])
        print("  overhead {value:.1%} ({lower:.1%} to {upper:.1%}, 95 % bootstrap)".format(**one_client["overhead"]))
    for tier, hit in result.get("cache_hit_ms", {}).items():
        print(f"  ready answer, {tier}, {hit['hits']} hits: p50 {hit['p50']} ms, p99 {hit['p99']} ms")
    for name, value in result.get("restart_s", {}).items():
        _row(f"restart, {name}, s", value)


def _row(name: str, found: Mapping[str, float]) -> None:
    print(f"  {name:36} {found['median']:10.3f} ({found['least']:.3f} to {found['most']:.3f})")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.server", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="measure only this; several may be given")
    parser.add_argument("--build", type=Path, default=ROOT / "build/embedded", help="a build folder")
    parser.add_argument("--config", choices=CONFIGS, default="embedded", help="whose source, if GGUF, llama.cpp serves")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp serves instead")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: every core")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
