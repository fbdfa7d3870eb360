"""Ready answers: which one, if any, answers a question, and why.

A lookup is deterministic and explained. The normalised text of a phrasing is an exact hit. Else the question is laid
among the vectors of all phrasings and of the contrast questions, which no answer fits:

    score = likeness to the nearest intent
            - contrast_weight * likeness to whatever else is nearest - novelty_weight * novelty

where the likeness to an intent is the mean cosine of its `agreeing` nearest phrasings, that to the contrast questions
the cosine of the nearest, and novelty the share of words that no text of the intent uses. It is a hit if the score
reaches the certified threshold and no guard objects. The settings are stored with the index and the
threshold in the certificate, so what a gate judged is what is served. Without a certificate only exact matches answer.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.artifact import manifest_digest, read_manifest
from model.errors import InputError
from serving.embedder import Embedder, TextTooLongError, Vector
from serving.guards import GUARDS, Intent, novelty
from serving.text import lowered, normalise

LONGEST_QUESTION = 500
"""Characters; a longer message is a story, not a common question."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A ready answer for the question."""

    entry: str
    answer: str
    tier: Literal["exact", "semantic"]


@dataclass(frozen=True, kw_only=True)
class Miss:
    """No ready answer, and the first reason why."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Considered:
    """What the index says of a question, whatever the threshold; for gates and authors, never for clients."""

    entry: str
    """The nearest intent."""
    phrasing: str
    """The nearest phrasing of it, and its cosine."""
    similarity: float
    rival: str
    """The nearest text that is not of this intent, and its cosine."""
    rival_similarity: float
    novelty: float
    """Share of the question's words that no text of the intent uses."""
    score: float
    objections: dict[str, str]
    """Each guard that objects, and why."""


class Cache:
    """An opened cache folder (kind "cache") with the embedder it was built with.

    `threshold` is what a certificate sets; as long as it is None, `uncertified` is why.
    """

    def __init__(self, folder: Path, embedder: Embedder, revoked: Iterable[str] = ()) -> None:
        manifest = read_manifest(folder, "cache")
        if manifest["embedder"] != embedder.digest:
            raise InputError(
                f"{folder}: built with embedder {manifest['embedder'][:12]}…, this one is {embedder.digest[:12]}…: "
                'run "python -m pipeline run build_cache"'
            )
        self._folder = folder
        self.digest = manifest_digest(folder)
        self.policy: dict[str, Any] = manifest["policy"]
        content = json.loads((folder / "entries.json").read_text(encoding="utf-8"))
        self.entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in content["entries"]}
        self.phrasings = [(entry["id"], text) for entry in content["entries"] for text in entry["phrasings"]]
        self.contrast: list[str] = content["contrast"]
        self.persona: dict[str, Any] = content["persona"]
        self.prologue: dict[str, Any] = content["prologue"]
        self.embedder = embedder
        self.threshold: float | None = None
        self.uncertified = "no certificate was presented"
        self._revoked = self._known(revoked)
        self._exact = {normalise(text): entry for entry, text in self.phrasings}
        self._intents: dict[str, Intent] = {}

    def lookup(self, question: str) -> Hit | Miss:
        """The ready answer to a question that stands alone, or why there is none."""
        exact = self._exact.get(normalise(question))
        if exact is not None:
            return self._hit(exact, "exact")
        if self.threshold is None:
            return Miss(reason=f"only exact matches answer: {self.uncertified}")
        found = self.consider(question)
        return found if isinstance(found, Miss) else self.decide(found, self.threshold)

    def consider(self, question: str) -> Considered | Miss:
        """What lies nearest to a question, and what the guards say; a Miss if it is none that can be embedded."""
        if not normalise(question):
            return Miss(reason="there is no word in it")
        if len(question) > LONGEST_QUESTION:
            return Miss(reason=f"it is longer than {LONGEST_QUESTION} characters")
        if any(unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs") for letter in question.strip()):
            return Miss(reason="it holds control characters")
        try:
            vector = self.embedder.embed(question)
        except TextTooLongError as fault:
            return Miss(reason=str(fault))
        return self._weigh(question, self.nearest(vector, self.policy["neighbours"]))

    def prepare(self) -> None:
        """Reads all intents as the guards do, which the first question near to each would wait for."""
        for entry in self.entries:
            self._intent(entry)

    def decide(self, found: Considered, threshold: float) -> Hit | Miss:
        """The semantic tier's decision at a threshold."""
        if found.score < threshold:
            nothing = found.rival_similarity < found.similarity
            return Miss(reason="nothing is near enough" if nothing else "it is nearer to what no answer fits")
        for reason in found.objections.values():
            return Miss(reason=reason)
        return self._hit(found.entry, "semantic")

    def nearest(self, vector: Vector, count: int) -> list[tuple[float, int]]:
        """The most similar texts: (cosine, row), best first; rows count `phrasings`, then `contrast`."""
        import faiss

        faiss.omp_set_num_threads(1)  # of this thread; one question has nothing to share out, and idle helpers spin
        similarities, rows = self._index.search(vector[None], count)
        return [(float(score), int(row)) for score, row in zip(similarities[0], rows[0], strict=True) if row >= 0]

    @property
    def vectors(self) -> NDArray[np.float32]:
        """The index's vectors [rows, dimensions], copied out."""
        vectors: NDArray[np.float32] = self._index.reconstruct_n(0, len(self.phrasings) + len(self.contrast))
        return vectors

    @cached_property
    def _index(self) -> Any:
        """Mapped at the first question that has no exact match: faiss takes a quarter of a second to import."""
        import faiss

        return faiss.read_index(str(self._folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)

    def _weigh(self, question: str, near: Sequence[tuple[float, int]]) -> Considered | Miss:
        by_owner: dict[str | None, list[tuple[float, int]]] = {}
        for similarity, row in near:
            by_owner.setdefault(self._owner(row), []).append((similarity, row))
        likeness = {owner: self._likeness(owner, found, near[-1][0]) for owner, found in by_owner.items()}
        ranked = sorted(likeness, key=likeness.__getitem__, reverse=True)
        entry = next((owner for owner in ranked if owner is not None), None)
        if entry is None:
            return Miss(reason="it is nearer to what no answer fits")
        others = [owner for owner in ranked if owner != entry]
        against = likeness[others[0]] if others else near[-1][0]
        rival_similarity, rival = by_owner[others[0]][0] if others else near[-1]
        similarity, row = by_owner[entry][0]
        read, intent = lowered(question), self._intent(entry)
        verdicts = {name: GUARDS[name](read, intent) for name in self.policy["guards"]}
        new = novelty(read, intent)
        return Considered(
            entry=entry,
            phrasing=self.phrasings[row][1],
            similarity=similarity,
            rival=self._text(rival),
            rival_similarity=rival_similarity,
            novelty=new,
            score=likeness[entry] - self.policy["contrast_weight"] * against - self.policy["novelty_weight"] * new,
            objections={name: reason for name, reason in verdicts.items() if reason},
        )

    def _likeness(self, owner: str | None, found: Sequence[tuple[float, int]], farthest: float) -> float:
        """Phrasings beyond the neighbours count as near as the farthest of them, which is the most they can be."""
        if owner is None:
            return found[0][0]
        agreeing: int = self.policy["agreeing"]
        similarities = [similarity for similarity, _ in found[:agreeing]]
        return (sum(similarities) + farthest * (agreeing - len(similarities))) / agreeing

    def _intent(self, entry: str) -> Intent:
        if entry not in self._intents:
            known = self.entries[entry]
            self._intents[entry] = Intent.of(known["phrasings"], known["answer"])
        return self._intents[entry]

    def _owner(self, row: int) -> str | None:
        return self.phrasings[row][0] if row < len(self.phrasings) else None

    def _text(self, row: int) -> str:
        return self.phrasings[row][1] if row < len(self.phrasings) else self.contrast[row - len(self.phrasings)]

    def _known(self, revoked: Iterable[str]) -> frozenset[str]:
        unknown = sorted(set(revoked) - self.entries.keys())
        if unknown:
            raise InputError(f"cannot revoke {unknown[0]!r}: no intent of that id in {self._folder}")
        return frozenset(revoked)

    def _hit(self, entry: str, tier: Literal["exact", "semantic"]) -> Hit | Miss:
        if entry in self._revoked:
            return Miss(reason="its ready answer was revoked")
        return Hit(entry=entry, answer=self.entries[entry]["answer"], tier=tier)
