"""torchchat beside us: what needs no checkout of it."""

import json
import re
from pathlib import Path

import pytest

from model.artifact import file_digest, write_json
from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from pipeline.bench import torchchat
from pipeline.bench.torchchat import FIGURES, HOW_TO_GET_ONE, VERSION_CHECK, main, prepare, write_model
from tests.pipeline.conftest import Run

PRINTED = """\
Time to load model: 0.23 seconds
Once upon a time, the city of Nova Haven was a thriving metropolis
Time for inference 2: 1.2063 sec total \x20
Time to first token: 0.0635 sec with sequential prefill.  \x20
      Total throughput: 53.0527 tokens/sec, 0.0188 s/token \x20
First token throughput: 15.7534 tokens/sec, 0.0635 s/token \x20
 Next token throughput: 55.1244 tokens/sec, 0.0181 s/token  \x20
Average tokens/sec (next tokens): 55.12
"""
"""Of torchchat a1a7f370."""


def test_figures_are_read_from_what_it_prints() -> None:
    found = {name: re.findall(pattern, PRINTED, re.MULTILINE) for name, pattern in FIGURES.items()}
    assert found == {"load_s": ["0.23"], "first_token_s": ["0.0635"], "tokens_s": ["55.1244"]}


def test_without_a_checkout_it_says_how_to_get_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHCHAT_DIR", raising=False)
    assert main([]) == 2
    assert HOW_TO_GET_ONE in capsys.readouterr().err


def test_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no torchchat\.py there; .*git clone"):
        prepare(tmp_path, [VERSION_CHECK])


def test_other_version_of_torchchat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchchat, "HOME", tmp_path / "home")
    (tmp_path / "checkout/torchchat/cli").mkdir(parents=True)
    (tmp_path / "checkout/torchchat.py").touch()
    (tmp_path / "checkout" / VERSION_CHECK.file).write_text("something else")
    with pytest.raises(InputError, match="check out commit a1a7f370"):
        prepare(tmp_path / "checkout", [VERSION_CHECK])


def test_torchchats_folder_is_a_source(tiny_model: Path, tmp_path: Path, run: Run) -> None:
    """A checkpoint in torchchat's layout gives the model that the hub's layout gives."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    write_model(tiny_model, theirs)
    write_json(theirs / "tokenizer_config.json", json.loads((tiny_model / "tokenizer_config.json").read_text()))
    settings = ["--build", tmp_path / "build", "--set", f"fetch.source=folder:{theirs}", "--set", "fetch.sha256=none"]
    assert run("run", "fetch", *settings).code == 0
    found, expected = SafetensorsCheckpoint(tmp_path / "build/checkpoint"), SafetensorsCheckpoint(tiny_model)
    assert found.architecture == expected.architecture
    for name in expected.architecture.tensor_shapes():
        assert found.tensor(name).equal(expected.tensor(name))
    assert file_digest(tmp_path / "build/checkpoint/tokenizer.json") == file_digest(tiny_model / "tokenizer.json")
