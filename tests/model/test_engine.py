"""Generation with a real tiny network against full recomputation, and with a scripted model for text and stopping."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.checkpoint import SafetensorsCheckpoint
from model.engine import Engine, Piece, StopGate, timed
from model.errors import InputError
from model.llama import KVCache, Network, sequence_logits
from model.networks import float_network
from model.sampling import Sampling
from model.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.model.conftest import load_tokenizer

CONTEXT = 200
"""Not a multiple of the cache's step, on purpose."""
GREEDY = Sampling(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def network(speaking_model: Path) -> Network:
    return float_network(SafetensorsCheckpoint(speaking_model), torch.float32)


@pytest.fixture
def engine(network: Network, speaking_model: Path) -> Engine:
    return Engine(network, load_tokenizer(speaking_model), CONTEXT)


class Scripted:
    """A model that says `reply` after a prompt of `prompt` tokens, whatever the prompt is."""

    architecture = TINY
    dtype = torch.float32
    bytes_per_token = 0

    def __init__(self, prompt: int, reply: Sequence[int]) -> None:
        self.prompt, self.reply = prompt, reply

    def embed(self, tokens_T: Tensor) -> Tensor:
        return torch.zeros(len(tokens_T), 1)

    def layer(self, index: int, x_TD: Tensor, rotary_T2H: Tensor, positions_T: Tensor, cache: KVCache) -> Tensor:
        return positions_T[:, None].float()

    def head(self, x_1D: Tensor) -> Tensor:
        step = int(x_1D) - self.prompt + 1
        return torch.nn.functional.one_hot(torch.tensor([self.reply[step]]), TINY.vocab).float()


PROMPT = [5, 6, 7]


def scripted_pieces(tokenizer: Tokenizer, text: str, sampling: Sampling, *, end: bool = True) -> list[Piece]:
    """The pieces of a reply of one token per byte, closed by the stop token if `end`."""
    reply = [*tokenizer.encode(text), *([1] if end else [])]
    engine = Engine(Scripted(len(PROMPT), reply), tokenizer, CONTEXT)
    return list(engine.generate(PROMPT, sampling))


def text_of(pieces: Sequence[Piece]) -> str:
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces)


def recomputed(network: Network, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(sequence_logits(network, torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 100])
def test_greedy_text_is_that_of_full_recomputation(engine: Engine, network: Network, length: int) -> None:
    prompt = torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    pieces = list(engine.generate(prompt, GREEDY))
    assert text_of(pieces) == engine.tokenizer.decode(recomputed(network, prompt, 24))
    assert [piece.tokens for piece in pieces] == [*range(1, 24), 24]
    assert pieces[-1].finish_reason == "length"
    assert len(set(text_of(pieces))) > 3


def test_shared_prefix_is_not_computed_again(engine: Engine, network: Network, speaking_model: Path) -> None:
    persona, questions = list(range(2, 60)), ([70, 71, 72], [70, 80], [70, 71, 72, 73], [90])
    for question in questions:
        fresh = Engine(network, load_tokenizer(speaking_model), CONTEXT)
        expected = text_of(list(fresh.generate(persona + question, GREEDY)))
        first, *rest = engine.generate(persona + question, GREEDY)
        assert text_of([first, *rest]) == expected
    engine.next_logits([*persona, 33])
    assert engine.reused_tokens == len(persona)
    engine.next_logits([3, *persona])
    assert engine.reused_tokens == 0


def test_same_prompt_computes_its_last_token_only(engine: Engine) -> None:
    first = engine.next_logits(list(range(2, 40)))
    assert engine.reused_tokens == 0
    second = engine.next_logits(list(range(2, 40)))
    assert engine.reused_tokens == 37
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    engine.next_logits(list(range(2, 20)))
    assert engine.reused_tokens == 17


def test_reply_is_reused_by_the_next_turn(engine: Engine) -> None:
    prompt = list(range(2, 40))
    reply = engine.tokenizer.encode(text_of(list(engine.generate(prompt, GREEDY))))
    engine.next_logits([*prompt, *reply, 50, 51])
    assert engine.reused_tokens == len(prompt) + len(reply) - 1  # the last sampled token was never an input


def test_forget_computes_everything_again(engine: Engine) -> None:
    engine.next_logits([2, 3, 4])
    engine.forget()
    engine.next_logits([2, 3, 4])
    assert engine.reused_tokens == 0


def test_abandoned_reply_leaves_a_sound_cache(engine: Engine, network: Network) -> None:
    abandoned = engine.generate(list(range(2, 50)), GREEDY)
    next(abandoned)
    next(abandoned)
    prompt = [*range(2, 50), 60]
    assert text_of(list(engine.generate(prompt, GREEDY))) == engine.tokenizer.decode(recomputed(network, prompt, 24))


def test_failed_pass_is_not_taken_for_computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.next_logits([2, 3, 4, 5]).clone()
    engine.forget()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Network, "layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        engine.next_logits([2, 3, 4, 5])
    torch.testing.assert_close(engine.next_logits([2, 3, 4, 5]), expected)
    assert engine.reused_tokens == 0


@pytest.mark.parametrize("size", [1, 7, 29, 30])
def test_long_prompt_in_pieces_equals_one_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    prompt = list(range(2, 32))
    whole = engine.next_logits(prompt)
    engine.forget()
    monkeypatch.setattr("model.engine.PREFILL_TOKENS", size)
    torch.testing.assert_close(engine.next_logits(prompt), whole, rtol=0, atol=1e-5)


def test_sampling_is_reproducible_and_fresh_without_a_seed(engine: Engine) -> None:
    def reply(seed: int | None) -> str:
        return text_of(list(engine.generate([2, 3, 4], Sampling(temperature=2, top_p=1, seed=seed, max_tokens=20))))

    assert reply(7) == reply(7)
    assert len({reply(7), reply(8), reply(None), reply(None)}) == 4


def test_empty_prompt(engine: Engine) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        engine.generate([], GREEDY)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1])
def test_too_long_prompt(engine: Engine, length: int) -> None:
    with pytest.raises(InputError, match=f"the prompt has {length} tokens, and the context holds {CONTEXT}"):
        engine.generate([5] * length, GREEDY)


@pytest.mark.parametrize("room", [1, 2, 10])
def test_full_context_ends_the_reply(engine: Engine, network: Network, room: int) -> None:
    prompt = torch.randint(2, 96, (CONTEXT - room,), generator=torch.Generator().manual_seed(0)).tolist()
    pieces = list(engine.generate(prompt, GREEDY))
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == ("length", room)
    assert text_of(pieces) == engine.tokenizer.decode(recomputed(network, prompt, room))


def test_stop_token_ends_the_reply_and_is_not_counted(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abc", GREEDY)
    assert text_of(pieces) == "abc"
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == ("stop", 3)


def test_reply_may_be_empty(tiny_tokenizer: Tokenizer) -> None:
    assert scripted_pieces(tiny_tokenizer, "", GREEDY) == [Piece(text="", tokens=0, finish_reason="stop")]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_max_tokens_ends_the_reply(tiny_tokenizer: Tokenizer, limit: int) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abcdefgh", Sampling(temperature=0, max_tokens=limit))
    assert text_of(pieces) == "abcdefgh"[:limit]
    assert (pieces[-1].finish_reason, pieces[-1].tokens) == ("length", limit)


def test_limit_reached_with_the_stop_token_due_is_length(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abc", Sampling(temperature=0, max_tokens=3))
    assert (text_of(pieces), pieces[-1].finish_reason) == ("abc", "length")


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("END", ("END",), ""),
        ("a\n\nb", ("\n\n",), "a"),
        ("xxabcyy", ("bc", "abc"), "xx"),
        ("tschüß 😀 end", ("😀",), "tschüß "),
        ("ends in EN", ("END",), "ends in EN"),
        ("aab", ("ab",), "a"),
    ],
)
def test_stop_text_across_tokens(tiny_tokenizer: Tokenizer, text: str, stop: tuple[str, ...], shown: str) -> None:
    pieces = scripted_pieces(tiny_tokenizer, text, Sampling(temperature=0, stop=stop))
    assert text_of(pieces) == shown
    assert pieces[-1].finish_reason == "stop"


def test_reply_ends_with_the_token_that_completes_a_stop_text(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abENDcd", Sampling(temperature=0, stop=("END",)), end=False)
    assert pieces[-1].tokens == 5


def test_stop_text_completed_by_the_last_allowed_token_is_stop(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abEND", Sampling(temperature=0, max_tokens=5, stop=("END",)))
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].tokens) == ("ab", "stop", 5)


def test_held_back_text_is_shown_at_the_limit(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "abENDxx", Sampling(temperature=0, max_tokens=4, stop=("END",)))
    assert (text_of(pieces), pieces[-1].finish_reason) == ("abEN", "length")


def test_characters_are_never_cut(tiny_tokenizer: Tokenizer) -> None:
    text = "naïve 日本 😀!"
    pieces = scripted_pieces(tiny_tokenizer, text, Sampling(temperature=0))
    assert [piece.text for piece in pieces if piece.text] == list(text)


def test_character_cut_by_the_limit_shows_as_replacement(tiny_tokenizer: Tokenizer) -> None:
    pieces = scripted_pieces(tiny_tokenizer, "ab😀", Sampling(temperature=0, max_tokens=4))
    assert text_of(pieces) == "ab\ufffd"


# StopGate


def gated(pieces: Sequence[str], *stops: str) -> tuple[list[str], str, bool]:
    """What the gate shows piece by piece, at the end, and whether it stopped."""
    gate, shown = StopGate(stops), []
    for piece in pieces:
        shown.append(gate.push(piece))
        if gate.stopped:
            return shown, "", True
    return shown, gate.flush(""), gate.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["a", "b"], [], (["a", "b"], "", False)),
        (["abE", "N", "Dcd"], ["END"], (["ab", "", ""], "", True)),
        (["abE", "N", "xD"], ["END"], (["ab", "", "ENxD"], "", False)),
        (["abEN"], ["END"], (["ab"], "EN", False)),
        (["aaab"], ["aab"], (["a"], "", True)),
        (["aa", "aa", "b"], ["aab"], (["", "aa", ""], "", True)),
        (["x12", "3"], ["123", "2"], (["x1"], "", True)),
        (["x1", "23"], ["23", "123"], (["x", ""], "", True)),
        (["late STOP early END"], ["END", "STOP"], (["late "], "", True)),
    ],
)
def test_gate(pieces: list[str], stops: list[str], expected: tuple[list[str], str, bool]) -> None:
    assert gated(pieces, *stops) == expected


def test_gate_finds_a_stop_text_in_the_last_flush() -> None:
    gate = StopGate(["END"])
    assert (gate.push("xEN"), gate.flush("Dy"), gate.stopped) == ("x", "", True)


def test_timing_counts_from_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.5, 12.5])
    monkeypatch.setattr("model.engine.time.perf_counter", lambda: next(clock))

    def pieces() -> Iterator[Piece]:
        yield from (Piece(text="a", tokens=1), Piece(text="b", tokens=2), Piece(text="c", tokens=3))

    timings = [(timing.ttft_s, timing.tpot_s, timing.tokens) for _, timing in timed(pieces())]
    assert timings == [(0.5, 0.0, 1), (0.5, 1.0, 2), (0.5, 1.0, 3)]
