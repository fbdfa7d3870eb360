"""Pieces on their way from the thread that makes them to the event loop."""

import asyncio
import math

import pytest

from model.engine import Piece
from model.sampling import Sampling, TokenLogprob
from serving.calls import Inbox
from serving.completion import TextCompletion
from serving.energy import EnergyModel
from serving.scheduler import Ticket


def piece(text: str, tokens: int, *, last: bool = False) -> Piece:
    known = (TokenLogprob(tokens, -0.5),)
    return Piece(text=text, tokens=tokens, finish_reason="length" if last else None, logprobs=known)


async def come(inbox: Inbox) -> list[list[str]]:
    return [[piece.text for piece in batch] async for batch in inbox.batches()]


def test_the_first_comes_at_once_and_the_last_brings_what_was_held() -> None:
    async def batches() -> list[list[str]]:
        inbox = Inbox(60)
        for count, text in enumerate("abcd", start=1):
            inbox.deliver(piece(text, count, last=text == "d"))
        return await come(inbox)

    assert asyncio.run(batches()) == [["a"], ["b", "c", "d"]]


def test_an_exception_comes_after_what_was_held() -> None:
    async def batches() -> list[list[str]]:
        inbox, seen = Inbox(60), list[list[str]]()
        for sent in (piece("a", 1), piece("b", 2), ValueError("broken")):
            inbox.deliver(sent)
        with pytest.raises(ValueError, match="broken"):
            async for batch in inbox.batches():
                seen.append([piece.text for piece in batch])
        return seen

    assert asyncio.run(batches()) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(60, [["a"], ["b"], ["c", "d"]]), (math.inf, [["a"], ["b", "c", "d"]])]
)
def test_flushing_hands_on_what_is_held_if_it_is_read_before_the_end(seconds: float, expected: list[list[str]]) -> None:
    async def batches() -> list[list[str]]:
        inbox = Inbox(seconds)
        for count, text in enumerate("abcd", start=1):
            inbox.deliver(piece(text, count, last=text == "d"))
            if text == "b":
                inbox.flush()
                inbox.flush()
        return await come(inbox)

    assert asyncio.run(batches()) == expected


class Spelt:
    """A tokenizer of tokens with two letters each."""

    def token_bytes(self, _token: int) -> bytes:
        return b"xy"


def test_merged_pieces_keep_the_log_probability_of_every_token() -> None:
    ticket = Ticket(Sampling(logprobs=0), "a", 60, lambda _piece: None)
    completion = TextCompletion("m", ticket, Spelt(), EnergyModel(400))  # type: ignore[arg-type]
    found = []
    for batch in ([piece("a", 1)], [piece("b", 2), piece("", 3)], [piece("d", 4, last=True)]):
        found += [chunk["choices"][0]["logprobs"] for chunk in completion.chunks(batch)]
    known = [one for one in found if one]
    assert [len(one["tokens"]) for one in known] == [1, 2, 1]
    assert [offset for one in known for offset in one["text_offset"]] == [0, 2, 4, 6]
