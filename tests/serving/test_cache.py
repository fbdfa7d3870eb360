"""Lookups through the real index and embedder."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.artifact import write_manifest
from model.errors import InputError
from serving.cache import LONGEST_QUESTION, Cache, Considered, Hit, Miss
from serving.certificate import admit
from serving.embedder import Embedder
from serving.guards import Intent, novelty
from serving.text import lowered, normalise


@pytest.mark.parametrize(
    ("question", "entry"),
    [
        ("What are you capable of?", "capabilities"),
        ("Tell me what you can do.", "capabilities"),
        ("How can I interact with you?", "how-to-interact"),
        ("Who is the Wizard?", "who-is-the-wizard"),
        ("Is the Emerald City green?", "is-the-city-green"),
        ("why does EVERYONE wear green spectacles", "why-green-spectacles"),
    ],
)
def test_the_articles_questions_hit(cache: Cache, question: str, entry: str) -> None:
    found = cache.lookup(question)
    assert isinstance(found, Hit)
    assert found.entry == entry
    assert found.answer == cache.entries[entry]["answer"]


@pytest.mark.parametrize(
    "question",
    [
        "What are you not capable of?",
        "Tell me what you can't do.",
        "How can I not interact with you?",
        "Who isn't the Wizard?",
        "Why is the Emerald City not green?",
    ],
)
def test_their_negations_miss(cache: Cache, question: str) -> None:
    assert isinstance(cache.lookup(question), Miss)


@pytest.mark.parametrize(
    "question",
    [
        "And what about him?",
        "Why did she do that?",
        "What is it made of?",
        "Tell me more about the other one",
        "So who built it?",
        "What happened to them after that?",
    ],
)
def test_what_needs_the_conversation_misses(cache: Cache, question: str) -> None:
    assert isinstance(cache.lookup(question), Miss)


def test_an_unseen_phrasing_hits_by_meaning(cache: Cache) -> None:
    found = cache.lookup("Could you tell me who the Wizard is, please?")
    assert isinstance(found, Hit)
    assert (found.entry, found.tier) == ("who-is-the-wizard", "semantic")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("", "no word"),
        ("?! ...", "no word"),
        ("wizard " * 10_000, "longer than"),
        ("w " * (LONGEST_QUESTION // 2), "tokens"),
        ("Who is\x00 the Wizard of this place?", "control"),
        ("Who is \u202ethe Wizard of this place?", "control"),
        ("e\u0301" * 400, "longer than"),
        ("\ud83d Who is the Wizard of this place?", "control"),
        ("\u05de\u05d9 \u05d4\u05d5\u05d0 \u05d4\u05e7\u05d5\u05e1\u05dd?", ""),
        ("asdf qwer zxcv", ""),
        ("I walk through the Emerald City gates and look up", ""),
    ],
)
def test_what_is_no_question_misses_with_a_reason(cache: Cache, question: str, reason: str) -> None:
    found = cache.lookup(question)
    assert isinstance(found, Miss)
    assert reason in found.reason


def test_every_phrasing_is_an_exact_hit_of_its_own_intent(cache: Cache) -> None:
    for entry, phrasing in cache.phrasings:
        found = cache.lookup(phrasing.upper() + " !")
        assert isinstance(found, Hit)
        assert (found.entry, found.tier) == (entry, "exact")


def test_what_was_considered_adds_up(cache: Cache) -> None:
    """The score from its parts, against a plain search over all vectors with NumPy."""
    question = "Could you describe the Wizard's throne room for me?"
    found = cache.consider(question)
    assert isinstance(found, Considered)
    cosines = cache.vectors @ cache.embedder.embed(question)
    owners = np.array([entry for entry, _ in cache.phrasings] + [""] * len(cache.contrast))
    likeness = {
        name: np.sort(cosines[owners == name])[::-1][: cache.policy["agreeing"] if name else 1].mean()
        for name in set(owners)
    }
    best = max((name for name in likeness if name), key=likeness.__getitem__)
    against = max(value for name, value in likeness.items() if name != best)
    new = novelty(lowered(question), Intent.of(cache.entries[best]["phrasings"], cache.entries[best]["answer"]))
    expected = likeness[best] - cache.policy["contrast_weight"] * against - cache.policy["novelty_weight"] * new
    assert found.entry == best
    assert found.score == pytest.approx(expected, abs=1e-5)


def test_the_threshold_decides(cache: Cache) -> None:
    found = cache.consider("Could you tell me who the Wizard is, please?")
    assert isinstance(found, Considered)
    assert isinstance(cache.decide(found, found.score), Hit)
    assert cache.decide(found, found.score + 1e-6) == Miss(reason="nothing is near enough")


def test_without_a_certificate_only_exact_matches_answer(embedded_build: Path, embedder: Embedder) -> None:
    cache = Cache(embedded_build / "cache", embedder)
    assert isinstance(cache.lookup("Who is the Wizard?"), Hit)
    found = cache.lookup("Could you tell me who the Wizard is, please?")
    assert found == Miss(reason="only exact matches answer: no certificate was presented")


def test_a_revoked_answer_is_not_given(embedded_build: Path, embedder: Embedder) -> None:
    cache = Cache(embedded_build / "cache", embedder, revoked=["who-is-the-wizard"])
    admit(cache, embedded_build / "certificate.json")
    for question in ("Who is the Wizard?", "Could you tell me who the Wizard is, please?"):
        assert cache.lookup(question) == Miss(reason="its ready answer was revoked")
    assert isinstance(cache.lookup("Who is Toto?"), Hit)


def test_revoking_an_unknown_answer_is_an_error(embedded_build: Path, embedder: Embedder) -> None:
    with pytest.raises(InputError, match="cannot revoke 'who-is-totto': no intent of that id"):
        Cache(embedded_build / "cache", embedder, revoked=["who-is-totto"])


def test_an_index_of_another_embedder_is_refused(embedded_build: Path, embedder: Embedder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_build / "cache", tmp_path / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {name: manifest[name] for name in ("policy", "entries", "phrasings", "contrast")}
    write_manifest(folder, "cache", {**facts, "embedder": "0" * 64})
    with pytest.raises(InputError, match="built with embedder 000000000000"):
        Cache(folder, embedder)


@pytest.mark.parametrize("name", ["index.faiss", "entries.json"])
def test_a_flipped_byte_is_refused(embedded_build: Path, embedder: Embedder, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(embedded_build / "cache", tmp_path / "cache"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: SHA-256"):
        Cache(folder, embedder)


def test_normalise_keeps_words_and_drops_the_rest() -> None:
    assert normalise("  WHO's the “Wizard”,\tplease?! ") == "whos the wizard please"
    assert normalise("\N{FULLWIDTH LATIN SMALL LETTER W}ho") == "who"
    assert normalise("not") != normalise("knot")


@given(st.text())
def test_normalise_keeps_every_letter_and_digit_there_is(text: str) -> None:
    folded = lowered(unicodedata.normalize("NFKC", text))
    assert normalise(text).replace(" ", "") == "".join(letter for letter in folded if letter.isalnum())
