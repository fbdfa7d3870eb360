import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.architecture import Architecture, RopeScaling
from model.errors import InputError
from tests.conftest import LLAMA31_ROPE, TINY

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA31_8B: dict[str, Any] = {
    **LLAMA2_7B,
    "attention_bias": False,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
"""The models' published config.json, their defaults left out as there."""


def test_reads_published_llama_2_config() -> None:
    assert Architecture.from_config_json(LLAMA2_7B, "config.json") == Architecture(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        vocab=32000,
        context=4096,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=False,
    )


def test_reads_published_llama_31_config() -> None:
    assert Architecture.from_config_json(LLAMA31_8B, "config.json") == Architecture(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14336,
        vocab=128256,
        context=131072,
        rope_theta=500000.0,
        norm_eps=1e-5,
        tied_head=False,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    )


@pytest.mark.parametrize("config", [LLAMA2_7B, LLAMA31_8B], ids=["llama-2", "llama-3.1"])
def test_reads_rope_as_transformers_5_writes_it(config: dict[str, Any]) -> None:
    written = LlamaConfig(**config).to_dict()
    assert "rope_parameters" in written
    assert Architecture.from_config_json(written, "new") == Architecture.from_config_json(config, "old")


@pytest.mark.parametrize(
    "architecture",
    [TINY, replace(TINY, tied_head=True), replace(TINY, rope_scaling=LLAMA31_ROPE, head_dim=16)],
    ids=["plain", "tied", "scaled-rope"],
)
def test_survives_config_json_and_the_manifest(architecture: Architecture) -> None:
    config = json.loads(json.dumps(architecture.to_config_json()))
    manifest = json.loads(json.dumps(architecture.to_dict()))
    assert Architecture.from_config_json(config, "config.json") == architecture
    assert Architecture.from_dict(manifest) == architecture


@pytest.mark.parametrize("tied_head", [False, True])
def test_tensor_shapes_are_those_of_transformers(tied_head: bool) -> None:
    architecture = replace(TINY, tied_head=tied_head, head_dim=16)
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**architecture.to_config_json()))
    expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert architecture.tensor_shapes() == expected


def test_fused_projection_holds_queries_keys_and_values() -> None:
    shapes = TINY.tensor_shapes()
    assert TINY.qkv_rows == sum(shapes[f"model.layers.0.self_attn.{part}_proj.weight"][0] for part in "qkv")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_type", "mistral"), ("hidden_act", "gelu"), ("attention_bias", True), ("mlp_bias", True)],
)
def test_refuses_other_networks(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^here/config.json: {field} is {value!r}.*choose a Llama"):
        Architecture.from_config_json({**LLAMA2_7B, field: value}, "here/config.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    ids=["linear", "yarn", "dynamic"],
)
def test_refuses_other_rope_scalings(rope: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"here: rope type '(linear|yarn|dynamic)' is not supported"):
        Architecture.from_config_json({**LLAMA2_7B, **rope}, "here")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "rms_norm_eps", "vocab_size"])
def test_names_a_missing_field(field: str) -> None:
    config = {name: value for name, value in LLAMA2_7B.items() if name != field}
    with pytest.raises(InputError, match=f"here: no field '{field}'"):
        Architecture.from_config_json(config, "here")


def test_names_a_missing_rope_factor() -> None:
    scaling = {name: value for name, value in LLAMA31_8B["rope_scaling"].items() if name != "low_freq_factor"}
    with pytest.raises(InputError, match="here: no field 'low_freq_factor'"):
        Architecture.from_config_json({**LLAMA31_8B, "rope_scaling": scaling}, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"kv_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
    ],
)
def test_refuses_impossible_sizes(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]
