"""The comparison of recipes, on a tiny model: everything is in the table, and each row rounds as it says."""

import json
from pathlib import Path

import pytest
import torch
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from pipeline.bench.quality import llama_cpp, main, torchao
from tests.model.conftest import write_random_model
from tests.pipeline.conftest import cli, from_folder


def test_every_subject_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_random_model(tmp_path / "model")
    assert cli("run", "fetch", "--build", tmp_path / "build", *from_folder(model)).code == 0
    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "build/checkpoint")]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    means = {(row["scheme"], row["rounding"]): row["kl"]["value"] for row in rows}
    assert len(means) == len(rows) == 21
    for row in rows:
        assert 0 < row["kl"]["lower"] <= row["kl"]["value"] <= row["kl"]["upper"] < row["kl_p999"]["value"]
        assert row["seconds"] >= 0
    assert {row["bits"] for row in rows if row["scheme"] == "int4-g32"} == {4.5, 8.5}
    for scheme in ("int4-g32", "int4-channel"):
        assert means[scheme, "ours, gptq"] < means[scheme, "torchao, round to nearest"]


def test_peers_round_as_they_document() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = weight.float().view(8, 2, 32)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    step = (largest / -8).half().float()  # Q4_0: the value of largest magnitude, with its sign, becomes -8
    levels = torch.floor(groups * (1 / (largest / -8)) + 8.5).clamp(0, 15) - 8
    torch.testing.assert_close(llama_cpp("w", weight), (levels * step).flatten(1))
    nearest = torchao(IntxChooseQParamsAlgorithm.AFFINE, 32)("w", weight).view(8, 2, 32)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7.5
    torch.testing.assert_close(nearest / scale, (nearest / scale).round())
    assert ((nearest - groups).abs() <= 0.50001 * scale).all()
