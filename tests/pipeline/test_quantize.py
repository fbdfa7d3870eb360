"""A quantize stage that was cut short goes on where it ended, and gives the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

import pipeline.calibration
import pipeline.quantize
from model.artifact import file_digest, files_below, write_json
from model.checkpoint import EVERY, SafetensorsCheckpoint
from model.errors import InputError
from model.recipe import Recipe
from model.tokenizer import chat_settings
from tests.conftest import TINY, write_tiny_model

TEXT = "The gate is green, and so is all that lies behind it. " * 60
METHODS = ["search", "weighted-search", "gptq"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "checkpoint", replace(TINY, layers=6))
    write_json(folder / "chat.json", chat_settings(folder))
    write_json(folder / "source.json", {"architecture": replace(TINY, layers=6).to_dict()})
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def quantize(checkpoint: Path, method: str, folder: Path) -> dict[str, str]:
    """Runs the stage; every file's digest."""
    recipe = Recipe(scheme="int4-g32", embedding_bits=8, head_bits=4, method=method)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    pipeline.quantize.run(recipe, checkpoint.parent / "text.txt", checkpoint, folder / "int4", folder / "report.json")
    files = [*((folder / "int4") / name for name in files_below(folder / "int4")), folder / "report.json"]
    return {file.name: file_digest(file) for file in files}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [1, 4], ids=["early", "late"])
def test_goes_on_where_it_ended(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, broken: int
) -> None:
    monkeypatch.setattr("model.shards.SHARD_BYTES", 1 << 17)
    whole = quantize(checkpoint, method, tmp_path / "whole")
    read = SafetensorsCheckpoint.tensor

    def breaking(self: SafetensorsCheckpoint, name: str, rows: slice = EVERY) -> object:
        if name == f"model.layers.{broken}.mlp.down_proj.weight":
            raise InputError("the connection is gone")
        return read(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "tensor", breaking)
        with pytest.raises(InputError, match="the connection is gone"):
            quantize(checkpoint, method, tmp_path / "broken")
    left = {file.name for file in (tmp_path / "broken/int4").glob("*.safetensors")}
    assert left
    worked: list[int] = []
    layer = pipeline.calibration._Layer.quantize

    def watched(self: pipeline.calibration._Layer, states: list[Tensor]) -> list[Tensor]:
        worked.append(len(states))
        return layer(self, states)

    monkeypatch.setattr(pipeline.calibration._Layer, "quantize", watched)
    assert quantize(checkpoint, method, tmp_path / "broken") == whole
    assert len(worked) == 0 if method == "search" else len(worked) <= 6 - broken + 2


def test_half_a_shard_is_written_again(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.shards.SHARD_BYTES", 1 << 17)
    whole = quantize(checkpoint, "search", tmp_path / "whole")
    half = tmp_path / "half/int4"
    half.mkdir(parents=True)
    for name in ("weights-00001.safetensors", "weights-00002.safetensors"):
        (half / name).write_bytes((tmp_path / "whole/int4" / name).read_bytes())
    (half / "weights-00002.safetensors").rename(half / "weights-00002.partial")
    (half / "weights-00002.partial").write_bytes(b"half")
    found = quantize(checkpoint, "search", tmp_path / "half")
    assert {name: found[name] for name in whole if name.startswith("weights")} == {
        name: digest for name, digest in whole.items() if name.startswith("weights")
    }
