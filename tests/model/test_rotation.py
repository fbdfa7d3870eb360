"""A turned network is the same network, and its weights have no outliers left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import SafetensorsCheckpoint
from model.llama import sequence_logits
from model.networks import float_network
from model.rotation import Rotated, turned
from tests.conftest import LLAMA31_ROPE, TINY
from tests.model.conftest import write_random_model

TOKENS = torch.arange(3, 60)


@pytest.mark.parametrize("size", [1, 3, 8, 32, 48, 576, 1024])
def test_matrix_is_orthogonal(size: int) -> None:
    matrix = turned(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)


def test_power_of_two_is_sylvesters() -> None:
    plain = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    torch.testing.assert_close(turned(torch.eye(4)), plain)


def test_blocks_are_turned_one_by_one() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turned(x, 16), torch.cat([turned(part) for part in x.split(16, dim=1)], dim=1))


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("hidden", [128, 96], ids=["power of two", "and not"])
def test_turned_network_gives_the_same_logits(tmp_path: Path, tied_head: bool, hidden: int) -> None:
    architecture = replace(TINY, tied_head=tied_head, hidden=hidden, rope_scaling=LLAMA31_ROPE)
    checkpoint = SafetensorsCheckpoint(write_random_model(tmp_path / "model", architecture))
    rotated = Rotated(checkpoint)
    expected = sequence_logits(float_network(checkpoint, torch.float32), TOKENS)
    found = sequence_logits(float_network(rotated, torch.float32, streamed=True), TOKENS)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    for name, shape in rotated.architecture.tensor_shapes().items():
        assert rotated.tensor(name).shape == shape
        torch.testing.assert_close(rotated.tensor(name, slice(3, 9)), rotated.tensor(name)[3:9])
    up = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(rotated.tensor(up), checkpoint.tensor(up).float(), atol=1e-3)


def test_outlier_channel_is_spread(tmp_path: Path) -> None:
    class Outlier:
        architecture = TINY

        def tensor(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
            weight = torch.full(TINY.tensor_shapes()[name], 0.1)
            if weight.dim() == 2:
                weight *= torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
                weight[:, 5] *= 50
            return weight[rows]

    name = "model.layers.0.mlp.up_proj.weight"
    before, after = Outlier().tensor(name), Rotated(Outlier()).tensor(name)
    assert before.abs().max() / before.std() > 8
    assert after.abs().max() / after.std() < 6
