"""Certifies how often the cache answers wrongly, on questions that no one tuned on, and picks the threshold by that.

Learn-then-Test (Angelopoulos et al. 2021): a short grid of thresholds is fixed in the configuration. From the first on,
each is tested: "more than `risk` of the answers given by likeness are wrong" is rejected if the exact upper limit of
that share (Clopper and Pearson 1934) is at most `risk`. The walk ends at the first that is not rejected, so every
rejection may use the whole error budget (fixed-sequence testing), and the last one passed is served. With probability
`confidence`, over the drawing of the questions of `validation/cert`, what is certified holds.

The questions go through the very lookup that serves visitors. Defects that a share cannot show are refused outright: a
question that was also trained or tuned on, a cache whose answers are not the author's, an index in which a phrasing
does not find itself, a guard that objected to no near miss.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.artifact import file_digest, files_below
from model.errors import InputError
from pipeline.author_data import Entry, Question, check_apart, read_contrast, read_entries, read_validation
from pipeline.configs import CertifyCacheConfig
from pipeline.progress import track
from pipeline.statistics import share_lower, share_upper
from pipeline.verdict import Check, write_report
from serving.cache import Cache, Considered, Hit, Miss
from serving.certificate import sealed, write_certificate
from serving.embedder import Embedder

SHOWN = 20
"""At most this many wrong answers are listed in a report."""
SIMILARITY_OF_ITSELF = 0.999


class Asked(NamedTuple):
    """A question, and what the index says of it."""

    question: Question
    found: Considered | Miss


def run(
    config: CertifyCacheConfig,
    entries: Path,
    contrast: Path,
    validation: Path,
    schemas: Path,
    embedder_folder: Path,
    cache_folder: Path,
    certificate: Path,
    report: Path,
) -> list[Check]:
    """Writes the certificate, valid or void, and the report; returns the checks."""
    read = read_entries(entries, schemas)
    ids = {entry.id for entry in read}
    questions = read_validation(validation / "cert", schemas, ids)
    dev, apart = read_validation(validation / "dev", schemas, ids), read_contrast(contrast, schemas, ids)
    check_apart(read, {"contrast": apart, "validation/dev": dev, "validation/cert": questions})
    cache = Cache(cache_folder, Embedder(embedder_folder))
    _check_answers(cache, read)
    found = _self_retrieval(cache)
    asked = [Asked(question, _considered(cache, question.text)) for question in track(questions, "asking")]
    walk = [_counts(cache, asked, threshold, config.confidence) for threshold in config.grid]
    passed = next((place for place, row in enumerate(walk) if row["upper"] > config.risk), len(walk))
    chosen = walk[passed - 1] if passed else walk[0]
    exercised = Counter(
        name
        for question, found_ in asked
        if question.group == "near_misses" and isinstance(found_, Considered)
        for name in found_.objections
    )
    idle = [name for name in cache.policy["guards"] if not exercised[name]]
    share = found / len(cache.phrasings)
    reason = _why_void(config, passed, walk[0], idle, share)
    write_certificate(
        certificate,
        {
            "certified": reason is None,
            "reason": reason,
            "threshold": chosen["threshold"],
            "confidence": config.confidence,
            "risk": config.risk,
            "grid": config.grid,
            "false_hits": {name: chosen[name] for name in ("hits", "false", "upper")},
            "recall": chosen["recall"],
            "out_of_domain_rejected": chosen["out_of_domain_rejected"],
            "strata": chosen["strata"],
            "sealed": {**sealed(cache), "questions": _digest_of(validation / "cert")},
        },
    )
    checks = [
        Check(name="self-retrieval", value=share, limit=1.0, bound="at least"),
        Check(name="guards that met no near miss", value=len(idle), limit=0, bound="at most"),
        Check(
            name="recall of unseen phrasings",
            value=chosen["recall"]["value"],
            limit=config.recall_min,
            bound="at least",
        ),
        Check(
            name="out-of-domain questions rejected",
            value=chosen["out_of_domain_rejected"]["value"],
            limit=config.out_of_domain_rejected_min,
            bound="at least",
        ),
    ]
    if config.required:
        false = Check(
            name="wrong among semantic hits, upper limit", value=chosen["upper"], limit=config.risk, bound="at most"
        )
        checks.insert(0, false)
    write_report(
        report,
        "cache",
        checks,
        certified=reason is None,
        reason=reason,
        walk=[{name: row[name] for name in ("threshold", "hits", "false", "upper", "recall")} for row in walk],
        chosen=chosen,
        guards={name: exercised[name] for name in cache.policy["guards"]},
        policy=cache.policy,
        false_hits=_false_hits(cache, asked, chosen["threshold"])[:SHOWN],
        reasons=_reasons(cache, asked, chosen["threshold"]),
    )
    return checks


def _considered(cache: Cache, question: str) -> Considered | Miss:
    return cache.consider(question)


def _check_answers(cache: Cache, entries: Sequence[Entry]) -> None:
    """The cache must say what the author wrote, word by word."""
    for entry in entries:
        held = cache.entries.get(entry.id)
        if held is None or (held["answer"], tuple(held["phrasings"])) != (entry.answer, entry.phrasings):
            file = entry.places[0].rpartition(":")[0]
            raise InputError(
                f"the cache's answer or phrasings of {entry.id!r} are not those of {file}: "
                'it was changed after it was built; run "python -m pipeline run build_cache --force"'
            )


def _self_retrieval(cache: Cache) -> int:
    """How many phrasings lie in the index where they belong: a shuffled index finds none."""
    found = 0
    for row, (_, phrasing) in enumerate(track(cache.phrasings, "self-retrieval")):
        near = cache.nearest(cache.embedder.embed(phrasing), cache.policy["neighbours"])
        found += any(other == row and similarity > SIMILARITY_OF_ITSELF for similarity, other in near)
    return found


def _answer(cache: Cache, found: Considered | Miss, threshold: float) -> Hit | Miss:
    return found if isinstance(found, Miss) else cache.decide(found, threshold)


def _counts(cache: Cache, asked: Sequence[Asked], threshold: float, confidence: float) -> dict[str, Any]:
    """What happens at a threshold: hits, false hits, recall, and the same by stratum."""
    answers = [(question, _answer(cache, found, threshold)) for question, found in asked]
    hits = [(question, answer) for question, answer in answers if isinstance(answer, Hit)]
    false = [question for question, answer in hits if not question.fairly_answered_by(answer.entry)]
    wanted = [question for question, _ in answers if question.intent is not None]
    right = sum(question.intent is not None and question.fairly_answered_by(answer.entry) for question, answer in hits)
    elsewhere = [question for question, _ in answers if question.group == "out_of_domain"]
    kept_out = len(elsewhere) - sum(question.group == "out_of_domain" for question in false)
    asked_by = Counter(question.stratum for question, _ in answers)
    hits_by = Counter(question.stratum for question, _ in hits)
    false_by = Counter(question.stratum for question in false)
    return {
        "threshold": threshold,
        "hits": len(hits),
        "false": len(false),
        "upper": round(share_upper(len(false), len(hits), confidence), 6),
        "recall": _share(right, len(wanted), confidence),
        "out_of_domain_rejected": _share(kept_out, len(elsewhere), confidence),
        "strata": {
            name: {
                "n": n,
                "hits": hits_by[name],
                "false": false_by[name],
                "false_upper": round(share_upper(false_by[name], n, confidence), 4),
            }
            for name, n in sorted(asked_by.items())
        },
    }


def _share(k: int, n: int, confidence: float) -> dict[str, float]:
    return {"n": n, "value": round(k / n, 6), "lower": round(share_lower(k, n, confidence), 6)}


def _why_void(
    config: CertifyCacheConfig, passed: int, first: dict[str, Any], idle: Sequence[str], share: float
) -> str | None:
    if share < 1:
        return f"{1 - share:.2%} of the phrasings are not where they belong in the index"
    if idle:
        return f"guard {idle[0]!r} objected to no near miss, so nothing shows that it works"
    if not passed:
        return (
            f"at the first threshold, {first['threshold']:g}, {first['false']} of {first['hits']} answers were wrong: "
            f"at most {first['upper']:.2%} with {config.confidence:.0%} confidence, and {config.risk:.2%} was asked for"
        )
    return None


def _digest_of(folder: Path) -> dict[str, str]:
    return {str(name): file_digest(folder / name) for name in files_below(folder)}


def _false_hits(cache: Cache, asked: Sequence[Asked], threshold: float) -> list[dict[str, Any]]:
    answers = [(question, _answer(cache, found, threshold)) for question, found in asked]
    return [
        {
            "question": question.text,
            "stratum": question.stratum,
            "expected": question.intent,
            "answered_by": answer.entry,
        }
        for question, answer in answers
        if isinstance(answer, Hit) and not question.fairly_answered_by(answer.entry)
    ]


def _reasons(cache: Cache, asked: Sequence[Asked], threshold: float) -> dict[str, int]:
    answers = [_answer(cache, found, threshold) for _, found in asked]
    return dict(Counter(answer.reason.split(" (")[0] for answer in answers if isinstance(answer, Miss)).most_common(12))
