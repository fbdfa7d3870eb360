"""The licence gate: what each licence asks for, and that nothing of it can be left out."""

from pathlib import Path
from typing import Any

import pytest

from model.artifact import write_manifest
from model.errors import InputError
from pipeline.licences import copy_licences, missing, notices, terms_of
from tests.conftest import ROOT

LLAMA_ID, APACHE_ID = "meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
LLAMA_LICENCE = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"
CARD = f"# Llama-3.1-8B-Instruct, int4-g32\n\n**Built with Llama**\n\n{LLAMA_ID}"
LABELS = {"org.opencontainers.image.description": "A storyteller. Built with Llama."}


def engine(folder: Path, licence: str, model_id: str, **files: str) -> dict[str, Any]:
    """An artifact with these files; its manifest."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    facts = {"licence": licence, "model_id": model_id, "source": f"hub:{model_id}@0"}
    write_manifest(folder, "engine", facts)
    return {**facts, "files": dict.fromkeys(files)}


def read(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    return {name: text.decode() for name, text in notices(folder, manifest, ROOT / "LICENSE").items()}


def test_apache_model_gets_the_standard_text_and_a_notice_of_changes(tmp_path: Path) -> None:
    manifest = engine(tmp_path / "engine", "Apache-2.0", APACHE_ID)
    files = read(tmp_path / "engine", manifest)
    assert files["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert APACHE_ID in files["NOTICE"]
    assert "Changes: the weights were quantized" in files["NOTICE"]
    assert missing(files, APACHE_ID, {}, manifest) == []


def test_notice_of_the_models_own_is_kept(tmp_path: Path) -> None:
    manifest = engine(tmp_path / "engine", "Apache-2.0", APACHE_ID, NOTICE="Made by Dorothy.", LICENSE="Apache License")
    files = read(tmp_path / "engine", manifest)
    assert files["NOTICE"].startswith("Made by Dorothy.")
    assert APACHE_ID in files["NOTICE"]
    assert missing(files, APACHE_ID, {}, manifest) == []


def llama(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    manifest = engine(folder, "llama3.1", LLAMA_ID, **{"LICENSE": LLAMA_LICENCE, "USE_POLICY.md": "# Policy"})
    return read(folder, manifest), manifest


def test_llama_model_has_all_its_licence_asks_for(tmp_path: Path) -> None:
    files, manifest = llama(tmp_path / "engine")
    assert set(files) == {"LICENSE", "NOTICE", "USE_POLICY.md"}
    words = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc."
    assert words in files["NOTICE"]
    assert "Built with Llama" in files["NOTICE"]
    assert missing(files, CARD, LABELS, manifest) == []


@pytest.mark.parametrize(
    ("files", "card", "labels", "lacks"),
    [
        ({"NOTICE": ""}, CARD, LABELS, "NOTICE with the words 'Llama 3.1 is licensed under"),
        ({"LICENSE": "Apache License"}, CARD, LABELS, "a copy of the licence llama3.1"),
        ({}, CARD.replace("Built with Llama", ""), LABELS, "'Built with Llama' in the model card"),
        ({}, CARD, {}, "'Built with Llama' in the labels"),
        ({}, CARD.replace("# Llama", "# My Llama"), LABELS, "a model name that begins with 'Llama'"),
        ({}, CARD.replace(LLAMA_ID, ""), LABELS, f"a model card that names {LLAMA_ID}"),
    ],
)
def test_each_thing_that_llamas_licence_asks_for_is_missed(
    tmp_path: Path, files: dict[str, str], card: str, labels: dict[str, str], lacks: str
) -> None:
    whole, manifest = llama(tmp_path / "engine")
    found = missing({**whole, **files}, card, labels, manifest)
    assert len(found) == 1
    assert found[0].startswith(lacks)


def test_llama_without_its_licence_is_not_made_into_an_image(tmp_path: Path) -> None:
    manifest = engine(tmp_path / "engine", "llama3.1", LLAMA_ID)
    with pytest.raises(InputError, match=r"no copy of the licence 'llama3\.1' came with .*put the LICENSE file"):
        read(tmp_path / "engine", manifest)


def test_licence_that_no_one_has_read_is_refused() -> None:
    with pytest.raises(InputError, match=r"licence 'gemma' of google/x: .* does not know"):
        terms_of("gemma", "google/x")


def test_licences_travel_with_the_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("LICENSE", "USE_POLICY.md", "NOTICE.txt", "config.json", "weights.safetensors"):
        (source / name).write_text(name)
    copy_licences(source, target)
    assert {file.name for file in target.iterdir()} == {"LICENSE", "USE_POLICY.md", "NOTICE.txt"}
