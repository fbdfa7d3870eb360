"""Brings the float model into the build folder as a Hugging Face-style folder.

A GGUF file is dequantized to bf16 with its tokenizer and chat template; a folder or a hub snapshot is linked, not
copied. Names, shapes, sizes and digests are checked here, before anything is computed from them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model.artifact import write_json
from model.checkpoint import GgufCheckpoint, SafetensorsCheckpoint
from model.errors import InputError
from model.shards import write_shards
from model.tokenizer import chat_settings
from pipeline.configs import FetchConfig
from pipeline.progress import track
from pipeline.sources import locate

KEPT = ("*.safetensors", "*.json", "*.jinja", "LICENSE*", "USE_POLICY*", "NOTICE*")
CONTROL_TOKEN = 3
"""GGUF's token type of tokens such as <|im_start|>, which no text produces."""


def run(config: FetchConfig, *paths: Path) -> None:
    """`paths` ends with the checkpoint folder to write; a folder source stands before it and is named by the config."""
    output = paths[-1]
    found = locate(config.source, config.sha256)
    output.mkdir()
    if found.suffix == ".gguf":
        _convert(GgufCheckpoint(found), output)
    elif found.is_dir():
        SafetensorsCheckpoint(found)  # refuses a bad folder under the user's own path
        _link(found, output)
    else:
        raise InputError(f"{found}: neither a folder nor a .gguf file; give a model folder")
    checkpoint = SafetensorsCheckpoint(output)
    write_json(output / "chat.json", chat_settings(found if found.is_dir() else output))
    facts = {"source": config.source, "model_id": config.model_id, "licence": config.licence}
    write_json(output / "source.json", {**facts, "architecture": checkpoint.architecture.to_dict()})


def _link(folder: Path, output: Path) -> None:
    for file in sorted({path for pattern in KEPT for path in folder.glob(pattern)}):
        try:
            os.link(file.resolve(), output / file.name)
        except OSError:
            shutil.copyfile(file, output / file.name)


def _convert(checkpoint: GgufCheckpoint, output: Path) -> None:
    names = checkpoint.architecture.tensor_shapes()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in track(names, "dequantizing"):
            yield name, checkpoint.tensor(name)

    weight_map = write_shards(tensors(), output, "model")
    write_json(output / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_tokenizer(checkpoint, output)


def _write_tokenizer(checkpoint: GgufCheckpoint, output: Path) -> None:
    """config.json, tokenizer.json and tokenizer_config.json from a GGUF's metadata."""
    fields, path = checkpoint.fields, checkpoint.path
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{path}: tokenizer {kind} inside a GGUF is not supported; use the model's safetensors folder")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(output / "tokenizer.json"))
    bos, eos = (tokens[fields[f"tokenizer.ggml.{end}_token_id"]] for end in ("bos", "eos"))
    template = fields["tokenizer.chat_template"]
    settings = {
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(output / "tokenizer_config.json", settings)
    config = checkpoint.architecture.to_config_json()
    ends = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    (output / "config.json").write_text(json.dumps({**config, **ends}, indent=2) + "\n", encoding="utf-8")
