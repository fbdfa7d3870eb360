"""What visitors read before and after the model was taught, side by side; and twenty replies, chosen by index.

    make bench-replies

    python -m pipeline.bench.replies --build build/embedded --search      how the persona's sampling was chosen

Every opening and every visit of a question file is answered by each engine, with the same seeds: the untaught model and
the taught one, each with plain sampling and with the persona's, and the taught model's float weights. The table is the
gate's own measures; with --page, `docs/replies.md` gets twenty openings' replies, word for word, whatever they are.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.engine import Engine
from model.errors import InputError
from model.networks import float_network
from model.sampling import Sampling
from pipeline.configs import named_config
from pipeline.fingerprint import ROOT
from pipeline.gate_replies import (
    Talks,
    Texts,
    faults_of,
    figures_of,
    judge_of,
    perplexity_of,
    some,
    variety_of,
    world_of,
)
from pipeline.hub_checkpoint import open_checkpoint
from pipeline.progress import say
from pipeline.stages import EMBEDDER, ENGINE, ENTRIES, PERSONA, PROLOGUE, SCHEMA, STORIES, TUNED, UNSAFE_WORDS, VISITS
from pipeline.stories import Persona, read_dialogues
from pipeline.verdict import write_report
from pipeline.visits import Answered, Visit, read_visits
from serving.persona import manner
from serving.settings import Settings

PRINTED = 20
"""Openings whose replies stand in the document."""
PAGE = Path("docs/replies.md")


class Speaker(NamedTuple):
    """An engine with the sampling that it is asked with."""

    name: str
    engine: Engine
    sampling: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes reports/bench-replies.json and the page, prints the table; 2 on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.untaught is None and not options.search:
        parser.error("--untaught: give a build folder whose model was not taught, or --search")
    try:
        return _compare(options)
    except InputError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def _compare(options: argparse.Namespace) -> int:
    config = named_config(options.config).gate_replies
    persona = Persona(ROOT / PERSONA, ROOT / PROLOGUE, ROOT / SCHEMA)
    questions = "dev" if options.search else options.questions
    visits = read_visits(ROOT / VISITS / f"{questions}.yaml", ROOT / SCHEMA)
    asked = [(visit, seed) for seed in range(options.seeds) for visit in visits]
    sealed = read_dialogues(ROOT / VISITS / "sealed.yaml", ROOT / SCHEMA)
    written = [turn.reply for dialogue in sealed for turn in dialogue.turns]
    read_by = cache(lambda engine: perplexity_of(engine, persona, sealed))
    rows: dict[str, dict[str, Any]] = {}
    told: dict[str, list[Answered]] = {}
    for speaker in (_searched if options.search else _speakers)(options, persona, config.together):
        say(speaker.name)
        told[speaker.name] = Talks(persona, speaker.sampling, config.together).answers(
            speaker.engine, asked, "the engine's replies"
        )
        rows[speaker.name] = {"perplexity of sealed replies": read_by(speaker.engine)}
    heard = [one for answers in told.values() for one in answers]
    texts = (VISITS, STORIES, ENTRIES, PERSONA, PROLOGUE, SCHEMA, UNSAFE_WORDS)
    author = Texts(*(ROOT / path for path in texts))
    world, vectors = world_of(author, visits, heard, options.build / EMBEDDER)
    judge = judge_of(world, vectors)
    for name, answers in told.items():
        found = [judge(one) for one in answers]
        later = [verdict for verdict, one in zip(found, answers, strict=True) if one.turn]
        first = [verdict for verdict, one in zip(found, answers, strict=True) if not one.turn]
        rows[name] |= {f"{measure}, share": of["share"] for measure, of in figures_of(found, config.confidence).items()}
        rows[name] |= {
            f"distinct-{size} beside written": variety_of([one.reply for one in answers], written, size)
            for size in (2, 3)
        }
        rows[name] |= {
            "faults of a first reply": faults_of(first),
            "faults of a later reply": faults_of(later),
            "tokens of a reply": sum(one.tokens for one in answers) / len(answers),
        }
    write_report(options.build / "reports/bench-replies.json", "bench", [], replies=len(asked), rows=rows)
    print(_table(rows))
    if options.page:
        (ROOT / PAGE).write_text(_page(visits, told, rows), encoding="utf-8")
    return 0


def _speakers(options: argparse.Namespace, persona: Persona, together: int) -> list[Speaker]:
    """The engines, each with its sampling."""
    longest = {"max_tokens": Settings.reply_tokens_max}
    before = Engine.load(options.untaught / ENGINE, sequences=together)
    after = Engine.load(options.build / ENGINE, sequences=together)
    own = {**manner(persona.persona, after.model_id), **longest}
    with open_checkpoint(options.build / TUNED) as opened:
        network = float_network(opened, torch.bfloat16)
    plain = Engine(network, after.tokenizer, after.context, sequences=together)
    return [
        Speaker("untaught, plain sampling", before, longest),
        Speaker("untaught, the persona's", before, own),
        Speaker("taught, plain sampling", after, longest),
        Speaker("taught, the persona's", after, own),
        Speaker("taught, float, the persona's", plain, own),
    ]


def _searched(options: argparse.Namespace, _persona: Persona, together: int) -> list[Speaker]:
    """One engine with every sampling of a small grid."""
    engine = Engine.load(options.build / ENGINE, sequences=together)
    grid = product((0.4, 0.6, 0.8), (0.05, 0.1), (1.0, 1.04, 1.08))
    return [
        Speaker(
            f"{temperature} / {min_p} / {repetition}",
            engine,
            {
                "temperature": temperature,
                "top_p": 1.0,
                "min_p": min_p,
                "repetition_penalty": repetition,
                "max_tokens": Settings.reply_tokens_max,
            },
        )
        for temperature, min_p, repetition in grid
    ]


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    measures = list(next(iter(rows.values())))
    head = ["| | " + " | ".join(rows) + " |", "|---|" + "---:|" * len(rows)]
    return "\n".join(
        [*head, *(f"| {name} | {' | '.join(f'{row[name]:.3g}' for row in rows.values())} |" for name in measures)]
    )


def _page(visits: Sequence[Visit], told: Mapping[str, Sequence[Answered]], rows: Mapping[str, Any]) -> str:
    """The table, and some openings with what was replied before and after."""
    before, after = (
        {one.visit.line: one.reply for one in told[name] if one.turn == 0 and one.seed == 0}
        for name in ("untaught, plain sampling", "taught, the persona's")
    )
    parts = [
        "# Replies",
        "Written by `make bench-replies`. Every measure is explained in `pipeline/reply_measures.py`; plain sampling "
        f"is the engine's own (temperature {Sampling.temperature}, top-p {Sampling.top_p}).",
        _table(rows),
        f"## {PRINTED} openings, chosen by their place in the file",
    ]
    for visit in some([visit for visit in visits if len(visit.moves) == 1], PRINTED):
        replies = (("Before", before[visit.line]), ("After", after[visit.line]))
        parts += [f"### {visit.moves[0]}", *(f"{when}:\n\n> {' '.join(reply.split())}" for when, reply in replies)]
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.bench.replies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="embedded", help="configuration of both builds (default: embedded)")
    parser.add_argument("--build", type=Path, required=True, help="a build folder whose model was taught")
    parser.add_argument("--untaught", type=Path, help="the same with tune.steps=0")
    parser.add_argument("--search", action="store_true", help="many samplings of one engine, on dev")
    parser.add_argument("--questions", choices=("dev", "cert"), default="cert", help="which visits (default: cert)")
    parser.add_argument("--seeds", type=int, default=1, help="how often each is asked (default: 1)")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE} anew")
    return parser


if __name__ == "__main__":
    sys.exit(main())
