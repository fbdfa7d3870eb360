"""The canonical int4 folder and the engine's packed weights stand for the same network, whatever the recipe."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import SafetensorsCheckpoint
from model.engine import Engine
from model.errors import InputError
from model.int4_linear import Dense, Int4, Int8, Weight, dequantize, weight_named
from model.llama import LayerWeights, Network, sequence_logits
from model.networks import EMBEDDING, HEAD, Int4Folder, float_network, packed_tensors, quantized_network
from model.recipe import Bits, Recipe
from model.sampling import Sampling
from tests.conftest import TINY
from tests.model.conftest import load_tokenizer, write_int4, write_random_model

TOKENS = torch.randint(TINY.vocab, (30,), generator=torch.Generator().manual_seed(2))
Q, K, V = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")


def packed_network(folder: Int4Folder) -> Network:
    """The engine's packed weights, computed eagerly by the kernels that the engine compiles."""
    tensors = dict(packed_tensors(folder))

    def layer(index: int) -> LayerWeights:
        prefix = f"layers.{index}."
        matrices = {name: weight_named(prefix + name, tensors) for name in ("qkv", "output", "gate_up", "down")}
        norms = {name: tensors[prefix + name] for name in ("attention_norm", "mlp_norm")}
        return LayerWeights(**norms, **matrices)  # type: ignore[arg-type]

    embedding = weight_named("embedding", tensors)
    table = embedding.weight.float() if isinstance(embedding, Dense) else dequantize(embedding)
    layers = [layer(index) for index in range(folder.architecture.layers)]
    return Network(folder.architecture, table, layers, tensors["norm"], weight_named("head", tensors))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tied_head", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-channel"])
@pytest.mark.parametrize("head_bits", get_args(Bits))
@pytest.mark.parametrize("embedding_bits", get_args(Bits))
def test_every_recipe(tmp_path: Path, scheme: str, head_bits: Bits, embedding_bits: Bits, tied_head: bool) -> None:
    model = write_random_model(tmp_path / "model", replace(TINY, tied_head=tied_head))
    recipe = Recipe(scheme=scheme, head_bits=head_bits, embedding_bits=embedding_bits)  # type: ignore[arg-type]
    folder = Int4Folder(write_int4(model, recipe, tmp_path))
    forms: dict[int, type[Weight]] = {4: Int4, 8: Int8, 16: Dense}
    tensors = dict(packed_tensors(folder))
    assert type(weight_named("head", tensors)) is forms[head_bits]
    assert type(weight_named("embedding", tensors)) is forms[embedding_bits]
    assert type(weight_named("layers.0.qkv", tensors)) is Int4
    exact = SafetensorsCheckpoint(model).tensor(EMBEDDING if tied_head else HEAD).float()
    bound = {4: 0.13, 8: 0.015, 16: 0.0}[head_bits]
    assert 0 <= relative(folder.float_matrix(HEAD), exact) <= bound
    dequantized = quantized_network(folder, int8_activations=False)
    expected = sequence_logits(dequantized, TOKENS)
    torch.testing.assert_close(sequence_logits(packed_network(folder), TOKENS), expected, rtol=0, atol=1e-4)
    engines = [Engine(model_, load_tokenizer(model), 64) for model_ in (packed_network(folder), dequantized)]
    said = [[piece.text for piece in engine.generate([5, 6], Sampling(temperature=0))] for engine in engines]
    assert said[0] == said[1]


def test_quantized_network_stays_near_the_float_one(tmp_path: Path) -> None:
    """An order of closeness: eight-bit activations add little to the error of four-bit weights."""
    model = write_random_model(tmp_path / "model")
    recipe = Recipe(scheme="int4-g32", head_bits=8, embedding_bits=8)
    folder = Int4Folder(write_int4(model, recipe, tmp_path))
    exact = sequence_logits(float_network(SafetensorsCheckpoint(model), torch.float32), TOKENS)
    weights_only = sequence_logits(quantized_network(folder, int8_activations=False), TOKENS)
    activations_too = sequence_logits(quantized_network(folder, int8_activations=True), TOKENS)
    assert 0.02 < relative(weights_only, exact) < 0.3
    assert 0.001 < relative(activations_too, weights_only) < 0.1


def test_canonical_folder_holds_the_documented_names(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", replace(TINY, tied_head=True))
    int4 = write_int4(model, Recipe(scheme="int4-g32", head_bits=4, embedding_bits=16), tmp_path)
    tensors = load_file(int4 / "weights-00001.safetensors")
    assert {name for name in tensors if ".layers." not in name} == {
        EMBEDDING,
        "model.norm.weight",
        f"{HEAD}.values",
        f"{HEAD}.scales",
    }
    assert (tensors[f"{Q}.values"].dtype, tensors[f"{Q}.values"].shape) == (torch.uint8, (128, 64))
    assert (tensors[f"{Q}.scales"].dtype, tensors[f"{Q}.scales"].shape) == (torch.bfloat16, (128, 4))


def test_fused_projection_keeps_every_row(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model")
    recipe = Recipe(scheme="int4-g32", head_bits=8, embedding_bits=8)
    folder = Int4Folder(write_int4(model, recipe, tmp_path))
    fused = weight_named("layers.1.qkv", dict(packed_tensors(folder)))
    assert isinstance(fused, Int4)
    expected = torch.cat([folder.float_matrix(name) for name in (Q, K, V)])
    torch.testing.assert_close(dequantize(fused), expected, rtol=1e-6, atol=0)


def test_damaged_folder_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model")
    int4 = write_int4(model, Recipe(scheme="int4-g32", head_bits=8, embedding_bits=8), tmp_path)
    path = int4 / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r'weights-00001\.safetensors: \d+ bytes found.*run "python -m pipeline run"'):
        Int4Folder(int4)
    manifest = json.loads((int4 / "manifest.json").read_text())
    (int4 / "manifest.json").write_text(json.dumps({**manifest, "kind": "engine"}))
    with pytest.raises(InputError, match="holds kind 'engine' in format 1, expected 'int4'"):
        Int4Folder(int4)
