"""Both readers give the same tensors, and every kind of damaged or foreign file is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architecture import Architecture
from model.artifact import read_json
from model.checkpoint import GgufCheckpoint, SafetensorsCheckpoint
from model.errors import InputError
from tests.conftest import LLAMA31_ROPE, TINY
from tests.model.conftest import write_random_model

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a folder with one file of weights."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights into two files with an index, as large models are published. Returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for index, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{index}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        SafetensorsCheckpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_reads_every_declared_tensor(tmp_path: Path, tied_head: bool, shards: int) -> None:
    write_random_model(tmp_path, replace(TINY, tied_head=tied_head))
    expected = load_file(tmp_path / WEIGHTS)
    if shards == 2:
        shard(tmp_path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.architecture == replace(TINY, tied_head=tied_head)
    assert set(expected) == set(checkpoint.architecture.tensor_shapes())
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_only_files_in_the_index_are_read(folder: Path) -> None:
    shard(folder)
    (folder / "consolidated.safetensors").write_bytes(b"another copy, damaged")
    assert SafetensorsCheckpoint(folder).tensor(UP).shape == (TINY.mlp, TINY.hidden)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    message = refused(folder)
    assert message.startswith(f"{path}: not a complete safetensors file")
    assert message.endswith("fetch it again")
    if kept == 20_000:
        assert f"20000 bytes found, {len(whole)} expected" in message


def test_any_flipped_header_bit_is_harmless_or_refused(folder: Path) -> None:
    """Every fifth byte of the header, one bit each: all the tensors are still there, or InputError says where."""
    path = folder / WEIGHTS
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    refusals = 0
    for at in range(0, header_bytes, 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            checkpoint = SafetensorsCheckpoint(folder)
        except InputError as fault:
            assert str(folder) in str(fault)
            refusals += 1
        else:
            assert all(checkpoint.tensor(name).shape == shape for name, shape in TINY.tensor_shapes().items())
    assert refusals > header_bytes / 5 * 0.8


@pytest.mark.parametrize("header", [b"[]", b'"text"', b'{"a": 3}', b'{"a": {"data_offsets": 1}}', b"{}"])
def test_header_that_is_other_json(folder: Path, header: bytes) -> None:
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert str(folder) in refused(folder)


def test_missing_shard(folder: Path) -> None:
    lost = folder / next(iter(shard(folder).values()))
    lost.unlink()
    assert refused(folder) == f"{lost}: missing, but model.safetensors.index.json lists it; download it again"


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.json'} declares tensor {UP}, and no file in {folder} holds it")


def test_config_that_contradicts_the_tensors(folder: Path) -> None:
    wider = replace(TINY, mlp=512).to_config_json()
    (folder / "config.json").write_text(json.dumps(wider))
    message = refused(folder)
    assert f"{folder / WEIGHTS}: tensor model.layers.0.mlp.gate_proj.weight is [256, 128]" in message
    assert f"{folder / 'config.json'} says [512, 128]; use the config.json that belongs to these weights" in message


def test_biases(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(TINY.hidden)}))
    assert refused(folder).startswith(f"{folder / WEIGHTS}: tensor {name}: Llama has no biases")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_named_and_never_read(folder: Path, pickle: str) -> None:
    (folder / WEIGHTS).rename(folder / pickle)
    assert refused(folder) == (
        f"{folder}: no safetensors file ({pickle} is a pickle, which is never read); "
        "download the model's safetensors files"
    )


def test_folder_without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refused(folder) == f"{folder}: no safetensors file; download the model's safetensors files"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: missing; fetch the model again"),
        (b'{"hidden_size": ', "config.json: not valid JSON"),
        (b"\xff\xfe", "config.json: not valid JSON"),
        (b"[1]", "config.json: a JSON list where an object is expected"),
    ],
    ids=["missing", "cut", "not-utf8", "list"],
)
def test_unreadable_config(folder: Path, content: bytes | None, message: str) -> None:
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert refused(folder).startswith(f"{folder}/{message}")
    with pytest.raises(InputError, match=message):
        read_json(path)


# GGUF


def interleaved(weight_OI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp's own reordering of query and key rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weight_OI.shape
    return weight_OI.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def llama_fields(architecture: Architecture) -> dict[str, Any]:
    return {
        "llama.block_count": architecture.layers,
        "llama.embedding_length": architecture.hidden,
        "llama.attention.head_count": architecture.heads,
        "llama.attention.head_count_kv": architecture.kv_heads,
        "llama.feed_forward_length": architecture.mlp,
        "llama.context_length": architecture.context,
        "llama.rope.freq_base": architecture.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": architecture.norm_eps,
    }


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    fields: dict[str, Any],
    *,
    kind: str = "llama",
    form: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF as llama.cpp's converter writes it, by gguf's own writer."""
    writer = gguf.GGUFWriter(path, kind)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    writer.add_token_list([f"t{index}" for index in range(TINY.vocab)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TINY.layers)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        for part, heads in (("q_proj", TINY.heads), ("k_proj", TINY.kv_heads)):
            values = interleaved(values, heads) if part in name else values
        stored = form if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(gguf_name or name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(folder: Path, architecture: Architecture = TINY) -> dict[str, Tensor]:
    return load_file(write_random_model(folder, architecture) / WEIGHTS)


@pytest.fixture(scope="session")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny GGUF; do not write to it."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(folder / "whole.gguf", random_tensors(folder), llama_fields(TINY))


def gguf_refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        GgufCheckpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("tied_head", [False, True])
def test_gguf_gives_the_tensors_of_the_folder_it_was_made_of(tmp_path: Path, tied_head: bool) -> None:
    architecture = replace(TINY, tied_head=tied_head, norm_eps=9.5e-6)
    tensors = random_tensors(tmp_path, architecture)
    checkpoint = GgufCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, llama_fields(architecture)))
    assert checkpoint.architecture == architecture
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


def test_quantized_gguf_is_dequantized(tmp_path: Path) -> None:
    tensors = random_tensors(tmp_path)
    path = write_gguf(tmp_path / "m.gguf", tensors, llama_fields(TINY), form=gguf.GGMLQuantizationType.Q8_0)
    checkpoint = GgufCheckpoint(path)
    for name, tensor in tensors.items():
        found = checkpoint.tensor(name)
        assert found.dtype == torch.bfloat16
        assert (found.float() - tensor.float()).norm() <= 0.01 * tensor.float().norm()


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tmp_path), {}, kind="qwen2")
    assert gguf_refused(path).endswith("a GGUF of architecture 'qwen2'; only 'llama' is supported")


def test_gguf_with_scaled_rope(tmp_path: Path) -> None:
    tensors = random_tensors(tmp_path, replace(TINY, rope_scaling=LLAMA31_ROPE))
    factors = {"rope_freqs.weight": torch.ones(TINY.head_dim // 2)}
    by_tensor = write_gguf(tmp_path / "a.gguf", tensors | factors, llama_fields(TINY))
    by_field = write_gguf(tmp_path / "b.gguf", tensors, llama_fields(TINY) | {"llama.rope.scaling.type": "linear"})
    for path in (by_tensor, by_field):
        assert gguf_refused(path).endswith("scaled RoPE inside a GGUF is not supported; use the model's safetensors")


@pytest.mark.parametrize("field", ["block_count", "embedding_length", "attention.layer_norm_rms_epsilon"])
def test_gguf_without_a_field(tmp_path: Path, field: str) -> None:
    fields = {name: value for name, value in llama_fields(TINY).items() if name != f"llama.{field}"}
    path = write_gguf(tmp_path / "m.gguf", random_tensors(tmp_path), fields)
    assert f"no metadata field llama.{field}; the file is incomplete, fetch it again" in gguf_refused(path)


def test_gguf_without_a_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(tmp_path)
    del tensors[UP]
    path = write_gguf(tmp_path / "m.gguf", tensors, llama_fields(TINY))
    assert f"tensor {UP} is None, expected (256, 128); the file is damaged" in gguf_refused(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.005, 0.01, 0.02, 0.5, 0.999])
def test_truncated_gguf(whole_gguf: Path, tmp_path: Path, share: float) -> None:
    """Cut in the magic, the fields, the tokens, the tensor list and the data."""
    whole = whole_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert gguf_refused(path).endswith("fetch it again")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 a zip archive, renamed" * 100)
    assert "not a readable GGUF file" in gguf_refused(path)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize(
    "found",
    [b"GGUF", b"general.architecture", b"llama.block_count", b"tokenizer.ggml.tokens", b"t100", b"token_embd.weight"],
)
def test_flipped_bit_in_a_gguf_header(whole_gguf: Path, tmp_path: Path, found: bytes, bit: int) -> None:
    """In the magic, in names of fields and tensors, in a token: other text, or (bit 7) no UTF-8 any more."""
    damaged = bytearray(whole_gguf.read_bytes())
    damaged[damaged.index(found)] ^= 1 << bit
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged)
    if (found, bit) == (b"t100", 0):
        assert GgufCheckpoint(path).fields["tokenizer.ggml.tokens"][100] == "u100"
    else:
        gguf_refused(path)
