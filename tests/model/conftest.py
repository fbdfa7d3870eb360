"""What the model's tests share: random Llamas sharp enough to show every part, the real SmolLM2, and how to compare.

Engine and reference round every result once (model/llama.py), so they agree to the last digits of the logits, where the
head's sums are, and on every word.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

import pipeline.export
import pipeline.fetch
import pipeline.quantize
from model.architecture import Architecture
from model.cpu import family
from model.engine import Piece
from model.kernels import build, declare
from model.kernels import load as load_kernels
from model.kv_cache import Place, new_caches, single_sequence
from model.llama import Model, Network, rotary_table
from model.networks import EMBEDDING, NORM, Int4Folder, quantized_network
from model.program import CompiledModel
from model.recipe import Recipe
from model.sampling import Sampling
from model.tokenizer import Tokenizer, chat_settings
from pipeline.configs import ExportConfig, FetchConfig, embedded
from pipeline.stages import CALIBRATION_TEXT
from tests.conftest import ROOT, TINY, write_tiny_model

ASCII_TOKENS = slice(2, 96)
"""The tiny tokenizer's tokens of "!" to "~"."""
CONTEXT = 200
"""Of the tiny engines; not a whole number of the cache's pages, on purpose."""
SAME = 1e-5
"""Of logits, as a part of the largest: the order of the last sums."""


GREEDY = Sampling(temperature=0, max_tokens=24)


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
    text = ROOT / CALIBRATION_TEXT
    pipeline.quantize.run(recipe, text, folder / "checkpoint", folder / "int4", folder / "report.json")
    return folder / "int4"


def export(int4: Path, folder: Path, cpu: str = "native") -> Path:
    """Runs the stage export; returns the engine folder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)  # torch's own
        pipeline.export.run(ExportConfig(context_tokens=CONTEXT, cpu=cpu), int4, folder)
    return folder


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Visible ASCII characters of the tiny tokenizer."""
    random = torch.Generator().manual_seed(1000 * seed + count)
    tokens: list[int] = torch.randint(ASCII_TOKENS.start, ASCII_TOKENS.stop, (count,), generator=random).tolist()
    return tokens


def scattered(architecture: Architecture, tokens: int) -> Place:
    """The place of a whole sequence on pages that are not in order."""
    place = single_sequence(rotary_table(architecture, tokens), tokens)
    pages = torch.randperm(place.tables_BP.shape[1], generator=torch.Generator().manual_seed(tokens))
    return place._replace(tables_BP=pages[None].int())


def all_logits(model: Model, tokens: Sequence[int]) -> Tensor:
    """Logits [T, V] at every position, in one pass through a model, eager or compiled."""
    place = scattered(model.architecture, len(tokens))
    with torch.inference_mode():
        x_TD = model.embed(torch.tensor(tokens))
        for index, cache in enumerate(new_caches(model.architecture, place.tables_BP.shape[1], model.kv_dtype)):
            x_TD = model.layer(index, x_TD, place, cache)
        return model.head(x_TD).float()


def text_of(pieces: Sequence[Piece]) -> str:
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert pieces[-1].finish_reason is not None
    return "".join(piece.text for piece in pieces)


def assert_same_logits(found_TV: Tensor, expected_TV: Tensor, within: float = SAME) -> None:
    torch.testing.assert_close(found_TV, expected_TV, rtol=0, atol=within * float(expected_TV.abs().max()))


def assert_chosen_as_by_the_reference(
    reference: Network, replies: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> None:
    """Greedy replies to prompts are the reference's own: it reads each in one pass and would choose every token."""
    for prompt, reply in replies:
        logits_TV = all_logits(reference, [*prompt, *reply[:-1]])[len(prompt) - 1 :]
        assert logits_TV.argmax(dim=-1).tolist() == list(reply)


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with one table, whose likeliest token is always a visible ASCII character; do not write to it.

    Small embeddings, or a token would be the likeliest to follow itself.
    """
    folder = write_random_model(tmp_path_factory.mktemp("models") / "speaking", replace(TINY, tied_head=True))
    tensors = load_file(folder / "model.safetensors")
    table, norm = torch.zeros_like(tensors[EMBEDDING]), 5 * tensors[NORM]
    table[ASCII_TOKENS] = 0.2 * tensors[EMBEDDING][ASCII_TOKENS]
    save_file(tensors | {EMBEDDING: table, NORM: norm}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def int4(speaking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaking model quantized; do not write to it."""
    recipe = Recipe(scheme="int4-g32", embedding_bits=8, head_bits=8)
    return write_int4(speaking_model, recipe, tmp_path_factory.mktemp("int4"))


@pytest.fixture(scope="session")
def engine_folder(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaking model compiled; takes most of a minute. Do not write to it."""
    return export(int4, tmp_path_factory.mktemp("engines") / "engine")


@pytest.fixture(scope="session")
def compiled(engine_folder: Path) -> CompiledModel:
    return CompiledModel(engine_folder)


@pytest.fixture(scope="session")
def reference(int4: Path) -> Network:
    """What the engine should compute: the same weights, eagerly, with its activations and its KV cache emulated."""
    return quantized_network(Int4Folder(int4), as_served=True, products=torch.float64)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Makes this machine's kernels torch operators."""
    folder = tmp_path_factory.mktemp("kernels")
    build(family(), folder)
    load_kernels(folder)
    declare()


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
