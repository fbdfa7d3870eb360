"""Compiles the sentence embedder of the cache into a program, so that serving needs no training library.

Its matrices are multiplied in 8 bits, on every CPU by the same rule (`model.int8_linear`); all else stays in float32.
A vector's cosine with the float32 model's is 0.9998 on average. The index and its certificate are made with what is
served, so what that costs in right answers has been counted.
"""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.artifact import read_json, write_manifest
from model.errors import InputError
from model.int8_linear import linear as product
from model.int8_linear import pack
from model.kernels import build
from model.program import compile_module, torch_version
from pipeline.configs import ExportEmbedderConfig
from pipeline.licences import copy_licences
from pipeline.progress import say
from pipeline.target import compiled_for


class _SentenceVector(torch.nn.Module):
    """The mean of a network's states as a plain function of token ids [1, T] to unit vectors [1, dimensions].

    One text at a time needs no padding, and so no mask.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.network(input_ids=ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
        return torch.nn.functional.normalize(states.mean(1), dim=-1)


class _Int8Linear(torch.nn.Module):
    """A linear layer whose product is in 8 bits."""

    def __init__(self, name: str, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        self.bias = linear.bias
        self.packed = torch.nn.Parameter(pack(name, linear.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = product(x.flatten(0, -2), self.packed, self.outputs).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def run(config: ExportEmbedderConfig, trained: Path, output: Path) -> None:
    """Writes the embedder folder (kind "embedder"): program.so, kernels.so and tokenizer.json."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(trained), device="cpu").eval()
    transformer, pooling = cast("tuple[Any, Any]", (model[0], model[1]))
    if (kind := pooling.get_config_dict()["pooling_mode"]) != "mean":
        raise InputError(f"{trained}: its sentence vectors are pooled by {kind!r}; choose a model that takes the mean")
    network = transformer.auto_model
    network.pooler = None  # BERT's own, which no sentence vector reads
    target = compiled_for("export_embedder.cpu", config.cpu)
    _quantize(network)
    say("  compiling the embedder; about half a minute")
    output.mkdir()
    build(target, output)
    ids = torch.arange(12)[None]
    tokens = torch.export.Dim("tokens", min=3, max=config.longest_tokens)
    program, shapes = _SentenceVector(network), {"ids": {1: tokens}}
    compile_module(program, (ids,), shapes, output / "program.so", target, freezing=True)
    shutil.copyfile(trained / "tokenizer.json", output / "tokenizer.json")
    copy_licences(trained, output)
    facts = {
        **read_json(trained / "source.json"),
        "dimensions": model.get_embedding_dimension(),
        "longest_tokens": config.longest_tokens,
        "cpu": target,
        "torch": torch_version(),
    }
    write_manifest(output, "embedder", facts)


def _quantize(module: torch.nn.Module, path: str = "") -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, _Int8Linear(f"{path}{name}.weight", child))
        else:
            _quantize(child, f"{path}{name}.")
