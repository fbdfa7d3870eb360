"""Recipes that calibrate: what each product is fitted to, and that it pays."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import model.llama
import pipeline.quantize
from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from model.int4_linear import Weight
from model.llama import sequence_logits
from model.networks import Int4Folder, float_network, layer_names, quantized_network
from model.quantization import quantize
from model.recipe import Recipe
from pipeline.calibration import WINDOW
from pipeline.gate_quality import compare, read_through
from pipeline.windows import Text, text_windows
from tests.conftest import TINY
from tests.model.conftest import load_tokenizer, write_int4, write_random_model

RECIPE = Recipe(scheme="int4-g32", embedding_bits=16, head_bits=8, method="weighted-search")
TEXT = "".join(
    f"The road was paved with {count} yellow bricks, and then with {7 * count} red ones. " for count in range(40)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fetched tiny model, with some text to calibrate with."""
    folder = tmp_path_factory.mktemp("model")
    write_int4(write_random_model(folder / "model"), replace(RECIPE, method="search"), folder)
    (folder / "text.txt").write_text(TEXT)
    return folder / "checkpoint"


def quantized(checkpoint: Path, recipe: Recipe, folder: Path) -> Int4Folder:
    folder.mkdir()
    text = checkpoint.parent / "text.txt"
    pipeline.quantize.run(recipe, text, checkpoint, folder / "int4", folder / "report.json")
    return Int4Folder(folder / "int4")


def test_each_product_is_fitted_to_its_inputs_as_quantized(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finished network is watched: what comes to a product is what its scales were weighted with."""
    folder, reader = quantized(checkpoint, RECIPE, tmp_path / "fitted"), SafetensorsCheckpoint(checkpoint)
    seen: list[Tensor] = []
    original = model.llama.linear  # type: ignore[attr-defined]

    def watching(x_TI: Tensor, weight: Weight) -> Tensor:
        seen.append(x_TI)
        return original(x_TI, weight)

    network = quantized_network(folder, as_served=False)
    monkeypatch.setattr("model.llama.linear", watching)
    windows = text_windows(Text.read(checkpoint.parent / "text.txt"), load_tokenizer(checkpoint), WINDOW)
    assert len(windows) > 5
    for tokens in windows:
        sequence_logits(network, tokens)
    products = 4 * TINY.layers + 1  # and the head
    for layer in range(TINY.layers):
        fields = {name: parts for name, parts in layer_names(layer).items() if not name.endswith("norm")}
        for at, names in enumerate(fields.values()):
            energy = torch.cat(seen[4 * layer + at :: products]).square().mean(dim=0)
            for name in names:
                expected = quantize(name, reader.tensor(name), 4, 32, RECIPE.search_steps, energy)
                found = folder.matrix(name)
                assert not isinstance(found, Tensor)
                # In bf16 energies are known to some digits; not knowing them at all is something else.
                plain = quantize(name, reader.tensor(name), 4, 32, RECIPE.search_steps)
                off, unaware = ((found.dequantize() - other.dequantize()).norm() for other in (expected, plain))
                assert off < unaware / 5, name


def test_gptq_is_nearer_to_the_float_model_than_the_search(checkpoint: Path, tmp_path: Path) -> None:
    """On the text it was fitted to; on other text the quality gate judges it."""
    reference = float_network(SafetensorsCheckpoint(checkpoint), torch.float32)
    windows = text_windows(Text.read(checkpoint.parent / "text.txt"), load_tokenizer(checkpoint), WINDOW)[:4]
    divergences, states = [], read_through(reference, windows)
    for method in ("search", "gptq"):
        folder = quantized(checkpoint, replace(RECIPE, method=method), tmp_path / method)
        tokens = torch.cat(compare(reference, states, quantized_network(folder, as_served=True), windows))
        divergences.append(float(tokens[:, 0].mean()))
    assert divergences[1] < 0.8 * divergences[0]


def test_the_same_run_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, method="gptq")
    first, second = (quantized(checkpoint, recipe, tmp_path / name) for name in ("first", "second"))
    assert first.manifest["files"] == second.manifest["files"]


def test_too_little_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Oz")
    with pytest.raises(InputError, match=r"text\.txt: not one window of 256 tokens to calibrate with; give more text"):
        pipeline.quantize.run(RECIPE, tmp_path / "text.txt", checkpoint, tmp_path / "int4", tmp_path / "report.json")
    assert not (tmp_path / "int4").exists()
