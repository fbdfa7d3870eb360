"""torchchat's layout, against its definition written out by hand; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.architecture import Architecture
from model.artifact import write_json
from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from model.torchchat_format import PARAMS, WEIGHTS, TorchchatCheckpoint, architecture_of, params_of, state_of
from tests.conftest import LLAMA31_ROPE, TINY
from tests.model.conftest import write_random_model

# torchchat/model_params/Meta-Llama-3.1-8B.json at commit a1a7f370
LLAMA31_8B = """{"block_size": 131072, "dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32,
"n_local_heads": 8, "n_layers": 32, "rope_base": 500000.0, "vocab_size": 128256, "use_tiktoken": true,
"norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
"original_max_position_embeddings": 8192}}"""


@pytest.fixture
def plain(tmp_path: Path) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(write_random_model(tmp_path / "model"))


@pytest.fixture
def folder(plain: SafetensorsCheckpoint, tmp_path: Path) -> Path:
    folder = tmp_path / "torchchat"
    folder.mkdir()
    torch.save(state_of(plain), folder / WEIGHTS)
    write_json(folder / PARAMS, params_of(plain.architecture))
    return folder


def change(folder: Path, **tensors: Tensor | None) -> None:
    state = torch.load(folder / WEIGHTS, weights_only=True)
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(state, folder / WEIGHTS)


def test_way_there_and_back_is_exact(plain: SafetensorsCheckpoint, folder: Path) -> None:
    back = TorchchatCheckpoint(folder)
    assert back.architecture == plain.architecture
    for name in plain.architecture.tensor_shapes():
        assert torch.equal(back.tensor(name), plain.tensor(name)), name
        assert torch.equal(back.tensor(name, slice(1, 3)), plain.tensor(name)[1:3])


def test_rows_of_a_query_head_are_pairs_side_by_side(plain: SafetensorsCheckpoint) -> None:
    fused = state_of(plain)["layers.1.attention.wqkv.weight"]
    query = plain.tensor("model.layers.1.self_attn.q_proj.weight")
    head, half = TINY.head_dim, TINY.head_dim // 2
    for number in range(TINY.heads):
        for pair in range(half):
            assert torch.equal(fused[number * head + 2 * pair], query[number * head + pair])
            assert torch.equal(fused[number * head + 2 * pair + 1], query[number * head + half + pair])
    value = plain.tensor("model.layers.1.self_attn.v_proj.weight")
    assert torch.equal(fused[-len(value) :], value)


def test_query_key_and_value_may_be_apart(plain: SafetensorsCheckpoint, folder: Path) -> None:
    sizes = [TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim]
    prefix = "layers.0.attention."
    parts = state_of(plain)[f"{prefix}wqkv.weight"].split(sizes)
    apart = {f"{prefix}w{part}.weight": tensor.clone() for part, tensor in zip("qkv", parts, strict=True)}
    change(folder, **{f"{prefix}wqkv.weight": None}, **apart)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(TorchchatCheckpoint(folder).tensor(name), plain.tensor(name))


def test_llama31_8b_is_read_as_the_hub_states_it() -> None:
    found = architecture_of(json.loads(LLAMA31_8B), "params.json")
    assert (found.mlp, found.kv_heads, found.head_dim, found.context) == (14336, 8, 128, 131072)
    assert found.rope_scaling is not None
    assert found.rope_scaling.original_context == 8192
    scaled = Architecture(**{**vars(TINY), "rope_scaling": LLAMA31_ROPE})
    assert architecture_of(params_of(scaled), "params.json") == scaled


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", None, "norm.weight is missing, expected [128] by params.json"),
        ("layers.1.feed_forward.w2.weight", torch.zeros(128, 128), "w2.weight is [128, 128], expected [128, 256]"),
    ],
)
def test_tensor_that_is_missing_or_of_another_shape(
    folder: Path, name: str, tensor: Tensor | None, message: str
) -> None:
    change(folder, **{name: tensor})
    with pytest.raises(InputError) as caught:
        TorchchatCheckpoint(folder)
    assert message in str(caught.value)


class Evil:
    """What unpickling must not run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code was run')",))


def test_pickled_code_is_not_run(folder: Path) -> None:
    torch.save({"norm.weight": Evil()}, folder / WEIGHTS)
    with pytest.raises(InputError, match="not a file of plain tensors"):
        TorchchatCheckpoint(folder)


def test_truncated_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.pth: not a file of plain tensors"):
        TorchchatCheckpoint(folder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True; only Llama 2, 3 and 3.1"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
        ({"text": {}}, "torchtune's form"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has not the four fields"),
    ],
)
def test_other_networks_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        architecture_of(params, "params.json")
    assert message in str(caught.value)
