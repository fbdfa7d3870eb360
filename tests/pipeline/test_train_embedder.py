"""The embedder is the base with an adapter: a kept one where it fits, else a training's, and the same either way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.errors import InputError
from pipeline import train_embedder
from pipeline.configs import TrainEmbedderConfig, embedded
from pipeline.sources import locate
from pipeline.train_embedder import ADAPTER

CONFIG = replace(
    embedded().train_embedder, steps=2, layers=2, intents_per_step=3, out_of_domain_per_step=2, adapter_rank=4
)
TEXTS: dict[str, Any] = {
    "phrasings": [["who are you", "what is your name"], ["where am i", "what is this place"], ["bye", "good night"]],
    "near_misses": [["who is he"], ["where is he"], ["hello"]],
    "out_of_domain": ["the price of tea", "an even number"],
}


def trained(folder: Path, kept: Path, texts: dict[str, Any] = TEXTS, config: TrainEmbedderConfig = CONFIG) -> Path:
    """Runs the stage; the folder that it wrote."""
    folder.mkdir()
    (folder / "training_set.json").write_text(json.dumps(texts))
    train_embedder.run(config, kept, folder / "training_set.json", folder / "trained")
    return folder / "trained"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training without a kept adapter."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "kept").mkdir()
    return trained(folder / "build", folder / "kept")


@pytest.fixture
def kept(first: Path, tmp_path: Path) -> Path:
    """A folder that keeps that training's adapter."""
    (tmp_path / "kept").mkdir()
    shutil.copyfile(first / ADAPTER, tmp_path / "kept" / ADAPTER)
    return tmp_path / "kept"


def test_a_training_anew_gives_the_same_bytes(first: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    again = trained(tmp_path / "again", tmp_path / "kept")
    for name in ("model.safetensors", ADAPTER):
        assert (again / name).read_bytes() == (first / name).read_bytes()


def test_a_kept_adapter_gives_the_same_bytes_without_training(
    first: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(train_embedder, "_train")
    again = trained(tmp_path / "again", kept)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert "was trained on just this: no training" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("texts", "config", "words"),
    [
        ({**TEXTS, "out_of_domain": ["the price of salt", "an odd number"]}, CONFIG, "training set changed"),
        (TEXTS, replace(CONFIG, steps=3), "configuration steps was 2, is 3"),
    ],
)
def test_an_adapter_of_something_else_is_named_and_not_used(
    first: Path, kept: Path, tmp_path: Path, texts: dict[str, Any], config: TrainEmbedderConfig, words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = trained(tmp_path / "other", kept, texts, config)
    said = " ".join(capfd.readouterr().err.split())
    assert words in said and "copy trained/embedder.safetensors of the build folder" in said
    assert (other / ADAPTER).read_bytes() != (first / ADAPTER).read_bytes()


def test_a_damaged_adapter_is_an_error(kept: Path, tmp_path: Path) -> None:
    content = bytearray((kept / ADAPTER).read_bytes())
    content[-1] ^= 1
    (kept / ADAPTER).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        trained(tmp_path / "again", kept)


def test_training_changes_what_it_may_and_no_word_embedding(first: Path) -> None:
    base = load_file(str(locate(CONFIG.source, CONFIG.sha256) / "model.safetensors"))
    moved = {name for name, weight in weights(first).items() if not torch.equal(weight, base[name])}
    assert moved and not [name for name in moved if name.startswith("embeddings.")]
