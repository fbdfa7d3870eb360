"""Reads the author's YAML, and says what is wrong with it in the author's terms: file, line, remedy.

All scalars are text, so a phrasing may be `Yes` or `1900` without quotes. A key given twice is an error, where YAML
libraries would silently keep the last.
"""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from model.errors import InputError
from serving.text import normalise

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """One YAML file: its content, and the line of every part of it."""

    file: Path
    content: Any
    lines: dict[Place, int]

    def at(self, *place: str | int) -> str:
        """Gives "file:line" of a part, or of the nearest part that encloses it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.file}:{self.lines.get(place, 1)}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One intent: an answer and the phrasings that ask for it."""

    id: str
    answer: str
    phrasings: tuple[str, ...]
    places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """"file:line" of each phrasing."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with what may be said to it: a paraphrase, a near miss or one that is out of domain."""

    text: str
    stratum: str
    """File and kind or style, such as "near_misses/negation"."""
    intent: str | None = None
    """What must answer it; None means that nothing need."""
    near: str | None = None
    """The intent whose question it looks like, of a near miss."""
    also: tuple[str, ...] = ()
    """Other intents that answer it fairly, such as a rule that declines it."""
    place: str = field(default="", compare=False, repr=False)
    """"file:line"."""

    @property
    def group(self) -> str:
        """The file it stands in: "paraphrases", "near_misses" or "out_of_domain"."""
        return self.stratum.partition("/")[0]

    def fairly_answered_by(self, entry: str) -> bool:
        """Whether this intent's ready answer is a right reply."""
        return entry == self.intent or entry in self.also


def read_document(file: Path, schema: Path) -> Document:
    """Parses a YAML file and checks it against a JSON Schema. Raises InputError with file and line."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; see cache_data/README.md") from None
    except UnicodeDecodeError as fault:
        raise InputError(f"{file}: not UTF-8 text ({fault}); save it as UTF-8") from fault
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = mark.line + 1 if mark else 1
        problem = " ".join(part for part in (fault.context, fault.problem) if part)
        raise InputError(f"{file}:{line}: broken YAML: {problem}; check indentation, colons and quotes") from fault
    except yaml.YAMLError as fault:
        raise InputError(f"{file}: broken YAML: {fault}") from fault
    lines: dict[Place, int] = {}
    document = Document(file, None if node is None else _plain(node, file, (), lines), lines)
    mismatch = jsonschema.exceptions.best_match(_validator(schema).iter_errors(document.content))
    if mismatch is not None:
        place = document.at(*mismatch.absolute_path)
        raise InputError(f"{place}: {_in_words(mismatch)}; see cache_data/README.md")
    return document


def read_entries(folder: Path, schemas: Path) -> list[Entry]:
    """All intents of a folder's YAML files. No id and no phrasing may stand twice."""
    entries: list[Entry] = []
    ids: dict[str, str] = {}
    phrasings: dict[str, tuple[str, str]] = {}
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise InputError(f"{folder}: no .yaml file; add intents as cache_data/README.md shows")
    for file in files:
        document = read_document(file, schemas / "entries.schema.json")
        for number, row in enumerate(document.content):
            name = row["id"]
            if name in ids:
                raise InputError(
                    f"{document.at(number, 'id')}: intent {name!r} stands already at {ids[name]}, so it would have two "
                    "answers; merge them or rename one"
                )
            ids[name] = document.at(number, "id")
            places = [document.at(number, "phrasings", index) for index in range(len(row["phrasings"]))]
            for text, place in zip(row["phrasings"], places, strict=True):
                _add_phrasing(phrasings, text, name, place)
            entries.append(
                Entry(
                    id=name,
                    answer=_unwrapped(row["answer"]),
                    phrasings=tuple(row["phrasings"]),
                    places=tuple(places),
                )
            )
    return entries


def read_validation(folder: Path, schemas: Path, entries: Container[str]) -> list[Question]:
    """The three question files of a validation set (`validation/dev` or `validation/cert`)."""
    return _read_questions(folder, schemas, entries, ("paraphrases", "near_misses", "out_of_domain"))


def read_contrast(folder: Path, schemas: Path, entries: Container[str]) -> list[Question]:
    """Questions that no entry answers, and that the embedder learns to keep away from all of them."""
    return _read_questions(folder, schemas, entries, ("near_misses", "out_of_domain"))


def check_apart(entries: Iterable[Entry], sets: Mapping[str, Iterable[Question]]) -> None:
    """Raises InputError if a question of one set, in whatever order of words, is a phrasing or stands in another set.

    What is trained on, tuned on and judged on must be three things.
    """
    known = {
        _words(text): place for entry in entries for text, place in zip(entry.phrasings, entry.places, strict=True)
    }
    for name, questions in sets.items():
        found: dict[str, str] = {}
        for question in questions:
            words = _words(question.text)
            if words in known:
                raise InputError(
                    f"{question.place}: {question.text!r} of {name} has the same words as {known[words]}, so it would "
                    "judge what it taught; keep one"
                )
            found[words] = question.place
        known |= found


def _words(text: str) -> str:
    return " ".join(sorted(normalise(text).split())) or text


def _read_questions(folder: Path, schemas: Path, entries: Container[str], stems: Sequence[str]) -> list[Question]:
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for stem in stems:
        document = read_document(folder / f"{stem}.yaml", schemas / f"{stem}.schema.json")
        for number, row in enumerate(document.content):
            place = document.at(number, "question")
            key = " ".join(row["question"].casefold().split())
            if key in seen:
                raise InputError(f"{place}: the question stands already at {seen[key]}")
            seen[key] = place
            named = [(name, row[name]) for name in ("intent", "near") if name in row]
            for name, entry in [*named, *(("also", entry) for entry in row.get("also", ()))]:
                if entry not in entries:
                    raise InputError(f"{document.at(number, name)}: no intent {entry!r} in cache_data/entries")
            kind = row.get("kind") or row.get("style")
            questions.append(
                Question(
                    text=row["question"],
                    stratum=f"{stem}/{kind}" if kind else stem,
                    intent=row.get("intent"),
                    near=row.get("near"),
                    also=tuple(row.get("also", ())),
                    place=place,
                )
            )
    return questions


def _add_phrasing(known: dict[str, tuple[str, str]], text: str, entry: str, place: str) -> None:
    key = normalise(text)
    if not key:
        raise InputError(f"{place}: phrasing {text!r} holds no word; write a question")
    if key in known:
        other, where = known[key]
        whose = "of the same intent" if other == entry else f"of intent {other!r}"
        raise InputError(f"{place}: phrasing {text!r} of intent {entry!r} stands already at {where}, {whose}; keep one")
    known[key] = (entry, place)


def _plain(node: yaml.Node, file: Path, place: Place, lines: dict[Place, int]) -> Any:
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, file, (*place, index), lines) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    content: dict[str, Any] = {}
    for key, value in node.value:
        name = str(key.value)
        if name in content:
            raise InputError(
                f"{file}:{key.start_mark.line + 1}: {name!r} is given twice in one entry (first at line "
                f"{lines[(*place, name)]}); keep one"
            )
        content[name] = _plain(value, file, (*place, name), lines)
    return content


def _validator(schema: Path) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8")))


def _in_words(fault: jsonschema.ValidationError) -> str:
    """jsonschema's message, shortened where it would quote a whole document."""
    if fault.validator == "minItems" and isinstance(fault.instance, list):
        return f"{len(fault.instance)} given, at least {fault.validator_value} expected"
    if fault.validator == "type":
        kinds = {"array": "a list", "object": "a mapping", "string": "text"}
        return f"expected {kinds.get(str(fault.validator_value), fault.validator_value)}"
    return fault.message if len(fault.message) < 200 else fault.message[:200] + "…"


def _unwrapped(text: str) -> str:
    """Paragraphs of one line each: how a YAML file breaks its lines is the author's business."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def texts_of(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """(intent id, phrasing) of every phrasing, in the order of the index."""
    return ((entry.id, text) for entry in entries for text in entry.phrasings)
