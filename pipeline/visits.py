"""Visits to the storyteller: what visitors say, written beforehand, and what a model replies to it, many at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.engine import Engine, Reply
from model.errors import InputError
from model.sampling import LogitsError, Sampling
from model.tokenizer import Message
from pipeline.author_data import read_document
from pipeline.stories import Persona, one_line


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One visitor's moves, oldest first."""

    kind: str
    choices: Mapping[str, str]
    """In the prologue, by scene."""
    moves: tuple[str, ...]
    line: str = field(default="", compare=False, repr=False)
    """"file:line"."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A move with the model's reply."""

    visit: Visit
    seed: int
    turn: int
    """0 for the first move."""
    system: str
    before: tuple[str, ...]
    """Moves and replies so far, oldest first, the answered move included."""
    reply: str
    tokens: int
    cut: bool
    """Whether the reply ran into the limit."""


def read_visits(file: Path, schemas: Path) -> list[Visit]:
    """All visits of a file. Raises InputError with file and line."""
    document = read_document(file, schemas / "visits.schema.json")
    return [
        Visit(
            kind=row["kind"],
            choices=row.get("choices", {}),
            moves=tuple(map(one_line, row["moves"])),
            line=document.at(number),
        )
        for number, row in enumerate(document.content)
    ]


def hold(
    engine: Engine, speaker: Persona, visits: Sequence[tuple[Visit, int]], manner: Mapping[str, Any], together: int
) -> Iterator[Answered]:
    """Replies to every move of every visit, each with its seed, in whatever order they end; `together` at a time.

    `manner` is the sampling as served, without seed. A conversation that outgrows the context ends there.
    """
    waiting = [_Talk(engine, speaker, visit, seed, manner) for visit, seed in reversed(visits)]
    talking: list[_Talk] = []
    try:
        while waiting or talking:
            while waiting and len(talking) < together:
                talk = waiting.pop()
                if talk.ask():
                    talking.append(talk)
            if not talking:
                return
            pieces = engine.step([talk.reply for talk in talking if talk.reply is not None])
            for talk, piece in zip(tuple(talking), pieces, strict=True):
                if isinstance(piece, LogitsError):
                    raise piece
                if piece is None:
                    continue
                talk.text += piece.text
                if piece.finish_reason is not None:
                    yield talk.answered(cut=piece.finish_reason == "length")
                    if not talk.ask():
                        talking.remove(talk)
    finally:
        for talk in talking:
            talk.close()


class _Talk:
    """A visit under way."""

    def __init__(self, engine: Engine, speaker: Persona, visit: Visit, seed: int, manner: Mapping[str, Any]) -> None:
        self._engine, self._visit, self._seed = engine, visit, seed
        self._manner = manner
        try:
            self._said: list[Message] = speaker.opening(visit.choices)
        except InputError as fault:
            raise InputError(f"{visit.line}: {fault}") from None
        self._turn = 0
        self.text = ""
        self.reply: Reply | None = None

    def ask(self) -> bool:
        """Says the next move; False if there is none, or no room for it."""
        if self._turn == len(self._visit.moves):
            return False
        self._said.append({"role": "user", "content": self._visit.moves[self._turn]})
        prompt = self._engine.tokenizer.encode_chat(self._said)
        if len(prompt) >= self._engine.context:
            return False
        self.text = ""
        self.reply = self._engine.open(prompt, Sampling(**self._manner, seed=self._seed + self._turn))
        return True

    def answered(self, *, cut: bool) -> Answered:
        """What was said, and closes the reply."""
        assert self.reply is not None
        before = tuple(message["content"] for message in self._said[1:])
        answered = Answered(
            visit=self._visit,
            seed=self._seed,
            turn=self._turn,
            system=self._said[0]["content"],
            before=before,
            reply=self.text.strip(),
            tokens=self.reply.tokens,
            cut=cut,
        )
        self.close()
        self._said.append({"role": "assistant", "content": self.text.strip()})
        self._turn += 1
        return answered

    def close(self) -> None:
        """Gives the reply's room back."""
        if self.reply is not None:
            self._engine.close(self.reply)
            self.reply = None
