"""Compiles the sentence embedder of the cache into a program, so that serving needs no training library."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from model.artifact import write_manifest
from model.cpu import family
from model.program import compile_module, torch_version
from pipeline.configs import ExportEmbedderConfig
from pipeline.progress import say
from pipeline.sources import locate


class _SentenceVector(torch.nn.Module):
    """A sentence-transformers model as a plain function of token ids [1, T] to unit vectors [1, dimensions]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        features = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        vector: Tensor = self.model(features)["sentence_embedding"]
        return torch.nn.functional.normalize(vector, dim=-1)


def run(config: ExportEmbedderConfig, *paths: Path) -> None:
    """`paths` ends with the embedder folder to write; a folder source stands before it and is named by the config."""
    output = paths[-1]
    source = locate(config.source, config.sha256)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(source), device="cpu").eval()
    say("  compiling the embedder; about half a minute")
    output.mkdir()
    ids = torch.arange(12)[None]
    tokens = torch.export.Dim("tokens", min=3, max=config.longest_tokens)
    shapes = {"ids": {1: tokens}, "mask": {1: tokens}}
    compile_module(_SentenceVector(model), (ids, torch.ones_like(ids)), shapes, output / "program.pt2")
    shutil.copyfile(source / "tokenizer.json", output / "tokenizer.json")
    facts = {
        "source": config.source,
        "dimensions": model.get_embedding_dimension(),
        "longest_tokens": config.longest_tokens,
        "cpu": family(),
        "torch": torch_version(),
    }
    write_manifest(output, "embedder", facts)
