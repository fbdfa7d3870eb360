"""What goes with an engine that is kept as an artifact."""

from pathlib import Path

import pytest

from model.artifact import write_manifest
from pipeline.workflow import notices


def engine(build: Path, licence: str, model_id: str, text: str | None) -> None:
    """A folder that says it is an engine of that model."""
    folder = build / "engine"
    folder.mkdir()
    if text:
        (folder / "LICENSE").write_text(text)
    write_manifest(folder, "engine", {"licence": licence, "model_id": model_id, "source": "hub:some/where"})


def test_llamas_words_go_with_its_weights(tmp_path: Path) -> None:
    engine(tmp_path, "llama3.1", "meta-llama/Llama-3.1-8B-Instruct", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT")
    assert notices.main([str(tmp_path)]) == 0
    written = {file.name: file.read_text() for file in (tmp_path / "notices").iterdir()}
    assert "COMMUNITY LICENSE" in written["LICENSE"]
    assert "Built with Llama" in written["NOTICE"]
    assert "is licensed under the Llama 3.1 Community License" in written["NOTICE"]


def test_weights_without_their_licence_are_not_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine(tmp_path, "llama3.1", "meta-llama/Llama-3.1-8B-Instruct", None)
    assert notices.main([str(tmp_path)]) == 2
    assert "no copy of the licence 'llama3.1' came with" in capsys.readouterr().err
    assert not (tmp_path / "notices").exists()
