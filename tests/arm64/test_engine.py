"""An engine exported and run on Arm, KleidiAI's products in its programs; `make test-arm64` emulates the machine."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline.export
from model.cpu import family
from model.engine import Engine
from model.networks import Int4Folder, quantized_network
from model.recipe import Recipe
from model.sampling import LogitsError, Sampling
from pipeline.configs import ExportConfig
from tests.conftest import TINY
from tests.model.conftest import load_tokenizer, write_int4, write_random_model

pytestmark = [
    pytest.mark.skipif(
        platform.machine() != "aarch64", reason="tests/model/test_program.py is this for other machines"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),  # torch 2.10's compiler, its own
]
CONTEXT = 200


def test_exported_engine_is_the_reference(tmp_path: Path) -> None:
    """One export takes minutes under emulation, so one test looks at all of it."""
    torch.set_num_threads(1)
    model = write_random_model(tmp_path / "model", replace(TINY, tied_head=True))
    int4 = write_int4(model, Recipe(scheme="int4-g32", embedding_bits=8, head_bits=8), tmp_path)
    pipeline.export.run(ExportConfig(context_tokens=CONTEXT), int4, tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine/manifest.json").read_text())
    assert (manifest["cpu"], manifest["packing"]) == (family(), "kleidiai")
    assert "embedding" not in manifest["forms"], "the tied head is the table"
    engine = Engine.load(tmp_path / "engine")
    reference = Engine(quantized_network(Int4Folder(int4), as_served=True), load_tokenizer(model), CONTEXT)
    for length in (1, 5, 40):
        prompt = list(range(2, 2 + length))
        expected = reference.next_logits(prompt)
        torch.testing.assert_close(
            engine.next_logits(prompt), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
        assert list(engine.greedy(prompt, 16)) == list(reference.greedy(prompt, 16))
    layers = engine._model._layers  # type: ignore[attr-defined]
    for fault in (float("nan"), float("inf")):  # of which KleidiAI makes numbers
        layers[1][0] = torch.full_like(layers[1][0], fault)
        engine.forget()
        with pytest.raises(LogitsError, match="logits are NaN or infinite"):
            list(engine.generate([5, 6, 7], Sampling(temperature=0)))
