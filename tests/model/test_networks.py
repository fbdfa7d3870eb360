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
from model.errors import InputError
from model.int4_linear import Dense, Int4, Packing, Weight, kernel, linear, packed_bytes, rows
from model.llama import LayerWeights, sequence_logits
from model.networks import EMBEDDING, HEAD, NORM, Int4Folder, float_network, packed_weights, quantized_network
from model.recipe import Bits, Recipe
from tests.conftest import TINY
from tests.model.conftest import write_int4, write_random_model

TOKENS = torch.randint(TINY.vocab, (30,), generator=torch.Generator().manual_seed(2))
PARTS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "output": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}
G32 = Recipe(scheme="int4-g32", head_bits=8, embedding_bits=8)


def weight_of(weight: Weight | Tensor) -> Tensor:
    """The float32 matrix [O, I] that a packed one stands for, read back from its bytes."""
    assert not isinstance(weight, Tensor)
    if isinstance(weight, Dense):
        return weight.weight.float()
    return rows(weight, torch.arange(weight.outputs), kernel())


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("tied_head", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-channel"])
@pytest.mark.parametrize("head_bits", get_args(Bits))
@pytest.mark.parametrize("embedding_bits", get_args(Bits))
def test_every_recipe(tmp_path: Path, scheme: str, head_bits: Bits, embedding_bits: Bits, tied_head: bool) -> None:
    """Each packed weight has the recipe's form, the exact size, and the canonical values in its bytes."""
    model = write_random_model(tmp_path / "model", replace(TINY, tied_head=tied_head, layers=1))
    recipe = Recipe(scheme=scheme, head_bits=head_bits, embedding_bits=embedding_bits)  # type: ignore[arg-type]
    folder = Int4Folder(write_int4(model, recipe, tmp_path))
    packed = dict(packed_weights(folder, kernel()))
    canonical = {"embedding": [EMBEDDING], "head": [HEAD]}
    canonical |= {f"layers.0.{f}": [f"model.layers.0.{part}.weight" for part in PARTS[f]] for f in PARTS}
    bits = {"embedding": embedding_bits, "head": head_bits}
    if tied_head and embedding_bits == head_bits:
        del canonical["embedding"]
    assert set(packed) == {*canonical, "norm", "layers.0.attention_norm", "layers.0.mlp_norm"}
    for name, sources in canonical.items():
        weight, expected = packed[name], torch.cat([folder.float_matrix(source) for source in sources])
        torch.testing.assert_close(weight_of(weight), expected, rtol=0, atol=1e-7)
        if bits.get(name, 4) == 16:
            assert isinstance(weight, Dense) and weight.weight.dtype == torch.bfloat16
        else:
            assert isinstance(weight, Int4)
            assert weight.group == (32 if scheme == "int4-g32" else weight.inputs)
            assert (weight.outputs, weight.inputs) == expected.shape
            assert weight.planes == bits.get(name, 4) // 4
            assert weight.packed.numel() == packed_bytes(weight, kernel())
    exact = SafetensorsCheckpoint(model).tensor(EMBEDDING if tied_head else HEAD).float()
    assert relative(folder.float_matrix(HEAD), exact) <= {4: 0.13, 8: 0.015, 16: 0.0}[head_bits]


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-channel"])
@pytest.mark.parametrize("field", PARTS)
def test_kernel_multiplies_by_the_weights_of_the_reference(
    kernels: None, tmp_path: Path, scheme: str, field: str
) -> None:
    """From the same input, so that 8-bit activations are the same in both."""
    model = write_random_model(tmp_path / "model")
    recipe = Recipe(scheme=scheme, head_bits=8, embedding_bits=8)  # type: ignore[arg-type]
    folder = Int4Folder(write_int4(model, recipe, tmp_path))
    packed = dict(packed_weights(folder, kernel()))
    for layer, weights in enumerate(quantized_network(folder, as_served=True).layers):
        dense: Dense = getattr(weights, field)
        x_TI = torch.randn(9, dense.weight.shape[1], generator=torch.Generator().manual_seed(layer))
        weight = packed[f"layers.{layer}.{field}"]
        assert isinstance(weight, Int4) and dense.int8_activations
        assert relative(linear(x_TI, weight), linear(x_TI, dense)) < 1e-6
        assert relative(linear(x_TI, weight), linear(x_TI, Dense(dense.weight))) > 1e-3


def test_quantized_network_stays_near_the_float_one(tmp_path: Path) -> None:
    """An order of closeness: eight-bit activations add little to the error of four-bit weights."""
    model = write_random_model(tmp_path / "model")
    folder = Int4Folder(write_int4(model, G32, tmp_path))
    exact = sequence_logits(float_network(SafetensorsCheckpoint(model), torch.float32), TOKENS)
    weights_only = sequence_logits(quantized_network(folder, as_served=False), TOKENS)
    as_served = sequence_logits(quantized_network(folder, as_served=True), TOKENS)
    assert 0.02 < relative(weights_only, exact) < 0.4
    assert 0.001 < relative(as_served, weights_only) < 0.1


@pytest.mark.parametrize("head_bits", get_args(Bits))
def test_as_served_rounds_what_the_engine_rounds(tmp_path: Path, head_bits: Bits) -> None:
    """Activations of quantized matrices, a head of 16 bits among them not, and the KV cache."""
    model = write_random_model(tmp_path / "model")
    folder = Int4Folder(write_int4(model, replace(G32, head_bits=head_bits), tmp_path))
    for as_served, kv_dtype in ((True, torch.bfloat16), (False, torch.float32)):
        network = quantized_network(folder, as_served=as_served)
        assert network.kv_dtype == kv_dtype
        ((_, head),) = network.head_parts
        assert isinstance(head, Dense)
        assert head.int8_activations == (as_served and head_bits != 16)
        for layer in network.layers:
            assert {weight.int8_activations for weight in layer if isinstance(weight, Dense)} == {as_served}


def test_packed_layers_have_the_fields_of_the_network(tmp_path: Path) -> None:
    folder = Int4Folder(write_int4(write_random_model(tmp_path / "model"), G32, tmp_path))
    packed = dict(packed_weights(folder, kernel()))
    expected = {f"layers.{layer}.{field}" for layer in range(TINY.layers) for field in LayerWeights._fields}
    assert {name for name in packed if name.startswith("layers.")} == expected
    for field, source in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        norm = packed[f"layers.1.{field}"]
        assert isinstance(norm, Tensor) and norm.dtype == torch.float32
        assert torch.equal(norm, folder.tensor(f"model.layers.1.{source}.weight").float())
    assert torch.equal(torch.as_tensor(packed["norm"]), folder.tensor(NORM).float())


@pytest.mark.parametrize("packing", get_args(Packing))
def test_one_packing_is_used_throughout(tmp_path: Path, packing: Packing) -> None:
    if packing != kernel() and packing == "kleidiai":
        pytest.skip("KleidiAI packs on aarch64 alone")
    folder = Int4Folder(write_int4(write_random_model(tmp_path / "model"), G32, tmp_path))
    sizes = {
        packed_bytes(weight, packing) == weight.packed.numel()
        for _, weight in packed_weights(folder, packing)
        if isinstance(weight, Int4)
    }
    assert sizes == {True}


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
    query = "model.layers.1.self_attn.q_proj.weight"
    assert (tensors[f"{query}.values"].dtype, tensors[f"{query}.values"].shape) == (torch.uint8, (128, 64))
    assert (tensors[f"{query}.scales"].dtype, tensors[f"{query}.scales"].shape) == (torch.bfloat16, (128, 4))


def test_damaged_folder_is_refused(tmp_path: Path) -> None:
    int4 = write_int4(write_random_model(tmp_path / "model"), G32, tmp_path)
    path = int4 / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r'weights-00001\.safetensors: \d+ bytes found.*run "python -m pipeline run"'):
        Int4Folder(int4)
    manifest = json.loads((int4 / "manifest.json").read_text())
    (int4 / "manifest.json").write_text(json.dumps({**manifest, "kind": "engine"}))
    with pytest.raises(InputError, match="holds kind 'engine' in format 1, expected 'int4'"):
        Int4Folder(int4)


@pytest.mark.parametrize("head_bits", get_args(Bits))
def test_streamed_networks_are_the_same_networks(
    tmp_path: Path, head_bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read when used, the head in parts of which the last is smaller, they give the same logits."""
    monkeypatch.setattr("model.networks.HEAD_ROWS", 30)
    model = write_random_model(tmp_path / "model", replace(TINY, tied_head=True))
    folder = Int4Folder(write_int4(model, replace(G32, head_bits=head_bits), tmp_path))
    checkpoint = SafetensorsCheckpoint(model)
    for whole, streamed in (
        (float_network(checkpoint, torch.float32), float_network(checkpoint, torch.float32, streamed=True)),
        (quantized_network(folder, as_served=True), quantized_network(folder, as_served=True, streamed=True)),
    ):
        assert len(whole.head_parts) == 1 < len(streamed.head_parts)
        torch.testing.assert_close(sequence_logits(streamed, TOKENS), sequence_logits(whole, TOKENS))
