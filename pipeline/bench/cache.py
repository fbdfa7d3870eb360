"""The cache beside its peers: who answers rightly on the same questions, and what a lookup costs.

    make bench-cache

The peers' decision rules are applied to the vectors of the embedder as it comes (all-MiniLM-L6-v2), over the same
phrasings; their packages would download other embedders. GPTCache 0.1's default serves the nearest entry if four minus
the squared distance is at least 0.8 of four (SearchDistanceEvaluation); RedisVL's SemanticCache if the cosine distance
is at most 0.1; vCache learns for every entry how likely a similarity is right, here by a logistic regression for every
intent, from its phrasings, each left out once, and the contrast questions. The last line is JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from model.cpu import available_cores, family
from pipeline.author_data import Question, read_contrast, read_entries, read_validation
from pipeline.build_cache import build_index
from pipeline.configs import embedded
from pipeline.fingerprint import ROOT
from pipeline.progress import quiet_libraries, say
from pipeline.sources import locate
from pipeline.statistics import share_upper
from serving.cache import Cache, Hit
from serving.certificate import admit
from serving.embedder import Embedder

Vectors = NDArray[np.float32]
Decisions = Sequence[str | None]
"""The intent whose answer is given to each question; None for a miss."""
GPTCACHE_COSINE = 1 - (4 - 0.8 * 4) / 2
"""The squared distance of unit vectors is 2 - 2 * cosine."""
REDISVL_COSINE = 1 - 0.1
RISK = 0.02
"""What a tuned threshold and vCache's rule are asked to keep."""
QUESTION = "What would you tell me about the throne room in there?"
ROUNDS = 200
MANY = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and the times, and JSON as the last line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.bench.cache", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--build", type=Path, default=ROOT / "build/embedded", help="build folder, certified")
    options = parser.parse_args(arguments)
    quiet_libraries()
    os.environ["HF_HUB_OFFLINE"] = "1"
    load = _load(options.build)
    cache = Cache(options.build / "cache", Embedder(options.build / "embedder"))
    certificate = admit(cache, options.build / "certificate.json")
    if certificate is None:
        say(f"note: ours answers exact matches only: {cache.uncertified}")
    result: dict[str, Any] = {"cpu": family(), "threads": available_cores(), "load_ms": load}
    print(f"load: {load:.0f} ms", flush=True)
    result["decisions"] = _decisions(cache)
    result["lookup"] = _lookup_times(cache, options.build / "trained")
    result["search"] = _search_times(cache)
    print(json.dumps(result))
    return 0


def _load(build: Path) -> float:
    """Milliseconds to open and verify the cache, map its index and load the embedder; imports are paid before."""
    start = time.perf_counter()
    cache = Cache(build / "cache", Embedder(build / "embedder"))
    admit(cache, build / "certificate.json")
    cache.lookup(QUESTION)
    return 1e3 * (time.perf_counter() - start)


def _decisions(cache: Cache) -> dict[str, dict[str, float]]:
    data = ROOT / "cache_data"
    entries = read_entries(data / "entries", data / "schema")
    ids = {entry.id for entry in entries}
    dev = read_validation(data / "validation/dev", data / "schema", ids)
    cert = read_validation(data / "validation/cert", data / "schema", ids)
    apart = read_contrast(data / "contrast", data / "schema", ids)
    owners = np.array([entry for entry, _ in cache.phrasings])
    plain = _plain_embedder()
    phrasings = plain([text for _, text in cache.phrasings])
    asked = plain([question.text for question in cert])
    nearest = _nearest(asked, phrasings, owners)
    tuned = _tuned_threshold(dev, _nearest(plain([question.text for question in dev]), phrasings, owners))
    models = _logistic(owners, phrasings, plain([question.text for question in apart]))
    answers = [cache.lookup(question.text) for question in cert]
    rules: dict[str, Decisions] = {
        "emerald": [answer.entry if isinstance(answer, Hit) else None for answer in answers],
        "GPTCache's default": _above(nearest, GPTCACHE_COSINE),
        "RedisVL's default": _above(nearest, REDISVL_COSINE),
        f"MiniLM, threshold {tuned:.3f} tuned on dev": _above(nearest, tuned),
        "vCache's rule": [entry if models[entry](cosine) >= 1 - RISK else None for entry, cosine in nearest],
    }
    table = {name: _judged(cert, decided) for name, decided in rules.items()}
    print(f"| decision on {len(cert)} questions | hit rate | right of in-scope | wrong of hits | at most (95 %) |")
    print("|---|---:|---:|---:|---:|")
    for name, row in table.items():
        print(f"| {name} | {row['hit_rate']:.1%} | {row['recall']:.1%} | {row['false']:.1%} | {row['upper']:.1%} |")
    sys.stdout.flush()
    return table


def _plain_embedder() -> Callable[[Sequence[str]], Vectors]:
    from sentence_transformers import SentenceTransformer

    config = embedded().train_embedder
    model = SentenceTransformer(str(locate(config.source, config.sha256)), device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=128, normalize_embeddings=True, show_progress_bar=False)


def _nearest(asked: Vectors, phrasings: Vectors, owners: NDArray[Any]) -> list[tuple[str, float]]:
    cosines = asked @ phrasings.T
    rows = cosines.argmax(axis=1)
    return [(str(owners[row]), float(cosines[place, row])) for place, row in enumerate(rows)]


def _above(nearest: Sequence[tuple[str, float]], threshold: float) -> Decisions:
    return [entry if cosine >= threshold else None for entry, cosine in nearest]


def _tuned_threshold(questions: Sequence[Question], nearest: Sequence[tuple[str, float]]) -> float:
    """The lowest threshold at which at most `RISK` of the hits on these questions are wrong."""
    candidates = sorted(cosine for _, cosine in nearest)
    kept = [t for t in candidates if _judged(questions, _above(nearest, t))["false"] <= RISK]
    return kept[0] if kept else candidates[-1]


def _logistic(owners: NDArray[Any], phrasings: Vectors, apart: Vectors) -> Mapping[str, Callable[[float], float]]:
    """For every intent the chance that an answer at a cosine is right."""
    from sklearn.linear_model import LogisticRegression

    cosines = phrasings @ phrasings.T
    np.fill_diagonal(cosines, -1)
    seen: dict[str, list[tuple[float, bool]]] = {str(owner): [(1.0, True), (0.0, False)] for owner in set(owners)}
    for row, other in enumerate(cosines.argmax(axis=1)):
        seen[str(owners[other])].append((float(cosines[row, other]), bool(owners[other] == owners[row])))
    for entry, cosine in _nearest(apart, phrasings, owners):
        seen[entry].append((cosine, False))

    def chance(entry: str) -> Callable[[float], float]:
        found = np.array(seen[entry])
        model = LogisticRegression(C=100.0).fit(found[:, :1], found[:, 1])
        return lambda cosine: float(model.predict_proba([[cosine]])[0, 1])

    return {entry: chance(entry) for entry in seen}


def _judged(questions: Sequence[Question], decided: Decisions) -> dict[str, float]:
    pairs = list(zip(questions, decided, strict=True))
    hits = [(question, entry) for question, entry in pairs if entry is not None]
    false = sum(not question.fairly_answered_by(entry) for question, entry in hits)
    wanted = sum(question.intent is not None for question in questions)
    right = sum(question.intent is not None and question.fairly_answered_by(entry) for question, entry in hits)
    return {
        "hit_rate": len(hits) / len(questions),
        "recall": right / wanted,
        "false": false / len(hits) if hits else 0.0,
        "upper": share_upper(false, len(hits), 0.95),
    }


def _lookup_times(cache: Cache, trained: Path) -> dict[str, Any]:
    """A lookup beside sentence-transformers' `encode` of the same text, in turn, on one thread and on all."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(trained), device="cpu")
    actions = {
        "encode": lambda: model.encode(QUESTION, normalize_embeddings=True, show_progress_bar=False),
        "embed": lambda: cache.embedder.embed(QUESTION),
        "lookup": lambda: cache.lookup(QUESTION),
    }
    result = {}
    for threads in sorted({1, available_cores()}):
        torch.set_num_threads(threads)
        times = _in_turn(actions)
        result[f"{threads} threads"] = {
            **{name: _percentiles(values) for name, values in times.items()},
            "speedup": round(float(np.median(times["encode"] / times["lookup"])), 2),
        }
        print(f"{threads} threads: {result[f'{threads} threads']}", flush=True)
    return result


def _in_turn(actions: Mapping[str, Callable[[], object]]) -> dict[str, NDArray[np.float64]]:
    times = np.zeros((ROUNDS + 10, len(actions)))
    for number in range(len(times)):
        for place, action in enumerate(actions.values()):
            start = time.perf_counter()
            action()
            times[number, place] = time.perf_counter() - start
    return dict(zip(actions, times[10:].T, strict=True))


def _search_times(cache: Cache) -> dict[str, Any]:
    """The search among many phrasings, exhaustive and by graph, beside the embedding; and what the graph finds."""
    random = np.random.default_rng(1)
    own = cache.vectors
    vectors = own[random.integers(0, len(own), MANY)] + random.normal(0, 0.02, (MANY, own.shape[1])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat, graph = build_index(vectors, MANY), build_index(vectors, 0)
    asked = own[random.integers(0, len(own), ROUNDS)]
    count = cache.policy["neighbours"]
    exact, found = flat.search(asked, count)[1], graph.search(asked, count)[1]
    recall = np.mean([len(set(a) & set(b)) / count for a, b in zip(exact, found, strict=True)])
    vector = asked[:1]
    faiss.omp_set_num_threads(1)  # as a lookup does
    times = _in_turn({
        "embed": lambda: cache.embedder.embed(QUESTION),
        "flat": lambda: flat.search(vector, count),
        "graph": lambda: graph.search(vector, count),
    })  # fmt: skip
    result = {"vectors": MANY, **{name: _percentiles(values) for name, values in times.items()}}
    result["graph_recall"] = round(float(recall), 4)
    print(f"search: {result}", flush=True)
    return result


def _percentiles(seconds: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{share}_ms": round(1e3 * float(np.percentile(seconds, share)), 3) for share in (50, 99)}


if __name__ == "__main__":
    sys.exit(main())
