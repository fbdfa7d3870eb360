"""The exported embedder against sentence-transformers, its independent reference."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.errors import InputError
from serving.cache import Cache
from serving.certificate import admit
from serving.embedder import Embedder


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' own
def test_vectors_equal_those_of_sentence_transformers(embedded_build: Path, cache: Cache, embedder: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [text for _, text in cache.phrasings[::5]] + ["hi", "Où est la cité d'émeraude ?", "🦁 roars at 12:30!"]
    texts += cache.contrast[: 1000 - len(texts)]
    assert len(texts) >= 1000
    expected = SentenceTransformer(str(embedded_build / "trained"), device="cpu").encode(
        texts, normalize_embeddings=True
    )
    cosines = [float(vector @ embedder.embed(text)) for text, vector in zip(texts, expected, strict=True)]
    assert min(cosines) > 0.9999


def test_a_text_always_gets_the_same_unit_vector(embedder: Embedder) -> None:
    first = embedder.embed("Who is the Wizard?")
    embedder.embed("something else of another length entirely, to disturb whatever state there is")
    assert np.array_equal(first, embedder.embed("Who is the Wizard?"))
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)


def test_a_text_beyond_the_longest_is_refused(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="reads at most 128"):
        embedder.embed("wizard " * 200)


def test_an_embedder_of_another_torch_is_refused(embedded_build: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_build / "embedder", tmp_path / "embedder"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "torch": "1.0.0"}))
    with pytest.raises(InputError, match=r"torch 1\.0\.0 .*run export_embedder"):
        Embedder(folder).load()


def test_a_damaged_embedder_is_no_miss(embedded_build: Path, cache: Cache, tmp_path: Path) -> None:
    """It is opened at the first question that needs it, which must not look like one without a ready answer."""
    folder = Path(shutil.copytree(embedded_build / "embedder", tmp_path / "embedder"))
    opened = Cache(embedded_build / "cache", Embedder(folder))
    assert admit(opened, embedded_build / "certificate.json") is not None
    with (folder / "program.so").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(InputError, match=r"program\.so: SHA-256 .* found, .* expected"):
        opened.lookup("What would the scarecrow have said to that?")
