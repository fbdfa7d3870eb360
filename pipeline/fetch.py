"""Brings the float model into the build folder as a Hugging Face-style folder.

A GGUF file is dequantized to bf16 with its tokenizer and chat template, and torchchat's model.pth is laid out as on the
hub; a folder or a hub snapshot is linked, not copied. Streamed, a hub's weights stay there and only what describes them
comes. Names, shapes, sizes and digests are checked here, before anything is computed from them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from model.architecture import Architecture
from model.artifact import link_or_copy, write_json
from model.checkpoint import INDEX, Checkpoint, GgufCheckpoint, SafetensorsCheckpoint, declared_architecture
from model.errors import InputError
from model.shards import write_shards
from model.tokenizer import chat_settings
from model.torchchat_format import PARAMS, WEIGHTS, TorchchatCheckpoint
from pipeline.configs import FetchConfig
from pipeline.hub import HubModel
from pipeline.hub_checkpoint import leave_on_hub
from pipeline.licences import LICENCE_FILES
from pipeline.progress import track
from pipeline.sources import locate

SMALL = ("*.json", "*.jinja", *LICENCE_FILES)
CONTROL_TOKEN = 3
"""GGUF's token type of tokens such as <|im_start|>, which no text produces."""


def run(config: FetchConfig, *paths: Path) -> None:
    """`paths` ends with the checkpoint folder to write; a folder source stands before it and is named by the config."""
    output = paths[-1]
    if config.streamed:
        model = HubModel.parse(config.source)
        found = model.snapshot(weights=False)
        output.mkdir()
        _link(found, output, SMALL)
        leave_on_hub(model, output)
        architecture = declared_architecture(output)
    else:
        found = locate(config.source, config.sha256)
        output.mkdir()
        architecture = _brought(found, output)
    write_json(output / "chat.json", chat_settings(found if found.is_dir() else output))
    facts = {"source": config.source, "model_id": config.model_id, "licence": config.licence}
    write_json(output / "source.json", {**facts, "architecture": architecture.to_dict()})


def _brought(found: Path, output: Path) -> Architecture:
    if found.suffix == ".gguf":
        gguf = GgufCheckpoint(found)
        _write_weights(gguf, output)
        _write_tokenizer(gguf, output)
    elif (found / WEIGHTS).exists() and (found / PARAMS).exists():
        torchchat = TorchchatCheckpoint(found)
        _write_weights(torchchat, output)
        _link(found, output, ("tokenizer*.json", "generation_config.json", "*.jinja", *LICENCE_FILES))
        write_json(output / "config.json", torchchat.architecture.to_config_json())
    elif found.is_dir():
        SafetensorsCheckpoint(found)  # refuses a bad folder under the user's own path
        _link(found, output, (*SMALL, "*.safetensors"))
    else:
        raise InputError(f"{found}: neither a folder nor a .gguf file; give a model folder")
    return SafetensorsCheckpoint(output).architecture


def _link(folder: Path, output: Path, patterns: Sequence[str]) -> None:
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        link_or_copy(file.resolve(), output / file.name)


def _write_weights(checkpoint: Checkpoint, output: Path) -> None:
    names = checkpoint.architecture.tensor_shapes()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in track(names, "converting"):
            yield name, checkpoint.tensor(name)

    weight_map = write_shards(tensors(), output, "model")
    write_json(output / INDEX, {"metadata": {}, "weight_map": weight_map})


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
