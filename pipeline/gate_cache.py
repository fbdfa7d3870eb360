"""Judges the cache: every phrasing finds its own answer, traps are refused, unseen phrasings are answered rightly.

The questions of `validation/cert` go through the very lookup that serves visitors. A phrasing that would be answered
by another intent if it were left out of the index is a conflict: it is most likely listed under the wrong answer.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.author_data import ValidationQuestion, read_validation
from pipeline.configs import GateCacheConfig
from pipeline.progress import track
from pipeline.statistics import share_lower, share_upper
from pipeline.verdict import Check, write_report
from serving.cache import Cache, Hit, Miss
from serving.embedder import Embedder
from serving.guards import GUARDS

Decided = tuple[ValidationQuestion, Hit | Miss]
SHOWN = 20
"""At most this many wrong answers are listed in a report."""


def run(
    config: GateCacheConfig, validation: Path, schemas: Path, embedder_folder: Path, cache_folder: Path, report: Path
) -> list[Check]:
    """Writes the report and returns the checks."""
    embedder = Embedder(embedder_folder)
    cache = Cache(cache_folder, embedder)
    found, conflicts = _self_retrieval(cache, embedder)
    questions = read_validation(validation / "cert", schemas, set(cache.entries))
    decided = [(question, cache.lookup(question.question)) for question in track(questions, "asking")]
    groups = {
        name: [pair for pair in decided if pair[0].stratum.startswith(name)]
        for name in ("paraphrase", "near_misses", "out_of_domain")
    }
    right = sum(
        isinstance(answer, Hit) and answer.entry == question.intent for question, answer in groups["paraphrase"]
    )
    checks = [
        Check(
            name="self-retrieval", value=found / len(cache.phrasings), limit=config.self_retrieval_min, bound="at least"
        ),
        Check(name="conflicting phrasings", value=len(conflicts), limit=config.conflicts_max, bound="at most"),
        Check(name="recall", value=right / len(groups["paraphrase"]), limit=config.recall_min, bound="at least"),
    ]
    for group, what, limit in (
        ("paraphrase", "wrongly answered paraphrases", config.paraphrases_wrong_max),
        ("near_misses", "answered near misses", config.near_misses_answered_max),
        ("out_of_domain", "answered out-of-domain questions", config.out_of_domain_answered_max),
    ):
        upper = share_upper(len(_false_hits(groups[group])), len(groups[group]), config.confidence)
        checks.append(Check(name=f"{what}, upper limit", value=upper, limit=limit, bound="at most"))
    write_report(report, "cache", checks, **_details(config, cache, decided, conflicts))
    return checks


def _self_retrieval(cache: Cache, embedder: Embedder) -> tuple[int, list[dict[str, Any]]]:
    """How many phrasings are nearest to their own intent, and the conflicts among them."""
    found, conflicts = 0, []
    for row, (entry, phrasing) in enumerate(track(cache.phrasings, "self-retrieval")):
        vector = embedder.embed(phrasing)
        [(_, nearest)] = cache.nearest(vector, 1)
        exact = cache.lookup(phrasing)
        found += cache.phrasings[nearest][0] == entry and isinstance(exact, Hit) and exact.entry == entry
        other = cache.decide(phrasing, vector, without=row)
        if isinstance(other, Hit) and other.entry != entry:
            conflicts.append({"phrasing": phrasing, "listed_under": entry, "otherwise_answered_by": other.entry})
    return found, conflicts


def _false_hits(decided: Sequence[Decided]) -> list[Decided]:
    return [
        (question, answer)
        for question, answer in decided
        if isinstance(answer, Hit) and answer.entry != question.intent
    ]


def _details(
    config: GateCacheConfig, cache: Cache, decided: Sequence[Decided], conflicts: list[dict[str, Any]]
) -> dict[str, Any]:
    hits, wrong = sum(isinstance(answer, Hit) for _, answer in decided), _false_hits(decided)
    asked = Counter(question.stratum for question, _ in decided)
    answered = Counter(question.stratum for question, answer in decided if isinstance(answer, Hit))
    false = Counter(question.stratum for question, _ in wrong)
    paraphrases = [pair for pair in decided if pair[0].intent is not None]
    right = sum(isinstance(answer, Hit) and answer.entry == question.intent for question, answer in paraphrases)
    return {
        "cache_manifest": cache.digest,
        "policy": cache.policy,
        "guards": list(GUARDS),
        "served_hits": {
            "n": hits,
            "false": len(wrong),
            "false_share_upper": round(share_upper(len(wrong), hits, config.confidence), 4),
        },
        "recall": {
            "value": round(right / len(paraphrases), 4),
            "lower": round(share_lower(right, len(paraphrases), config.confidence), 4),
        },
        "strata": {
            name: {"n": n, "answered": answered[name], "false": false[name]} for name, n in sorted(asked.items())
        },
        "reasons": dict(
            Counter(answer.reason.split(" (")[0] for _, answer in decided if isinstance(answer, Miss)).most_common(12)
        ),
        "conflicts": conflicts[:SHOWN],
        "false_hits": [
            {
                "question": question.question,
                "stratum": question.stratum,
                "expected": question.intent,
                "answered_by": answer.entry,
            }
            for question, answer in wrong[:SHOWN]
            if isinstance(answer, Hit)
        ],
    }
