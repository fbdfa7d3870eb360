"""The storyteller's command line: python -m serving ask | chat | explain | serve | key."""

import serving.quick_torch  # noqa: F401, I001  # before what imports torch

import argparse
import hashlib
import secrets
import sys
from collections.abc import Sequence
from dataclasses import fields, replace

from model.engine import Timing
from model.errors import InputError
from model.sampling import Sampling
from model.tokenizer import Message
from serving.answer import Reply, Storyteller
from serving.cache import Hit, Miss
from serving.choices import as_move, choices
from serving.settings import Settings

EPILOG = """examples:
  python -m serving ask "What are you capable of?"         a ready answer, without the model
  python -m serving ask "I walk through the gates and look up" --seed 1
  python -m serving explain "Is the city green?"           what the cache considered, and its decision
  python -m serving chat
  PORT=9000 python -m serving serve

environment: the README's table "Settings of the server" has every variable"""
CHAT_HELP = "Type what you do or ask, or the number of a choice. /new starts over, /quit leaves, Ctrl-C stops a reply."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        settings = Settings.from_environment()
        if getattr(options, "build", None):
            settings = replace(settings, build=options.build)
        return int(options.command(settings, options))
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def ask(settings: Settings, options: argparse.Namespace) -> int:
    """Answers one question: the answer on standard output, where it came from on standard error."""
    storyteller = Storyteller(settings)
    question = {"role": "user", "content": options.question}
    reply = storyteller.reply([question], _sampling(storyteller, options), use_cache=not options.no_cache)
    _print_reply(reply)
    return 0


def chat(settings: Settings, options: argparse.Namespace) -> int:
    """A conversation in the terminal."""
    storyteller = Storyteller(settings)
    print(storyteller.cache.persona["greeting"])
    print(CHAT_HELP, file=sys.stderr)
    conversation: list[Message] = []
    offered: list[str] = []
    while (said := _read_line()) is not None:
        if said == "/quit":
            break
        if said == "/new":
            conversation, offered = [], []
            print(storyteller.cache.persona["greeting"])
        elif said.startswith("/"):
            print(CHAT_HELP, file=sys.stderr)
        elif said:
            if said.isdecimal() and 1 <= int(said) <= len(offered):
                said = as_move(offered[int(said) - 1])
                print(said, file=sys.stderr)
            asked = [*conversation, {"role": "user", "content": said}]
            text = _answer_turn(storyteller, asked, options)
            if text is not None:
                conversation = [*asked, {"role": "assistant", "content": text}]
                offered = choices(text)
                for number, choice in enumerate(offered, start=1):
                    print(f"  {number}  {choice}", file=sys.stderr)
    return 0


def explain(settings: Settings, options: argparse.Namespace) -> int:
    """Prints what the cache considered for a question, each guard's verdict, and its decision."""
    cache = Storyteller(settings).cache
    answer = cache.lookup(options.question)
    print(f"hit: {answer.entry}, {answer.tier} match" if isinstance(answer, Hit) else f"miss: {answer.reason}")
    found = cache.consider(options.question)
    if isinstance(found, Miss) or (isinstance(answer, Hit) and answer.tier == "exact"):
        return 0
    limit = "no certified threshold" if cache.threshold is None else f"{cache.threshold:g} is certified"
    print(f"nearest   {found.similarity:.3f}  {found.phrasing!r} of {found.entry}")
    print(f"rival     {found.rival_similarity:.3f}  {found.rival!r}")
    print(f"novelty   {found.novelty:.3f}")
    print(f"score     {found.score:.3f}  ({limit})")
    for guard in cache.policy["guards"]:
        print(f"guard     {guard}: {found.objections.get(guard, 'no objection')}")
    return 0


def serve(settings: Settings, _options: argparse.Namespace) -> int:
    """Serves the OpenAI-compatible HTTP interface."""
    from serving.app import create_app
    from serving.listener import listen
    from serving.service import Service

    listen(create_app(settings, Service(settings)), settings)
    return 0


def key(_settings: Settings, _options: argparse.Namespace) -> int:
    """Makes an API key: the key on standard output, what the server keeps of it on standard error."""
    made = secrets.token_urlsafe(32)
    print(made)
    print(f"EMERALD_API_KEYS={hashlib.sha256(made.encode()).hexdigest()}", file=sys.stderr)
    return 0


def _answer_turn(storyteller: Storyteller, conversation: list[Message], options: argparse.Namespace) -> str | None:
    """Prints the reply and returns its text; None if the message was refused, so that it is not remembered."""
    try:
        reply = storyteller.reply(conversation, _sampling(storyteller, options), use_cache=not options.no_cache)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return None
    if reply.origin.dropped_turns:
        print(f"(the first {reply.origin.dropped_turns} messages no longer fit and are forgotten)", file=sys.stderr)
    return _print_reply(reply)


def _print_reply(reply: Reply) -> str:
    """Streams a reply to standard output; returns its text, cut where Ctrl-C stopped it."""
    text, latest = "", None
    try:
        for piece, latest in reply.pieces:  # noqa: B007  # the last one is reported below
            text += piece.text
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    print(flush=True)
    if latest is not None:
        print(_origin(reply, latest), file=sys.stderr)
    return text


def _origin(reply: Reply, timing: Timing) -> str:
    cached, proof = reply.origin.cached, reply.origin.certificate
    if cached is not None:
        certainty = f"wrong at most {proof.bound:.1%} of the time, certified" if proof else "exact match"
        return f"[cache: {cached.entry}, {certainty}; {1e3 * timing.ttft_s:.1f} ms]"
    speed = f", {1 / timing.tpot_s:.1f} tokens/s" if timing.tpot_s else ""
    return (
        f"[model: {timing.tokens} tokens, first after {1e3 * timing.ttft_s:.0f} ms{speed}; "
        f"no ready answer because {reply.origin.miss}]"
    )


def _read_line() -> str | None:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _sampling(storyteller: Storyteller, options: argparse.Namespace) -> Sampling:
    names = [field.name for field in fields(Sampling) if field.name not in ("stop", "logprobs")]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return Sampling(**{**storyteller.manner, **given}, stop=tuple(options.stop))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Talks to the storyteller: ready answers first, then the model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--build", metavar="FOLDER", help="a build folder (default: EMERALD_BUILD or build/embedded)")
    sampled = argparse.ArgumentParser(add_help=False)
    manner = sampled.add_argument_group("sampling", "What is not given is the persona's own (cache_data/persona.yaml).")
    manner.add_argument("--temperature", type=float, help="0 to 2; 0 always takes the likeliest token")
    manner.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this total probability")
    manner.add_argument("--top-k", type=int, help="keep this many of the likeliest tokens")
    manner.add_argument("--min-p", type=float, help="keep tokens this likely beside the likeliest")
    manner.add_argument("--repetition-penalty", type=float, help="above 1 avoids what prompt and reply hold")
    manner.add_argument("--frequency-penalty", type=float, help="-2 to 2, for each time the reply has a token")
    manner.add_argument("--presence-penalty", type=float, help="-2 to 2, once the reply has a token")
    sampled.add_argument("--seed", type=int, help="makes a reply repeatable")
    sampled.add_argument("--max-tokens", type=int, help=f"longest reply (default {Sampling.max_tokens})")
    sampled.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    sampled.add_argument("--no-cache", action="store_true", help="always ask the model")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, parents in (
        (ask, [common, sampled]),
        (chat, [common, sampled]),
        (explain, [common]),
        (serve, [common]),
        (key, []),
    ):
        what = (command.__doc__ or "").splitlines()[0]
        chosen = commands.add_parser(command.__name__, parents=parents, help=what, description=what)
        chosen.set_defaults(command=command)
        if command in (ask, explain):
            chosen.add_argument("question")
    return parser


if __name__ == "__main__":
    sys.exit(main())
