"""SmolLM2, a real model: the engine's greedy replies to twenty prompts, judged by the same weights computed eagerly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pipeline.quantize
from model.engine import Engine
from model.llama import Network
from model.networks import Int4Folder, quantized_network
from pipeline.configs import embedded
from pipeline.stages import CALIBRATION_TEXT
from tests.conftest import ROOT
from tests.model.conftest import assert_chosen_as_by_the_reference, export

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 4,",
    "Dorothy lived in the midst of",
    "Water boils at",
    "My favourite book is",
    "The road was paved with",
    "In 1893, a fox said:",
    "To make bread, you need",
    "Dear Sir or Madam,",
    "The wizard looked at her and",
    "Q: What is 2 + 2?\nA:",
    "The three primary colours are",
    "import numpy as np\n",
    "Es war einmal ein",
    "The president of the United States",
    "Roses are red,",
    "A prime number is",
    "Toto barked because",
)
TOKENS = 64
Replies = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module", params=["int4-g32", "int4-channel"])
def int4(request: pytest.FixtureRequest, smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm")
    recipe = replace(embedded().quantize, scheme=request.param, method="search")
    pipeline.quantize.run(recipe, ROOT / CALIBRATION_TEXT, smollm, folder / "int4", folder / "report.json")
    return folder / "int4"


@pytest.fixture(scope="module")
def engine(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(export(int4, tmp_path_factory.mktemp("smollm") / "engine"), sequences=len(PROMPTS))


@pytest.fixture(scope="module")
def reference(int4: Path) -> Network:
    return quantized_network(Int4Folder(int4), as_served=True, products=torch.float64)


@pytest.fixture(scope="module")
def replies(engine: Engine) -> Replies:
    """One after the other, each computed from its first token."""
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    return [(prompt, list(engine.greedy(prompt, TOKENS))) for prompt in prompts]


def test_engine_chooses_what_the_reference_chooses(replies: Replies, reference: Network) -> None:
    assert all(len(reply) == TOKENS for _, reply in replies)
    assert_chosen_as_by_the_reference(reference, replies)


def test_together_they_say_the_same(replies: Replies, engine: Engine) -> None:
    """All twenty in one pass per token."""
    sequences = [engine.begin(prompt, len(prompt) + TOKENS) for prompt, _ in replies]
    for _ in range(TOKENS):
        for sequence, logits_V in zip(sequences, engine.advance(sequences), strict=True):
            assert logits_V is not None
            sequence.tokens.append(int(logits_V.argmax()))
    for sequence, (prompt, reply) in zip(sequences, replies, strict=True):
        engine.end(sequence)
        assert sequence.tokens == [*prompt, *reply]
