"""What the model's tests share: random Llamas sharp enough to show every part, and the real SmolLM2."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer

import pipeline.fetch
import pipeline.quantize
from model.architecture import Architecture
from model.recipe import Recipe
from model.tokenizer import Tokenizer, chat_settings
from pipeline.configs import FetchConfig, embedded
from tests.conftest import TINY, write_tiny_model

ASCII_TOKENS = slice(2, 96)
"""The tiny tokenizer's tokens of "!" to "~"."""


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products gain nothing from more threads, and waiting for a busy core would dominate them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_random_model(folder: Path, architecture: Architecture = TINY, seed: int = 0) -> Path:
    """A tiny model of unit gain with uneven norms, so that no weight or norm can be left out unnoticed."""
    write_tiny_model(folder, architecture, seed)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in architecture.tensor_shapes().items():
        noise = torch.randn(shape, generator=random)
        tensors[name] = (1 + 0.3 * noise if len(shape) == 1 else noise * shape[1] ** -0.5).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face-style folder."""
    settings = chat_settings(folder)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    return Tokenizer(fast, settings["template"], settings["special"], settings["stop_tokens"])


def write_int4(model: Path, recipe: Recipe, folder: Path) -> Path:
    """Runs the stages fetch and quantize on a model folder; returns the int4 folder."""
    folder.mkdir(parents=True, exist_ok=True)
    source = FetchConfig(source=f"folder:{model}", model_id="tiny", licence="none")
    pipeline.fetch.run(source, folder / "checkpoint")
    pipeline.quantize.run(recipe, folder / "checkpoint", folder / "int4", folder / "report.json")
    return folder / "int4"


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose likeliest token is always a visible ASCII character; do not write to it."""
    folder = write_random_model(tmp_path_factory.mktemp("models") / "speaking")
    tensors = load_file(folder / "model.safetensors")
    spoken = torch.zeros_like(tensors["lm_head.weight"])
    spoken[ASCII_TOKENS] = tensors["lm_head.weight"][ASCII_TOKENS]
    save_file(tensors | {"lm_head.weight": spoken}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Tokenizer:
    """One token per byte, 0 and 1 special, 1 stops."""
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, fetched from its GGUF into a Hugging Face-style folder; do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "smollm"
    pipeline.fetch.run(embedded().fetch, folder)
    return folder
