"""Judges what visitors read: the engine's own replies to moves and conversations that no dialogue taught it.

Every move is answered with the persona's sampling and a seed of its own. What is measured is in
`pipeline.reply_measures`; shares come with exact limits (Clopper-Pearson), one-sided, and the limits of the
configuration are held against those. Beside them: how well the engine tells replies that an author wrote and sealed
(perplexity). Where the float model fits into memory it reads the same and answers some of the same moves with the same
seeds, and the engine must not be worse by more than a margin. The worst replies stand in the report, word for word.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from model.artifact import manifest_digest, read_manifest
from model.engine import Engine
from model.networks import float_network
from pipeline.author_data import read_document, read_entries
from pipeline.configs import GateRepliesConfig
from pipeline.hub_checkpoint import open_checkpoint
from pipeline.progress import track
from pipeline.reply_measures import Figure, Heard, World, distinct, judged, names_in, shares, words_of
from pipeline.statistics import share_lower, share_upper
from pipeline.stories import Dialogue, Persona, read_dialogues, read_stories
from pipeline.verdict import Check, write_report
from pipeline.visits import Answered, Visit, hold, read_visits
from serving.embedder import Embedder, TextTooLongError, Vector
from serving.persona import manner
from serving.settings import Settings

Item = TypeVar("Item")
WORST = 10
"""Replies that stand in the report."""
KINDS = ("story", "question", "greeting", "off-topic", "hostile", "short")
"""Of visits, as the schema has them."""
ALIKE_QUANTILE = 0.95
"""Of the cosines of moves and replies that do not belong together."""
GOOD = ("ends in a choice", "second person, present", "length as asked", "takes up the move", "nobody unmet")
BAD = (
    "loops",
    "cut by the limit",
    "another language",
    "leaks the system prompt",
    "claims to be human",
    "unsafe words",
    "foreign names",
)


class Texts(NamedTuple):
    """What people wrote."""

    visits: Path
    """Folder of visits, sealed dialogues and figures."""
    stories: Path
    entries: Path
    persona: Path
    prologue: Path
    schemas: Path
    unsafe: Path
    """A list of words."""


def run(config: GateRepliesConfig, *paths: Path) -> list[Check]:
    """Writes the report and returns the checks.

    `paths` are the `Texts`, engine, embedder, the float checkpoint if the config compares with it, and the report.
    """
    author, (engine_folder, embedder, *tuned, report) = Texts(*paths[: len(Texts._fields)]), paths[len(Texts._fields) :]
    speaker = Persona(author.persona, author.prologue, author.schemas)
    visits = read_visits(author.visits / f"{config.questions}.yaml", author.schemas)
    alone, longer = ([visit for visit in visits if (len(visit.moves) == 1) == one] for one in (True, False))
    seeds = range(config.seeds)
    first = [(visit, seed) for seed in seeds for visit in some(alone, config.openings)]
    asked = first + [(visit, seed) for seed in seeds for visit in some(longer, config.visits)]
    sealed = read_dialogues(author.visits / "sealed.yaml", author.schemas)
    read = some(sealed, config.sealed)
    chosen = manner(speaker.persona, read_manifest(engine_folder, "engine")["model_id"])
    sampling = {**chosen, "max_tokens": Settings.reply_tokens_max}
    talks = Talks(speaker, sampling, config.together)
    engine = Engine.load(engine_folder, sequences=config.together)
    told = talks.answers(engine, asked, "the engine's replies")
    perplexity = perplexity_of(engine, speaker, read)
    told_plain, beside = list[Answered](), first[: config.float_openings]
    figures: dict[str, Any] = {"perplexity": round(perplexity, 3)}
    if tuned:
        with open_checkpoint(tuned[0]) as opened:
            network = float_network(opened, torch.bfloat16)
        plain = Engine(network, engine.tokenizer, engine.context, sequences=config.together)
        told_plain = talks.answers(plain, beside, "the float model's replies")
        figures["perplexity_float"] = round(perplexity_of(plain, speaker, read), 3)
    judge = judge_of(*world_of(author, visits, [*told, *told_plain], embedder))
    found, found_plain = [judge(one) for one in told], [judge(one) for one in told_plain]
    measures = {
        "all": found,
        "first replies": _of(found, told, lambda one: one.turn == 0),
        "later replies": _of(found, told, lambda one: one.turn > 0),
    }
    written = [turn.reply for dialogue in sealed for turn in dialogue.turns]
    variety = [variety_of([one.reply for one in told], written, size) for size in (2, 3)]
    checks = _checks(config, shares(found, [*GOOD, *BAD]))
    checks += [
        Check(name="distinct-3 beside written replies", value=variety[1], limit=config.distinct3_min, bound="at least"),
        Check(name="perplexity of sealed replies", value=perplexity, limit=config.perplexity_max, bound="at most"),
    ]
    if tuned:
        same = _of(found, told, lambda one: (one.visit, one.seed) in beside)
        measures |= {"some first replies": same, "float, the same": found_plain}
        ratio, worse = perplexity / figures["perplexity_float"], faults_of(same) - faults_of(found_plain)
        most, margin = config.perplexity_ratio_max, config.worse_than_float_max
        checks += [
            Check(name="perplexity of sealed replies, int4 over float", value=ratio, limit=most, bound="at most"),
            Check(name="faults of a reply, int4 less float", value=worse, limit=margin, bound="at most"),
        ]
    write_report(
        report,
        "replies",
        checks,
        engine_manifest=manifest_digest(engine_folder),
        sampling=sampling,
        questions=config.questions,
        replies=len(told),
        tokens=sum(one.tokens for one in told),
        distinct_2=round(variety[0], 4),
        distinct_3=round(variety[1], 4),
        **figures,
        measures={name: figures_of(verdicts, config.confidence) for name, verdicts in measures.items()},
        faults_by_kind={kind: round(faults_of(_of_kind(found, told, kind)), 4) for kind in KINDS},
        worst=_worst(told, found),
    )
    return checks


def some(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them, evenly from all; all if there are no more."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


class Talks:
    """Holds visits, with progress."""

    def __init__(self, speaker: Persona, sampling: Mapping[str, Any], together: int) -> None:
        self._speaker, self._sampling, self._together = speaker, sampling, together

    def answers(self, engine: Engine, visits: Sequence[tuple[Visit, int]], what: str) -> list[Answered]:
        """In the order of the visits, whoever ended first."""
        turns = sum(len(visit.moves) for visit, _ in visits)
        place = {(visit.line, seed): number for number, (visit, seed) in enumerate(visits)}
        held = hold(engine, self._speaker, visits, self._sampling, self._together)
        told = list(track(held, what, turns))
        return sorted(told, key=lambda one: (place[one.visit.line, one.seed], one.turn))


def perplexity_of(engine: Engine, speaker: Persona, dialogues: Sequence[Dialogue]) -> float:
    """Of the written replies, as the engine's own."""
    losses = []
    for dialogue in track(dialogues, "reading sealed replies"):
        tokens, own = speaker.told(dialogue, engine.tokenizer, engine.context)
        losses.append(-engine.score(tokens)[torch.tensor(own[1:])])
    return math.exp(torch.cat(losses).mean().item())


def world_of(
    author: Texts, visits: Sequence[Visit], told: Sequence[Answered], embedder: Path
) -> tuple[World, dict[str, Vector | None]]:
    """What the author's texts know, and the vectors of all moves and replies."""
    texts = [path.read_text(encoding="utf-8") for path in (author.persona, author.prologue)]
    stories, entries = read_stories(author.stories, author.schemas), read_entries(author.entries, author.schemas)
    texts += [text for dialogue in stories for turn in dialogue.turns for text in turn]
    texts += [text for entry in entries for text in (entry.answer, *entry.phrasings)]
    texts += [move for visit in visits for move in visit.moves]
    embed = Embedder(embedder)
    vectors = {text: _vector(embed, text) for one in told for text in (one.before[-1], one.reply)}
    pairs = [(vectors[one.before[-1]], vectors[one.reply]) for one in told]
    kept = [(move, reply) for move, reply in pairs if move is not None and reply is not None]
    moves, answers = (np.stack(side) for side in zip(*kept, strict=True))
    cosines = moves @ answers.T
    others = cosines[~np.eye(len(cosines), dtype=bool)]
    figures = read_document(author.visits / "figures.yaml", author.schemas / "figures.schema.json").content
    world = World(
        names=names_in(texts),
        figures=tuple(Figure(row["name"], frozenset(row["at"])) for row in figures),
        unsafe=frozenset(author.unsafe.read_text(encoding="utf-8").split()),
        alike=float(np.quantile(others, ALIKE_QUANTILE)) if len(others) else 1.0,
    )
    return world, vectors


def _vector(embed: Embedder, text: str) -> Vector | None:
    try:
        return embed.embed(text)
    except TextTooLongError:
        return None


def variety_of(told: Sequence[str], written: Sequence[str], size: int) -> float:
    """Distinct-n of replies in ratio to that of written ones, from equally many words: the more, the fewer are new."""
    count = min(len(words_of(" ".join(texts))) for texts in (told, written))
    ours, theirs = (distinct([" ".join(words_of(" ".join(texts))[:count])], size) for texts in (told, written))
    return ours / theirs


Verdict = dict[str, bool | None]


def judge_of(world: World, vectors: Mapping[str, Vector | None]) -> Callable[[Answered], Verdict]:
    def judge(one: Answered) -> Verdict:
        move, reply = vectors.get(one.before[-1]), vectors.get(one.reply)
        cosine = None if move is None or reply is None else float(move @ reply)
        heard = Heard(system=one.system, before=one.before, reply=one.reply, cut=one.cut, likeness=cosine)
        return judged(heard, world)

    return judge


def _checks(config: GateRepliesConfig, found: Mapping[str, tuple[int, int]]) -> list[Check]:
    upper = {
        "loops": config.loops_max,
        "cut by the limit": config.cut_max,
        "another language": config.other_faults_max,
        "leaks the system prompt": config.other_faults_max,
        "claims to be human": config.other_faults_max,
        "unsafe words": config.other_faults_max,
        "foreign names": config.foreign_names_max,
    }
    lower = {
        "ends in a choice": config.choices_min,
        "second person, present": config.second_person_min,
        "length as asked": config.length_min,
        "takes up the move": config.taken_up_min,
        "nobody unmet": config.nobody_unmet_min,
    }
    return [
        Check(
            name=f"{name}, upper limit", value=share_upper(*found[name], config.confidence), limit=most, bound="at most"
        )
        for name, most in upper.items()
    ] + [
        Check(
            name=f"{name}, lower limit",
            value=share_lower(*found[name], config.confidence),
            limit=least,
            bound="at least",
        )
        for name, least in lower.items()
    ]


def faults_of(verdicts: Sequence[Verdict]) -> float:
    """How many faults a reply has on average."""
    wrong = sum(one[name] is False for one in verdicts for name in GOOD)
    wrong += sum(one[name] is True for one in verdicts for name in BAD)
    return wrong / max(1, len(verdicts))


def _of(verdicts: Sequence[Verdict], told: Sequence[Answered], which: Callable[[Answered], bool]) -> list[Verdict]:
    return [verdict for verdict, one in zip(verdicts, told, strict=True) if which(one)]


def _of_kind(verdicts: Sequence[Verdict], told: Sequence[Answered], kind: str) -> list[Verdict]:
    return _of(verdicts, told, lambda one: one.visit.kind == kind)


def figures_of(verdicts: Sequence[Verdict], confidence: float) -> dict[str, dict[str, float]]:
    """Each measure's share, with its one-sided limits."""
    return {
        name: {
            "of": applies,
            "share": round(holds / max(1, applies), 4),
            "lower": round(share_lower(holds, applies, confidence), 4),
            "upper": round(share_upper(holds, applies, confidence), 4),
        }
        for name, (holds, applies) in shares(verdicts, [*GOOD, *BAD]).items()
    }


def _worst(told: Sequence[Answered], found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The replies with the most faults, with what led to them."""
    ranked = sorted(zip(told, found, strict=True), key=lambda pair: -faults_of([pair[1]]))[:WORST]
    return [
        {
            "move": one.before[-1],
            "reply": one.reply,
            "turn": one.turn + 1,
            "seed": one.seed + one.turn,
            "faults": [name for name in GOOD if verdict[name] is False] + [name for name in BAD if verdict[name]],
        }
        for one, verdict in ranked
    ]
