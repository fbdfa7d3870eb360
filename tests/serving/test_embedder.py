"""The exported embedder against sentence-transformers: as it comes, and with its products quantized by torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.errors import InputError
from model.int4_linear import quantize_activations
from model.int8_linear import GROUP
from model.quantization import quantize
from serving.cache import Cache
from serving.certificate import admit
from serving.embedder import Embedder

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # sentence-transformers' own


@pytest.fixture(scope="module")
def texts(cache: Cache) -> list[str]:
    every = [text for _, text in cache.phrasings[::5]] + ["hi", "Où est la cité d'émeraude ?", "🦁 roars at 12:30!"]
    every += cache.contrast[: 1000 - len(every)]
    assert len(every) >= 1000
    return every


def test_vectors_are_near_those_of_sentence_transformers(
    embedded_build: Path, texts: list[str], embedder: Embedder
) -> None:
    expected = trained(embedded_build).encode(texts, normalize_embeddings=True)
    cosines = [float(vector @ embedder.embed(text)) for text, vector in zip(texts, expected, strict=True)]
    assert np.mean(cosines) > 0.9997
    assert min(cosines) > 0.998


def test_vectors_are_those_of_the_quantized_network(embedded_build: Path, texts: list[str], embedder: Embedder) -> None:
    """Up to activations at the edge of two values, which the order of a sum tips over: in float64 instead of float32
    this reference is as far from itself.
    """
    model, chosen = trained(embedded_build), texts[::10]
    quantize_products(model)
    expected = [model.encode(text, normalize_embeddings=True) for text in chosen]
    cosines = [float(vector @ embedder.embed(text)) for text, vector in zip(chosen, expected, strict=True)]
    assert np.mean(cosines) > 0.9999
    assert min(cosines) > 0.9996


def trained(build: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(build / "trained"), device="cpu")


class ReferenceLinear(torch.nn.Module):
    """A linear layer with weights and activations in 8 bits, in groups, by torch's own arithmetic."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = quantize("w", linear.weight.detach(), bits=8, group=GROUP, search_steps=0).dequantize()
        self.weight, self.bias = weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        whole, factor = quantize_activations(x.unflatten(-1, (-1, GROUP)))
        return torch.nn.functional.linear((whole / factor).flatten(-2), self.weight, self.bias)


def quantize_products(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, ReferenceLinear(child))
        else:
            quantize_products(child)


def test_a_text_always_gets_the_same_unit_vector(embedder: Embedder) -> None:
    first = embedder.embed("Who is the Wizard?")
    embedder.embed("something else of another length entirely, to disturb whatever state there is")
    assert np.array_equal(first, embedder.embed("Who is the Wizard?"))
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)


def test_a_text_beyond_the_longest_is_refused(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="reads at most 128"):
        embedder.embed("wizard " * 200)


def test_an_embedder_of_another_torch_is_refused(embedded_build: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_build / "embedder", tmp_path / "embedder"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "torch": "1.0.0"}))
    with pytest.raises(InputError, match=r"torch 1\.0\.0 .*run export_embedder"):
        Embedder(folder).load()


def test_a_damaged_embedder_is_no_miss(embedded_build: Path, cache: Cache, tmp_path: Path) -> None:
    """It is opened at the first question that needs it, which must not look like one without a ready answer."""
    folder = Path(shutil.copytree(embedded_build / "embedder", tmp_path / "embedder"))
    opened = Cache(embedded_build / "cache", Embedder(folder))
    assert admit(opened, embedded_build / "certificate.json") is not None
    with (folder / "program.so").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    with pytest.raises(InputError, match=r"program\.so: SHA-256 .* found, .* expected"):
        opened.lookup("What would the scarecrow have said to that?")
