"""Dialogues in the persona's voice: what the author wrote, and what the model reads of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import InputError
from model.tokenizer import Message, Tokenizer
from pipeline.author_data import read_document
from serving.persona import manner
from serving.prologue import system_prompt


class Turn(NamedTuple):
    """What the visitor says, and what the storyteller tells."""

    move: str
    reply: str


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation from its first move on."""

    place: str
    """Where it begins, in the author's words."""
    choices: Mapping[str, str]
    """What the visitor chose in the prologue, by scene."""
    turns: tuple[Turn, ...]
    line: str = field(default="", compare=False, repr=False)
    """"file:line"."""


class Told(NamedTuple):
    """A dialogue as the model reads it."""

    tokens: list[int]
    own: list[bool]
    """Which of the tokens the model has to say."""


class Persona:
    """Who speaks: persona and prologue, as `cache_data` has them."""

    def __init__(self, persona: Path, prologue: Path, schemas: Path) -> None:
        self.persona = read_persona(persona, schemas)
        self._prologue: Mapping[str, Any] = read_document(prologue, schemas / "prologue.schema.json").content

    def opening(self, choices: Mapping[str, str]) -> list[Message]:
        """What a conversation begins with after these choices in the prologue."""
        return [{"role": "system", "content": system_prompt(self.persona, self._prologue, choices)}]

    def told(self, dialogue: Dialogue, tokenizer: Tokenizer, longest: int) -> Told:
        """Raises InputError for a dialogue that is longer than `longest` tokens."""
        try:
            messages = self.opening(dialogue.choices)
        except InputError as fault:
            raise InputError(f"{dialogue.line}: {fault}") from None
        for turn in dialogue.turns:
            messages += [{"role": "user", "content": turn.move}, {"role": "assistant", "content": turn.reply}]
        try:
            told = Told(*tokenizer.encode_dialogue(messages))
        except InputError as fault:
            raise InputError(f"{dialogue.line}: {fault}; set tune.steps=0 to teach this model nothing") from None
        if len(told.tokens) > longest:
            raise InputError(
                f"{dialogue.line}: the dialogue has {len(told.tokens)} tokens with the persona's prompt, more than the "
                f"{longest} of the context; shorten it or divide it"
            )
        return told


def read_persona(file: Path, schemas: Path) -> dict[str, Any]:
    """The persona's file. Raises InputError for a sampling that is none, too."""
    persona: dict[str, Any] = read_document(file, schemas / "persona.schema.json").content
    for model in persona.get("sampling", {}):
        try:
            manner(persona, model)
        except InputError as fault:
            raise InputError(f"{file}: {fault}") from None
    return persona


def read_stories(folder: Path, schemas: Path) -> list[Dialogue]:
    """All dialogues of a folder's YAML files, file by file; no two may begin with the same reply."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise InputError(f"{folder}: no .yaml file; add dialogues as cache_data/stories/README.md shows")
    return [dialogue for file in files for dialogue in read_dialogues(file, schemas)]


def read_dialogues(file: Path, schemas: Path) -> list[Dialogue]:
    """The dialogues of one file. Raises InputError with file and line."""
    document = read_document(file, schemas / "stories.schema.json")
    dialogues: list[Dialogue] = []
    told: dict[str, str] = {}
    for number, row in enumerate(document.content):
        turns = tuple(Turn(one_line(turn["move"]), one_line(turn["reply"])) for turn in row["turns"])
        for index, turn in enumerate(turns):
            where = document.at(number, "turns", index)
            if turn.reply in told:
                raise InputError(f"{where}: the same reply stands at {told[turn.reply]}; write another")
            told[turn.reply] = where
        dialogues.append(
            Dialogue(place=row["place"], choices=row.get("choices", {}), turns=turns, line=document.at(number))
        )
    return dialogues


def check_sealed(taught: Sequence[Dialogue], sealed: Sequence[Dialogue]) -> None:
    """Raises InputError if a dialogue that judges holds a reply that was taught."""
    known = {turn.reply: dialogue.line for dialogue in taught for turn in dialogue.turns}
    for dialogue in sealed:
        for turn in dialogue.turns:
            if turn.reply in known:
                raise InputError(f"{dialogue.line}: a sealed reply stands at {known[turn.reply]} as well; keep one")


def one_line(text: str) -> str:
    """How a YAML file breaks its lines is the author's business."""
    return " ".join(text.split())


def digest(told: Sequence[Told]) -> str:
    """SHA-256 of what a model reads: dialogues, persona, chat template and tokenizer in one."""
    return hashlib.sha256(json.dumps([list(one) for one in told]).encode()).hexdigest()
