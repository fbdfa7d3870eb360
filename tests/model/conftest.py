"""What the model's tests share: random Llamas sharp enough to show every part, the real SmolLM2, and how to compare.

The engine rounds activations to 8 bits and keys and values to bf16. The last digits of a float depend on the order of
its sum, so now and then such a rounding falls the other way: a whole step, which all that follows sees. In a deep model
that changes every logit by as much as the 8 bits themselves do, and no two right programs agree. So one program is
compared at a time, from equal inputs; and of the whole, how far it is from the reference must be no more than how far
the reference is from itself when its last digits are `Shaken`.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from model.kernels import build, declare
from model.kernels import load as load_kernels
from model.kv_cache import KVCache, Place, new_caches, single_sequence
from model.llama import Model, Network, rotary_table
from model.networks import EMBEDDING, NORM, Int4Folder, quantized_network
from model.program import CompiledModel
from model.recipe import Recipe
from model.tokenizer import Tokenizer, chat_settings
from pipeline.configs import ExportConfig, FetchConfig, embedded
from tests.conftest import TINY, write_tiny_model

ASCII_TOKENS = slice(2, 96)
"""The tiny tokenizer's tokens of "!" to "~"."""
CONTEXT = 200
"""Of the tiny engines; not a whole number of the cache's pages, on purpose."""
NEAR_TIE = 1e-3
"""Logits closer than this are a near-tie."""
SAME = 1e-5
"""Relative distance of results that differ in the order of sums alone."""
FLIPPED = 0.05
"""What a rounding that falls the other way may do to what a layer adds."""


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


class Shaken(Network):
    """A network whose activations differ in the sixth digit, layer by layer, as if sums were in another order."""

    def __init__(self, network: Network) -> None:
        vars(self).update(vars(network))
        self._random = torch.Generator().manual_seed(0)

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        noise_TD = torch.randn(x_TD.shape, generator=self._random)
        return super().layer(index, x_TD * (1 + 1e-6 * noise_TD), place, cache)


def program_distances(compiled: CompiledModel, reference: Network, tokens: Sequence[int]) -> list[Tensor]:
    """Relative distances [T] of each program's results to the reference's, for the last few tokens.

    Inputs are the reference's own, and so are the keys and values of earlier tokens.
    """
    arch, earlier = reference.architecture, max(len(tokens) - 4, 0)
    place = scattered(arch, len(tokens))
    start, end = (
        place._replace(positions_T=place.positions_T[part], rows_T=place.rows_T[part])
        for part in (slice(earlier), slice(earlier, None))
    )
    before_TD, x_TD = reference.embed(torch.tensor(tokens)).split([earlier, len(tokens) - earlier])
    distances = [_relative(compiled.embed(torch.tensor(tokens[earlier:])), x_TD, x_TD)]
    for index, cache in enumerate(new_caches(arch, place.tables_BP.shape[1], torch.bfloat16)):
        before_TD = reference.layer(index, before_TD, start, cache) if earlier else before_TD
        copy = KVCache(cache.keys.clone(), cache.values.clone())
        expected_TD = reference.layer(index, x_TD, end, cache)
        distances.append(_relative(compiled.layer(index, x_TD, end, copy), expected_TD, expected_TD - x_TD))
        x_TD = expected_TD
    logits_TV = reference.head(x_TD)
    return [*distances, _relative(compiled.head(x_TD), logits_TV, logits_TV)]


def _relative(found_TD: Tensor, expected_TD: Tensor, to_TD: Tensor) -> Tensor:
    distances_T: Tensor = (found_TD - expected_TD).norm(dim=1) / to_TD.norm(dim=1)
    return distances_T


def assert_each_program_computes_the_same(
    compiled: CompiledModel, reference: Network, sequences: Sequence[Sequence[int]]
) -> None:
    """Nearly all results are the same but for the order of sums; the others are a rounding away."""
    with torch.inference_mode():
        every = [program_distances(compiled, reference, tokens) for tokens in sequences]
    for distances in zip(*every, strict=True):
        distances_T = torch.cat(distances)
        assert float(distances_T.max()) < FLIPPED
        assert float((distances_T < SAME).float().mean()) > 0.8


def divergence(logits_TV: Tensor, others_TV: Tensor) -> float:
    """Mean KL divergence of the first logits' distributions to the others', in nats."""
    p, q = (logits.double().log_softmax(dim=-1) for logits in (logits_TV, others_TV))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@dataclass(frozen=True)
class Choices:
    """Greedy tokens judged by a reference that has read the same tokens before each."""

    tokens: int = 0
    near_ties: int = 0
    """Others than the reference's likeliest, less than NEAR_TIE below it."""
    others: int = 0
    """Others further below."""
    gap: float = 0.0
    """The furthest."""

    def __add__(self, more: "Choices") -> "Choices":
        counts = (self.tokens + more.tokens, self.near_ties + more.near_ties, self.others + more.others)
        return Choices(*counts, max(self.gap, more.gap))


def judge(logits_TV: Tensor, chosen: Sequence[int]) -> Choices:
    """Compares chosen tokens with the likeliest."""
    gaps_T = logits_TV.amax(dim=-1) - logits_TV.gather(1, torch.tensor(chosen)[:, None])[:, 0]
    near = int(((gaps_T > 0) & (gaps_T < NEAR_TIE)).sum())
    return Choices(len(chosen), near, int((gaps_T >= NEAR_TIE).sum()), float(gaps_T.max()))


def assert_chosen_as_by_the_reference(
    reference: Network, replies: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Choices, Choices]:
    """Greedy replies to prompts differ from the reference's choices no more often than its own do when shaken.

    Each reply is read by the reference in one pass, so that up to the first difference the comparison is with its own
    greedy reply, and after one it goes on. Returns the replies' choices and those of the shaken reference.
    """
    found, allowed, shaken = Choices(), Choices(), Shaken(reference)
    for prompt, reply in replies:
        read, asked = [*prompt, *reply[:-1]], slice(len(prompt) - 1, None)
        expected_TV = all_logits(reference, read)[asked]
        found += judge(expected_TV, reply)
        allowed += judge(expected_TV, all_logits(shaken, read)[asked].argmax(dim=-1).tolist())
    print(f"\n{found} (the reference, shaken: {allowed})")
    chance = 3 * (allowed.others + 1) ** 0.5  # both counts are random
    assert found.others <= allowed.others + chance
    assert found.near_ties <= allowed.near_ties + chance
    return found, allowed


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
    return quantized_network(Int4Folder(int4), as_served=True)


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
