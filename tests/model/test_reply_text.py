"""The text of a reply, when it ends and why, with a model that says what a test wants said."""

import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from model.engine import Engine, Piece, StopGate, timed
from model.kv_cache import KVCache, Place
from model.sampling import Sampling
from model.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.model.conftest import CONTEXT, GREEDY, text_of


class Scripted:
    """A model that says `reply` after a prompt of `prompt` tokens, whatever the prompt is."""

    architecture = TINY
    kv_dtype = torch.float32
    bytes_per_token = 0

    def __init__(self, prompt: int, reply: Sequence[int]) -> None:
        self.prompt, self.reply = prompt, torch.tensor(reply)

    def embed(self, tokens_T: Tensor) -> Tensor:
        return torch.zeros(len(tokens_T), 1)

    def layer(self, index: int, x_TD: Tensor, place: Place, cache: KVCache) -> Tensor:
        return place.positions_T[:, None].float()

    def head(self, x_TD: Tensor) -> Tensor:
        steps_T = x_TD[:, 0].long() - self.prompt + 1
        return torch.nn.functional.one_hot(self.reply[steps_T], TINY.vocab).float()


PROMPT = [5, 6, 7]


def scripted_pieces(tokenizer: Tokenizer, text: str, sampling: Sampling, *, end: bool = True) -> list[Piece]:
    """The pieces of a reply of one token per byte, closed by the stop token if `end`."""
    reply = [*tokenizer.encode(text), *([1] if end else [])]
    engine = Engine(Scripted(len(PROMPT), reply), tokenizer, CONTEXT)
    return list(engine.generate(PROMPT, sampling))


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


class Undecided(Scripted):
    """A model that always finds token 10 likeliest, and token 11 nearly so."""

    def head(self, x_TD: Tensor) -> Tensor:
        logits_TV = torch.full((len(x_TD), TINY.vocab), -5.0)
        logits_TV[:, 10:12] = torch.tensor([2.0, 1.9])
        return logits_TV


@pytest.mark.parametrize(
    ("prompt", "penalties", "said"),
    [
        ([5], {}, [10, 10, 10]),
        ([5], {"repetition_penalty": 1.5}, [10, 11, 10]),
        ([5, 10], {"repetition_penalty": 1.5}, [11, 10, 10]),
        ([11, 10], {"repetition_penalty": 1.5}, [10, 10, 10]),
        ([5, 10], {"presence_penalty": 0.5}, [10, 11, 10]),
        ([5, 10], {"frequency_penalty": 0.5}, [10, 11, 10]),
    ],
)
def test_repetition_is_penalized_in_prompt_and_reply_the_others_in_the_reply(
    tiny_tokenizer: Tokenizer, prompt: list[int], penalties: dict[str, float], said: list[int]
) -> None:
    engine = Engine(Undecided(0, []), tiny_tokenizer, CONTEXT)
    pieces = list(engine.generate(prompt, Sampling(temperature=0, max_tokens=3, **penalties)))  # type: ignore[arg-type]
    assert text_of(pieces) == tiny_tokenizer.decode(said)


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


def test_a_long_stop_text_costs_no_more_than_what_is_held() -> None:
    gate, begun = StopGate(["x" * 100_000]), time.perf_counter()
    assert "".join(gate.push("ab") for _ in range(100)) == "ab" * 100
    assert time.perf_counter() - begun < 1


def test_timing_counts_from_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.5, 12.5])
    monkeypatch.setattr("model.engine.time.perf_counter", lambda: next(clock))

    def pieces() -> Iterator[Piece]:
        yield from (Piece(text="a", tokens=1), Piece(text="b", tokens=2), Piece(text="c", tokens=3))

    timings = [(timing.ttft_s, timing.tpot_s, timing.tokens) for _, timing in timed(pieces())]
    assert timings == [(0.5, 0.0, 1), (0.5, 1.0, 2), (0.5, 1.0, 3)]
