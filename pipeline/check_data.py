"""Tells an author what is wrong in `cache_data`, what is doubtful, and which phrasings would be worth adding.

Errors are what a build would refuse, from every file at once. Warnings and suggestions need the embedder and cache of
an earlier build: phrasings of two intents that lie almost on each other, intents that questions of `validation/dev`
miss, and, for questions that a server could not answer (`--misses`), the intent that each would belong to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from model.errors import InputError
from pipeline.author_data import (
    Entry,
    Question,
    check_apart,
    read_contrast,
    read_document,
    read_entries,
    read_validation,
)
from pipeline.progress import track
from pipeline.reply_measures import sentences
from pipeline.stories import Dialogue, check_sealed, read_dialogues, read_persona, read_stories
from pipeline.visits import read_visits
from serving.cache import Cache, Considered, Hit
from serving.certificate import admit
from serving.embedder import Embedder
from serving.text import normalise

Result = TypeVar("Result")
ALIKE = 0.95
"""Cosine from which phrasings of two intents are called near-duplicates."""
SHOWN = 30
"""At most this many near-duplicates are named, the nearest first."""
BELOW = 0.1
"""A missed question whose score is at most this far below the threshold is worth a look."""


class Findings(NamedTuple):
    """Lines for the author, each with file and line."""

    errors: list[str]
    warnings: list[str]
    suggestions: list[str]


def check(data: Path, build: Path, misses: Path | None = None) -> Findings:
    """Reads the whole of `data`; `build` is where embedder, cache and certificate are, if they were built."""
    errors: list[str] = []
    schemas = data / "schema"

    def attempt(read: Callable[..., Result], *arguments: Any) -> Result | None:
        try:
            return read(*arguments)
        except InputError as fault:
            errors.append(str(fault))
            return None

    attempt(read_persona, data / "persona.yaml", schemas)
    attempt(read_document, data / "prologue.yaml", schemas / "prologue.schema.json")
    voice = _check_voice(data, schemas, attempt)
    entries = attempt(read_entries, data / "entries", schemas)
    if entries is None:
        return Findings(errors, [*voice, "the questions were not looked at, because they name intents"], [])
    ids = {entry.id for entry in entries}
    sets = {
        "contrast": attempt(read_contrast, data / "contrast", schemas, ids),
        "validation/dev": attempt(read_validation, data / "validation/dev", schemas, ids),
        "validation/cert": attempt(read_validation, data / "validation/cert", schemas, ids),
    }
    attempt(check_apart, entries, {name: found for name, found in sets.items() if found is not None})
    if not (build / "cache").is_dir():
        return Findings(errors, [*voice, f"no cache in {build}, so likeness was not looked at: run make pipeline"], [])
    cache = Cache(build / "cache", Embedder(build / "embedder"))
    admit(cache, build / "certificate.json")
    warnings = (
        [] if _is_of(cache, entries) else [f"{build}/cache is of an earlier state of the entries: run make pipeline"]
    )
    warnings += [*voice, *_near_duplicates(cache, entries)]
    if cache.threshold is None:
        return Findings(errors, [*warnings, f"nothing is answered by likeness: {cache.uncertified}"], [])
    warnings += _missed(cache, sets["validation/dev"] or [])
    return Findings(errors, warnings, list(_suggestions(cache, entries, misses)) if misses else [])


def _check_voice(data: Path, schemas: Path, attempt: Callable[..., Any]) -> list[str]:
    """Reads dialogues and visits; warns of replies that are not as the persona is asked to speak."""
    taught: list[Dialogue] = attempt(read_stories, data / "stories", schemas) or []
    sealed: list[Dialogue] = attempt(read_dialogues, data / "replies/sealed.yaml", schemas) or []
    for name in ("dev", "cert"):
        attempt(read_visits, data / f"replies/{name}.yaml", schemas)
    attempt(check_sealed, taught, sealed)
    endings = [(dialogue.line, "".join(sentences(turn.reply)[-1:])) for dialogue in taught for turn in dialogue.turns]
    return [
        f"{line}: a reply ends in neither a question nor a choice: {ending!r}"
        for line, ending in endings
        if "?" not in ending and " or" not in ending
    ]


def _is_of(cache: Cache, entries: Sequence[Entry]) -> bool:
    return cache.phrasings == [(entry.id, text) for entry in entries for text in entry.phrasings]


def _near_duplicates(cache: Cache, entries: Sequence[Entry]) -> list[str]:
    owned = [
        (entry.id, text, place) for entry in entries for text, place in zip(entry.phrasings, entry.places, strict=True)
    ]
    known = dict(zip([text for _, text in cache.phrasings], cache.vectors, strict=False))  # contrast follows
    new = [text for _, text, _ in owned if text not in known]
    known |= {text: cache.embedder.embed(text) for text in track(new, "embedding new phrasings")}
    vectors = np.stack([known[text] for _, text, _ in owned])
    pairs = []
    for row, (entry, _, _) in enumerate(owned):
        cosines = vectors[row + 1 :] @ vectors[row]
        for offset in np.flatnonzero(cosines >= ALIKE):
            other = row + 1 + int(offset)
            if owned[other][0] != entry:
                pairs.append((float(cosines[offset]), row, other))
    pairs.sort(reverse=True)
    lines = [
        f"{owned[one][2]}: {owned[one][1]!r} of {owned[one][0]!r} is nearly {owned[other][1]!r} of {owned[other][0]!r} "
        f"({owned[other][2]}), cosine {cosine:.3f}; reword or drop one"
        for cosine, one, other in pairs[:SHOWN]
    ]
    return lines + ([f"and {len(pairs) - SHOWN} more such pairs"] if len(pairs) > SHOWN else [])


def _missed(cache: Cache, questions: Iterable[Question]) -> list[str]:
    lines = []
    for question in track([question for question in questions if question.intent], "asking"):
        answer = cache.lookup(question.text)
        if isinstance(answer, Hit):
            if not question.fairly_answered_by(answer.entry):
                lines.append(
                    f"{question.place}: {question.text!r} should find {question.intent!r}, finds {answer.entry!r}"
                )
        else:
            lines.append(f"{question.place}: {question.text!r} misses {question.intent!r}: {answer.reason}")
    return lines


def _suggestions(cache: Cache, entries: Sequence[Entry], misses: Path) -> Iterator[str]:
    """Missed questions that would be phrasings of an intent, if the author agrees; the likeliest first."""
    try:
        lines = misses.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"--misses {misses}: {fault}; give a UTF-8 text file with a question on each line") from fault
    assert cache.threshold is not None
    places = {entry.id: entry.places[-1] for entry in entries}
    found: dict[str, tuple[float, str]] = {}
    for line in dict.fromkeys(line.strip() for line in lines if normalise(line)):
        considered = cache.consider(line)
        if isinstance(considered, Considered) and not considered.objections and considered.entry in places:
            short = cache.threshold - considered.score
            if 0 < short <= BELOW:
                found[line] = (short, considered.entry)
    for line, (short, entry) in sorted(found.items(), key=lambda item: item[1]):
        yield f"{places[entry]}: {entry!r} might gain {line!r}, which is {short:.3f} short of a hit"
