"""Sentences to unit vectors by the exported embedder program; the same one builds the index and serves lookups.

Every text is embedded alone, never in a batch, so that a phrasing gives bit for bit the same vector when the index
is built and when a visitor types it.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.artifact import manifest_digest, read_manifest
from model.errors import InputError
from model.program import Program, check_origin, load_program

Vector = NDArray[np.float32]


class Embedder:
    """An exported embedder folder (kind "embedder"), verified and loaded."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder, "embedder")
        check_origin(manifest, folder, "export_embedder")
        self.digest = manifest_digest(folder)
        self.dimensions: int = manifest["dimensions"]
        self.longest_tokens: int = manifest["longest_tokens"]
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder

    @cached_property
    def _run(self) -> Program:
        """Loaded at the first text."""
        return load_program(self._folder / "program.pt2")

    def embed(self, text: str) -> Vector:
        """The unit vector [dimensions] of a text. Raises InputError if it is longer than the embedder reads."""
        ids = self._tokenizer.encode(text).ids
        if len(ids) > self.longest_tokens:
            raise InputError(f"the text has {len(ids)} tokens; the embedder reads at most {self.longest_tokens}")
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            vector: Vector = self._run([tokens, torch.ones_like(tokens)])[0][0].numpy().copy()
        return vector
