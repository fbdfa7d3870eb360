"""Sentences to unit vectors by the exported embedder program; the same one builds the index and serves lookups.

Every text is embedded alone, never in a batch, so that a phrasing gives bit for bit the same vector when the index
is built and when a visitor types it.
"""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.artifact import manifest_digest, read_manifest
from model.errors import InputError
from model.kernels import load as load_kernels
from model.program import Program, check_origin, load_program

Vector = NDArray[np.float32]


class TextTooLongError(InputError):
    """A text has more tokens than the embedder reads."""


class _Loaded(NamedTuple):
    tokenizer: Tokenizer
    run: Program
    longest_tokens: int


class Embedder:
    """An exported embedder folder (kind "embedder"), verified and loaded at the first text or `load`."""

    def __init__(self, folder: Path) -> None:
        self.digest = manifest_digest(folder)
        self._folder = folder

    def load(self) -> None:
        """Raises InputError if the folder is damaged, or compiled for another CPU or torch."""
        _ = self._loaded

    def embed(self, text: str) -> Vector:
        """The unit vector [dimensions] of a text. Raises TextTooLongError, and InputError as `load` does."""
        tokenizer, run, longest = self._loaded
        ids = tokenizer.encode(text).ids
        if len(ids) > longest:
            raise TextTooLongError(f"the text has {len(ids)} tokens; the embedder reads at most {longest}")
        with torch.inference_mode():
            vector: Vector = run([torch.tensor([ids])])[0][0].numpy().copy()
        return vector

    @cached_property
    def _loaded(self) -> _Loaded:
        manifest = read_manifest(self._folder, "embedder")
        check_origin(manifest, self._folder, "export_embedder")
        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        load_kernels(self._folder)
        return _Loaded(tokenizer, load_program(self._folder / "program.so"), manifest["longest_tokens"])
