"""Compiles the sentence embedder of the cache into a program, so that serving needs no training library.

Its matrices are laid out for the CPU's product once, here, and multiplied in bf16 where the CPU has instructions for
it; all else stays in float32. That keeps a vector within a cosine of 0.9999 of the float32 model's. For another CPU
than this one, matrices stay as they are, since the product lays them out as the CPU likes that it runs on.
"""

import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.artifact import read_json, write_manifest
from model.cpu import family
from model.errors import InputError
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


class _HalfLinear(torch.nn.Module):
    """A linear layer that multiplies in bf16 and takes and gives float32."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = torch.nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.bfloat16(), self.weight, self.bias).float()


def run(config: ExportEmbedderConfig, trained: Path, output: Path) -> None:
    """Writes the embedder folder (kind "embedder"): program.so and tokenizer.json."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer
    from torch._inductor import config as inductor

    model = SentenceTransformer(str(trained), device="cpu").eval()
    transformer, pooling = cast("tuple[Any, Any]", (model[0], model[1]))
    if (kind := pooling.get_config_dict()["pooling_mode"]) != "mean":
        raise InputError(f"{trained}: its sentence vectors are pooled by {kind!r}; choose a model that takes the mean")
    network = transformer.auto_model
    network.pooler = None  # BERT's own, which no sentence vector reads
    target = compiled_for("export_embedder.cpu", config.cpu)
    here = target == family()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported() if here else "bf16" in target
    if half:
        _halve(network)
    say("  compiling the embedder; about half a minute")
    output.mkdir()
    ids = torch.arange(12)[None]
    tokens = torch.export.Dim("tokens", min=3, max=config.longest_tokens)
    program, shapes = _SentenceVector(network), {"ids": {1: tokens}}
    with inductor.patch({"cpp.weight_prepack": here}):
        compile_module(program, (ids,), shapes, output / "program.so", target, freezing=True)
    shutil.copyfile(trained / "tokenizer.json", output / "tokenizer.json")
    copy_licences(trained, output)
    facts = {
        **read_json(trained / "source.json"),
        "dimensions": model.get_embedding_dimension(),
        "longest_tokens": config.longest_tokens,
        "products": "bf16" if half else "float32",
        "cpu": target,
        "torch": torch_version(),
    }
    write_manifest(output, "embedder", facts)


def _halve(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, _HalfLinear(child))
        else:
            _halve(child)
