"""Lookups through the real index and embedder."""

import json
import shutil
from pathlib import Path

import pytest

from model.artifact import write_manifest
from model.errors import InputError
from serving.cache import LONGEST_QUESTION, Cache, Hit, Miss, normalise
from serving.embedder import Embedder


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
    found = cache.lookup(question)
    assert isinstance(found, Miss)
    assert found.nearest is not None


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
        ("asdf qwer zxcv", "near enough"),
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


def test_leaving_a_phrasing_out_changes_the_decision(cache: Cache, embedder: Embedder) -> None:
    row = next(row for row, (_, text) in enumerate(cache.phrasings) if text == "What are you capable of?")
    vector = embedder.embed("What are you capable of?")
    [(similarity, nearest)] = cache.nearest(vector, 1)
    assert nearest == row
    assert similarity == pytest.approx(1.0, abs=1e-5)
    without = cache.decide("What are you capable of?", vector, without=row)
    assert without.similarity < 0.999


def test_an_index_of_another_embedder_is_refused(embedded_build: Path, embedder: Embedder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_build / "cache", tmp_path / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {name: manifest[name] for name in ("policy", "entries", "phrasings")}
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
