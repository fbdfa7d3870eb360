"""Decisions of an emulated Arm CPU beside this one's, on the same index: which questions flip?

    tests/arm64/run.sh max python3 -m tests.arm64.decisions embed >build/arm64/vectors.json
    .venv/bin/python -m tests.arm64.decisions compare build/arm64/vectors.json

The embedder is exported on the emulated CPU from the very weights in build/embedded/trained, and embeds the questions
of `validation/cert`. The comparison lays those vectors in this machine's index; flips are named by file and line, since
the questions are sealed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from model.cpu import family
from pipeline import export_embedder
from pipeline.author_data import Question, read_entries, read_validation
from pipeline.configs import embedded
from serving.cache import Cache, Considered, Hit, Miss
from serving.certificate import admit
from serving.embedder import Embedder, Vector
from tests.conftest import ROOT

BUILD, DATA = ROOT / "build/embedded", ROOT / "cache_data"


def questions() -> list[Question]:
    ids = {entry.id for entry in read_entries(DATA / "entries", DATA / "schema")}
    return read_validation(DATA / "validation/cert", DATA / "schema", ids)


def embed() -> None:
    """Vectors of all questions, as JSON on standard output."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "embedder"
        export_embedder.run(embedded().export_embedder, BUILD / "trained", folder)
        embedder = Embedder(folder)
        vectors = [embedder.embed(question.text).tolist() for question in questions()]
    json.dump({"cpu": family(), "vectors": vectors}, sys.stdout)


def compare(file: Path) -> None:
    """Prints every flipped decision, and how far scores moved."""
    there = json.loads(file.read_text(encoding="utf-8"))
    cache = Cache(BUILD / "cache", Embedder(BUILD / "embedder"))
    assert admit(cache, BUILD / "certificate.json") is not None, cache.uncertified
    replay = _Replay(dict(zip([question.text for question in questions()], there["vectors"], strict=True)))
    cosines, moved, flips = [], [], []
    for question in questions():
        cache.embedder, own = replay, cache.embedder
        arm = cache.consider(question.text)
        cache.embedder = own
        here = cache.consider(question.text)
        if isinstance(here, Miss) or isinstance(arm, Miss):
            assert type(here) is type(arm), question.place
            continue
        cosines.append(float(np.dot(replay.embed(question.text), own.embed(question.text))))
        moved.append(abs(here.score - arm.score))
        one, other = decided(cache, here), decided(cache, arm)
        if one != other:
            flips.append(f"{question.place}: {one} here, {other} there; scores {here.score:.5f}, {arm.score:.5f}")
    print(f"{len(cosines)} questions, {family()} and {there['cpu']}: {len(flips)} decisions differ")
    print(f"least cosine {min(cosines):.6f}; scores move by {np.mean(moved):.1e} on average, {max(moved):.1e} at most")
    for flip in flips:
        print(flip)


def decided(cache: Cache, found: Considered) -> str:
    assert cache.threshold is not None
    answer = cache.decide(found, cache.threshold)
    return answer.entry if isinstance(answer, Hit) else "a miss"


class _Replay(Embedder):
    """An embedder whose vectors were made elsewhere."""

    def __init__(self, vectors: dict[str, Any]) -> None:
        self._vectors = vectors

    def embed(self, text: str) -> Vector:
        return np.array(self._vectors[text], dtype=np.float32)


if __name__ == "__main__":
    if sys.argv[1] == "embed":
        embed()
    else:
        compare(Path(sys.argv[2]))
