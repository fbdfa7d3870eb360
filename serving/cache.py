"""Ready answers: which one, if any, answers a question, and why.

A lookup is deterministic and explained: an exact match of the normalised text; else the nearest phrasings, the
guards, the margin to the next intent and the threshold, in that order. It ends in a `Hit`, or in a `Miss` with its
reason. The settings of the decision are stored with the index, so what a gate judged is what is served.
"""

import json
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from model.artifact import manifest_digest, read_manifest
from model.errors import InputError
from serving.embedder import Embedder, TextTooLongError, Vector
from serving.guards import GUARDS, Intent, lowered

LONGEST_QUESTION = 500
"""Characters; a longer message is a story, not a common question."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A ready answer for the question."""

    entry: str
    answer: str
    tier: Literal["exact", "semantic"]
    similarity: float
    """Cosine to the nearest phrasing; for reports and authors, never for clients."""
    phrasing: str


@dataclass(frozen=True, kw_only=True)
class Miss:
    """No ready answer, and the first reason why; `nearest` is what was considered, for reports and authors."""

    reason: str
    nearest: str | None = None
    similarity: float = 0.0


def normalise(text: str) -> str:
    """The form in which two texts are exactly the same question: case, punctuation and spacing do not count."""
    folded = lowered(unicodedata.normalize("NFKC", text)).replace("'", "")
    return " ".join("".join(letter if letter.isalnum() else " " for letter in folded).split())


class Cache:
    """An opened cache folder (kind "cache") with the embedder it was built with."""

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        manifest = read_manifest(folder, "cache")
        if manifest["embedder"] != embedder.digest:
            raise InputError(
                f"{folder}: built with embedder {manifest['embedder'][:12]}…, this one is {embedder.digest[:12]}…: "
                'run "python -m pipeline run build_cache"'
            )
        self.digest = manifest_digest(folder)
        self.policy: dict[str, Any] = manifest["policy"]
        content = json.loads((folder / "entries.json").read_text(encoding="utf-8"))
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in content["entries"]}
        self.phrasings = [(entry["id"], text) for entry in content["entries"] for text in entry["phrasings"]]
        self.persona: dict[str, str] = content["persona"]
        self.prologue: dict[str, Any] = content["prologue"]
        self.embedder = embedder
        self._exact = {normalise(text): row for row, (_, text) in enumerate(self.phrasings)}
        self._folder = folder
        self._intents = {name: Intent.of(entry["phrasings"], entry["answer"]) for name, entry in self.entries.items()}

    @cached_property
    def _index(self) -> Any:
        """Loaded at the first question that has no exact match: faiss takes a quarter of a second to import."""
        import faiss

        return faiss.read_index(str(self._folder / "index.faiss"))

    def lookup(self, question: str) -> Hit | Miss:
        """The ready answer to a question that stands alone, or why there is none."""
        key = normalise(question)
        if key in self._exact:
            return self._hit(self._exact[key], "exact", 1.0)
        if not key:
            return Miss(reason="there is no word in it")
        if len(question) > LONGEST_QUESTION:
            return Miss(reason=f"it is longer than {LONGEST_QUESTION} characters")
        if any(unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs") for letter in question.strip()):
            return Miss(reason="it holds control characters")
        try:
            vector = self.embedder.embed(question)
        except TextTooLongError as fault:
            return Miss(reason=str(fault))
        return self.decide(question, vector)

    def decide(self, question: str, vector: Vector, without: int | None = None) -> Hit | Miss:
        """The semantic tier's decision; `without` leaves one phrasing (a row of `phrasings`) out of the index."""
        neighbours, read = self.policy["neighbours"], lowered(question)
        near = [(score, row) for score, row in self.nearest(vector, neighbours + 1) if row != without][:neighbours]
        similarity, row = near[0]
        entry, _ = self.phrasings[row]
        if similarity < self.policy["threshold"]:
            return Miss(reason="nothing is near enough", nearest=entry, similarity=similarity)
        for guard in GUARDS.values():
            if reason := guard(read, self._intents[entry]):
                return Miss(reason=reason, nearest=entry, similarity=similarity)
        rival = next((score for score, other in near if self.phrasings[other][0] != entry), -1.0)
        if similarity - rival < self.policy["margin"]:
            return Miss(reason="two answers are equally near", nearest=entry, similarity=similarity)
        return self._hit(row, "semantic", similarity)

    def nearest(self, vector: Vector, count: int) -> list[tuple[float, int]]:
        """The most similar phrasings: (cosine, row in `phrasings`), best first."""
        similarities, rows = self._index.search(vector[None], count)
        return [(float(score), int(row)) for score, row in zip(similarities[0], rows[0], strict=True) if row >= 0]

    def _hit(self, row: int, tier: Literal["exact", "semantic"], similarity: float) -> Hit:
        entry, phrasing = self.phrasings[row]
        answer = self.entries[entry]["answer"]
        return Hit(entry=entry, answer=answer, tier=tier, similarity=similarity, phrasing=phrasing)
