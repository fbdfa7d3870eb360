"""A certificate is given to a sound cache and refused for every defect planted in it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import yaml

from model.artifact import MANIFEST, write_manifest
from model.errors import InputError
from pipeline import build_cache, certify_cache
from pipeline.configs import CertifyCacheConfig, embedded
from pipeline.statistics import share_upper
from pipeline.verdict import Check
from serving import guards
from serving.cache import Cache
from serving.certificate import admit, read_certificate
from serving.embedder import Embedder
from tests.conftest import ROOT

DATA = ROOT / "cache_data"
SCHEMAS = DATA / "schema"
Report = dict[str, Any]

PHRASINGS = {
    "the-wizard": [
        "Who is the Wizard?",
        "Who is the Wizard of Oz?",
        "Tell me about the Wizard",
        "I'd like to know who the Wizard is",
        "Who is that Wizard in Oz?",
        "Could you tell me who the Wizard is?",
        "the wizard of oz, who is that",
        "Who is the Wizard really?",
    ],
    "silver-shoes": [
        "What can the silver shoes do?",
        "What power do the silver shoes have?",
        "Tell me about the silver shoes",
        "I'd like to know what the silver shoes do",
        "What magic is in the silver shoes?",
        "Do the silver shoes have a power?",
        "Could you tell me what the silver shoes can do?",
        "the silver shoes, what magic do they have",
    ],
    "yellow-road": [
        "Which way does the yellow brick road lead?",
        "Tell me about the yellow brick road",
        "What is at the end of the yellow brick road?",
        "I'd like to know which way the yellow brick road leads",
        "Does the yellow brick road lead to the city?",
        "To which city does the yellow brick road lead?",
        "the yellow brick road, which city does it lead to",
        "Could you tell me which way the yellow brick road goes?",
    ],
}
PARAPHRASES = {
    "Can you tell me about the Wizard of Oz?": "the-wizard",
    "Can you tell me who the Wizard of Oz is?": "the-wizard",
    "What magic power do the silver shoes have?": "silver-shoes",
    "Please tell me about the silver shoes": "silver-shoes",
    "Which city is at the end of the yellow brick road?": "yellow-road",
    "Please tell me about the yellow brick road": "yellow-road",
}
TRAPS = {"Who is not the Wizard?": "the-wizard", "What can the silver shoes not do?": "silver-shoes"}
ELSEWHERE = ["What is 17 times 23?", "Write me a sorting function in Rust"]
CONTRAST = {"Who never was the Wizard?": "the-wizard"}
LIMITS = CertifyCacheConfig(
    confidence=0.95,
    risk=0.4,  # 0 of 6 gives 0.393
    grid=(0.3, 0.2),
    required=True,
    recall_min=1.0,
    out_of_domain_rejected_min=1.0,
)


def read(path: Path) -> Report:
    content: Report = json.loads(path.read_text(encoding="utf-8"))
    return content


def reseal(folder: Path) -> None:
    """Makes a tampered folder's manifest true again, so that only the certifier can notice."""
    manifest = read(folder / MANIFEST)
    kind = manifest.pop("kind")
    write_manifest(folder, kind, {name: manifest[name] for name in manifest if name not in ("format", "files")})


class SmallCache:
    """A tree of an author's files with three intents, to be edited, built and judged."""

    def __init__(self, root: Path, embedder: Path) -> None:
        self.root, self.embedder, self.cache = root, embedder, root / "cache"
        self.certificate = root / "certificate.json"
        self.phrasings = {name: list(texts) for name, texts in PHRASINGS.items()}
        self.traps, self.elsewhere = dict(TRAPS), list(ELSEWHERE)
        self.policy = replace(embedded().build_cache, guards=("negation",), agreeing=1, novelty_weight=0.0)

    def write(self) -> None:
        entries = [{"id": name, "answer": f"{name}.", "phrasings": texts} for name, texts in self.phrasings.items()]
        self._write("entries/all.yaml", entries)
        paraphrases = [{"question": text, "intent": name} for text, name in PARAPHRASES.items()]
        traps = [{"question": text, "kind": "negation", "near": name} for text, name in self.traps.items()]
        elsewhere = [{"question": text, "kind": "code"} for text in self.elsewhere]
        for part in ("cert", "dev"):
            other = [{**row, "question": f"{part} {row['question']}"} for row in [*paraphrases, *traps, *elsewhere]]
            rows = [*paraphrases, *traps, *elsewhere] if part == "cert" else other
            self._write(f"validation/{part}/paraphrases.yaml", rows[: len(paraphrases)])
            self._write(f"validation/{part}/near_misses.yaml", rows[len(paraphrases) : -len(elsewhere)])
            self._write(f"validation/{part}/out_of_domain.yaml", rows[-len(elsewhere) :])
        apart = [{"question": text, "kind": "negation", "near": name} for text, name in CONTRAST.items()]
        self._write("contrast/near_misses.yaml", apart)
        self._write("contrast/out_of_domain.yaml", [{"question": "What is nine times nine?", "kind": "mathematics"}])

    def build(self) -> None:
        self.write()
        own = (DATA / "persona.yaml", DATA / "prologue.yaml", SCHEMAS)
        build_cache.run(self.policy, self.root / "entries", self.root / "contrast", *own, self.embedder, self.cache)

    def judge(self, config: CertifyCacheConfig = LIMITS) -> list[Check]:
        sources = (self.root / "entries", self.root / "contrast", self.root / "validation", SCHEMAS)
        outputs = (self.certificate, self.root / "cache.json")
        return certify_cache.run(config, *sources, self.embedder, self.cache, *outputs)

    def refused(self) -> str:
        """Why the server does not take the certificate."""
        cache = self.opened()
        assert admit(cache, self.certificate) is None
        assert cache.threshold is None
        return cache.uncertified

    def opened(self) -> Cache:
        return Cache(self.cache, Embedder(self.embedder))

    def judged(self) -> Report:
        return read(self.root / "cache.json")

    def _write(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(yaml.safe_dump(list(rows), sort_keys=False))


def failed(checks: Sequence[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.fixture
def small(tmp_path: Path, embedded_build: Path) -> SmallCache:
    return SmallCache(tmp_path, embedded_build / "embedder")


def test_our_own_cache_is_certified(embedded_build: Path) -> None:
    written = read(embedded_build / "reports/cache.json")
    assert written["passed"] and written["certified"]
    assert written["chosen"]["upper"] <= 0.02
    assert written["chosen"]["recall"]["value"] >= 0.5
    assert written["chosen"]["out_of_domain_rejected"]["value"] >= 0.995
    assert written["chosen"]["hits"] > 300
    assert min(written["guards"].values()) > 0


def test_sound_small_data_is_certified_at_the_laxest_threshold_that_passes(small: SmallCache) -> None:
    small.build()
    assert failed(small.judge()) == []
    written = small.judged()
    assert written["certified"] is True
    assert written["chosen"]["threshold"] == 0.2
    assert (written["chosen"]["hits"], written["chosen"]["false"]) == (6, 0)
    assert written["chosen"]["upper"] == pytest.approx(1 - 0.05 ** (1 / 6), abs=1e-6)  # the bound for none of 6
    assert written["chosen"]["strata"]["paraphrases"] == {"n": 6, "hits": 6, "false": 0, "false_upper": 0.393}
    certificate = read_certificate(small.certificate, small.opened())
    assert (certificate.threshold, certificate.confidence) == (0.2, 0.95)


def test_two_certifications_give_the_same_bytes(small: SmallCache) -> None:
    small.build()
    small.judge()
    first = small.certificate.read_bytes()
    small.judge()
    assert small.certificate.read_bytes() == first


def test_the_walk_stops_at_the_first_threshold_that_fails(small: SmallCache) -> None:
    small.traps = {"Tell me who the Wizard of Oz is": "the-wizard", "Who is not the Wizard?": "the-wizard"}
    small.build()
    small.judge(replace(LIMITS, grid=(0.9, -2.0, 0.9)))
    walk = small.judged()["walk"]
    assert [row["hits"] for row in walk] == [0, 9, 0]
    assert not small.judged()["certified"]
    assert "at the first threshold, 0.9, 0 of 0 answers were wrong" in small.refused()


def test_without_a_certificate_the_gate_fails_only_if_one_is_required(small: SmallCache) -> None:
    small.build()
    strict = replace(LIMITS, risk=0.3)
    assert failed(small.judge(strict)) == ["wrong among semantic hits, upper limit"]
    assert failed(small.judge(replace(strict, required=False))) == []
    assert "0 of 6 answers were wrong: at most 39.30% with 95% confidence, and 30.00% was asked" in small.refused()


def test_phrasings_under_each_others_answers_are_not_certified(small: SmallCache) -> None:
    wizard, road = small.phrasings["the-wizard"], small.phrasings["yellow-road"]
    small.phrasings |= {"the-wizard": road, "yellow-road": wizard}
    small.build()
    assert failed(small.judge()) == ["wrong among semantic hits, upper limit", "recall of unseen phrasings"]
    wrong = {(row["expected"], row["answered_by"]) for row in small.judged()["false_hits"]}
    assert wrong == {("the-wizard", "yellow-road"), ("yellow-road", "the-wizard")}


def test_an_answered_trap_counts_as_wrong(small: SmallCache) -> None:
    small.traps = {"Tell me who the Wizard of Oz is": "the-wizard", "Who is not the Wizard?": "the-wizard"}
    small.build()
    assert failed(small.judge()) == ["wrong among semantic hits, upper limit"]


def test_an_answered_stranger_counts_as_wrong(small: SmallCache) -> None:
    small.elsewhere = ["Tell me who the Wizard of Oz is"]
    small.build()
    assert failed(small.judge()) == ["wrong among semantic hits, upper limit", "out-of-domain questions rejected"]


def test_a_swapped_answer_is_refused(small: SmallCache) -> None:
    small.build()
    file = small.cache / "entries.json"
    file.write_text(file.read_text().replace('"the-wizard."', '"yellow-road."'))
    reseal(small.cache)
    with pytest.raises(InputError, match=r"answer or phrasings of 'the-wizard' are not those of .*all\.yaml: it"):
        small.judge()


def test_a_dropped_guard_voids_the_certificate(small: SmallCache, monkeypatch: pytest.MonkeyPatch) -> None:
    small.build()
    monkeypatch.setitem(guards.GUARDS, "negation", lambda question, intent: None)
    assert "guards that met no near miss" in failed(small.judge())
    assert "guard 'negation' objected to no near miss" in small.refused()


def test_a_shuffled_index_voids_the_certificate(small: SmallCache) -> None:
    small.build()
    file = small.cache / "index.faiss"
    vectors = faiss.read_index(str(file)).reconstruct_n(0, 26)
    mixed = faiss.IndexFlatIP(vectors.shape[1])
    mixed.add(np.roll(vectors, 8, axis=0))
    faiss.write_index(mixed, str(file))
    reseal(small.cache)
    assert "self-retrieval" in failed(small.judge())
    assert "not where they belong in the index" in small.refused()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"threshold": 0.2', '"threshold": 0.1'),
        ('"upper": 0.393038', '"upper": 0.393037'),
        ('"false": 0', '"false": 1'),
    ],
)
def test_a_certificate_edited_by_one_digit_is_refused(small: SmallCache, before: str, after: str) -> None:
    small.build()
    small.judge()
    text = small.certificate.read_text()
    assert before in text
    small.certificate.write_text(text.replace(before, after, 1))
    assert "does not match its seal" in small.refused()


def test_a_certificate_of_another_cache_is_refused(small: SmallCache) -> None:
    small.build()
    small.judge()
    file = small.cache / "entries.json"
    file.write_text(file.read_text() + "\n")
    reseal(small.cache)
    assert "it is of cache " in small.refused()


def test_a_question_that_was_tuned_on_is_refused(small: SmallCache) -> None:
    small.build()
    dev, cert = small.root / "validation/dev", small.root / "validation/cert"
    (dev / "near_misses.yaml").write_text((cert / "near_misses.yaml").read_text())
    with pytest.raises(InputError, match=r"cert/near_misses\.yaml:1: .* the same words as .*dev/near_misses\.yaml:1"):
        small.judge()


def test_fixed_sequence_keeps_its_promise() -> None:
    """Of 2,000 simulated certifications of caches that are all worse than the promise, at most 5 % succeed."""
    random, risk, wrong = np.random.default_rng(3), 0.02, 0
    rates = np.array([0.0201, 0.021, 0.023, 0.03])  # at the grid's thresholds, each laxer one worse
    for _ in range(2000):
        hits = np.cumsum(random.integers(80, 160, size=4)) + 200
        false = random.binomial(hits, rates)
        passed = 0
        while passed < 4 and share_upper(int(false[passed]), int(hits[passed]), 0.95) <= risk:
            passed += 1
        wrong += passed > 0
    assert wrong / 2000 <= 0.05
