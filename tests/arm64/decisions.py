"""Decisions of an emulated Arm CPU beside this one's, on the same index: which questions flip?

    .venv/bin/python -m tests.arm64.decisions order >build/arm64/order.json
    tests/arm64/run.sh neoverse-n1 python3 -m tests.arm64.decisions embed <build/arm64/order.json >build/arm64/n1.json
    .venv/bin/python -m tests.arm64.decisions compare build/arm64/n1.json

The embedder is exported on the emulated CPU from the very weights in build/embedded/trained, and embeds the questions
of `validation/cert`, those nearest to the threshold first, a line each: wherever it is stopped, the comparison says how
far from the threshold all others are, and how far scores move. The comparison lays the vectors in this machine's index;
flips are named by file and line, since the questions are sealed.
"""

import json
import sys
import tempfile
from pathlib import Path

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


def order() -> None:
    """[number, distance of its score from the threshold] of all questions that have one, nearest first, as JSON."""
    cache, distances = opened(), {}
    assert cache.threshold is not None
    for number, question in enumerate(questions()):
        found = cache.consider(question.text)
        if not isinstance(found, Miss):
            distances[number] = abs(found.score - cache.threshold)
    json.dump(sorted(distances.items(), key=lambda item: item[1]), sys.stdout)


def embed() -> None:
    """Vectors of the questions that standard input names, in that order: a line of JSON each."""
    wanted, asked = json.load(sys.stdin), questions()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "embedder"
        export_embedder.run(embedded().export_embedder, BUILD / "trained", folder)
        embedder = Embedder(folder)
        for number, distance in wanted:
            vector = embedder.embed(asked[number].text).tolist()
            print(json.dumps({"cpu": family(), "question": number, "distance": distance, "vector": vector}), flush=True)


def compare(file: Path) -> None:
    """Prints every flipped decision, and how far scores moved."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    asked, cache = questions(), opened()
    there = {asked[line["question"]].text: np.array(line["vector"], dtype=np.float32) for line in lines}
    own, replay = cache.embedder, _Replay(there)
    cosines, moved, flips = [], [], []
    for question in (asked[line["question"]] for line in lines):
        here = cache.consider(question.text)
        cache.embedder = replay
        arm = cache.consider(question.text)
        cache.embedder = own
        assert not isinstance(here, Miss) and not isinstance(arm, Miss), question.place
        cosines.append(float(np.dot(there[question.text], own.embed(question.text))))
        moved.append(abs(here.score - arm.score))
        one, other = decided(cache, here), decided(cache, arm)
        if one != other:
            flips.append(f"{question.place}: {one} here, {other} there; scores {here.score:.5f}, {arm.score:.5f}")
    print(f"{len(cosines)} questions, {family()} and {lines[0]['cpu']}: {len(flips)} decisions differ")
    print(f"least cosine {min(cosines):.6f}; scores move by {np.mean(moved):.1e} on average, {max(moved):.1e} at most")
    print(f"any other question's score is {lines[-1]['distance']:.1e} or more from the threshold")
    for flip in flips:
        print(flip)


def opened() -> Cache:
    cache = Cache(BUILD / "cache", Embedder(BUILD / "embedder"))
    assert admit(cache, BUILD / "certificate.json") is not None, cache.uncertified
    return cache


def decided(cache: Cache, found: Considered) -> str:
    assert cache.threshold is not None
    answer = cache.decide(found, cache.threshold)
    return answer.entry if isinstance(answer, Hit) else "a miss"


class _Replay(Embedder):
    """An embedder whose vectors were made elsewhere."""

    def __init__(self, vectors: dict[str, Vector]) -> None:
        self._vectors = vectors

    def embed(self, text: str) -> Vector:
        return self._vectors[text]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["order"]:
            order()
        case ["embed"]:
            embed()
        case ["compare", vectors]:
            compare(Path(vectors))
