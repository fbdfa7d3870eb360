"""The synthetic checkpoint: what the hub's looks like to everything that reads it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.artifact import file_digest, files_below
from model.checkpoint import SafetensorsCheckpoint
from pipeline.bench.synthetic import LLAMA31_8B, main, write_checkpoint
from tests.conftest import TINY
from tests.pipeline.conftest import cli, from_folder


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    write_checkpoint(folder, replace(TINY, hidden=512, heads=16), tiny_model)
    return folder


def test_8b_has_the_published_sizes() -> None:
    """8,030,261,248 parameters, in the 16,060,522,496 bytes of bf16 that the hub's index declares."""
    assert sum(torch.Size(shape).numel() for shape in LLAMA31_8B.tensor_shapes().values()) == 8_030_261_248


def test_every_tensor_can_be_read_and_is_like_real_ones(written: Path) -> None:
    checkpoint = SafetensorsCheckpoint(written)
    assert len(list(written.glob("model-*-of-00004.safetensors"))) == 4
    for name, shape in checkpoint.architecture.tensor_shapes().items():
        tensor = checkpoint.tensor(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, shape)
        assert tensor.isfinite().all()
    channels = checkpoint.tensor("model.layers.1.mlp.up_proj.weight").float().norm(dim=0)
    assert float(channels.max() / channels.median()) > 5


def test_the_same_seed_gives_the_same_bytes(written: Path, tiny_model: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        write_checkpoint(tmp_path / str(seed), replace(TINY, hidden=512, heads=16), tiny_model, seed)
        both = [[file_digest(of / name) for name in files_below(of)] for of in (written, tmp_path / str(seed))]
        assert (both[0] == both[1]) == same


def test_the_pipeline_quantizes_it(written: Path, tmp_path: Path) -> None:
    ended = cli("run", "quantize", "--build", tmp_path / "build", *from_folder(written))
    assert ended.code == 0, ended.err


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "exists: remove it, or name another" in capsys.readouterr().err
