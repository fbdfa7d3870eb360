"""How pieces of a reply become frames."""

import json
import threading
import time
from queue import SimpleQueue

import pytest

from model.engine import Piece
from model.sampling import Sampling
from serving.completion import Completion
from serving.conversation import batches, fitting
from serving.energy import EnergyModel
from serving.scheduler import Ticket
from serving.websocket import FRAME_BYTES, Frames

Inbox = SimpleQueue[Piece | Exception]


def pieces(*texts: str, end: bool = True) -> list[Piece]:
    made = [Piece(text=text, tokens=count) for count, text in enumerate(texts, start=1)]
    return [*made, Piece(text="", tokens=len(made), finish_reason="stop")] if end else made


def filled(*content: Piece | Exception) -> Inbox:
    inbox: Inbox = SimpleQueue()
    for one in content:
        inbox.put(one)
    return inbox


def completion() -> Completion:
    ticket = Ticket(Sampling(), "test", 60, lambda _: None)
    return Completion("tiny", ticket, None, EnergyModel(400))


def test_what_has_come_already_goes_together() -> None:
    said = pieces("It ", "is ", "green.")
    assert list(batches(filled(*said))) == [said]


def test_the_first_piece_waits_for_no_other() -> None:
    inbox: Inbox = SimpleQueue()
    made = batches(inbox)
    inbox.put(pieces("It", end=False)[0])
    assert [piece.text for piece in next(made)] == ["It"]


def test_later_pieces_are_collected() -> None:
    inbox: Inbox = SimpleQueue()

    def speak() -> None:
        for piece in pieces(*(f"{number} " for number in range(200))):
            inbox.put(piece)
            time.sleep(0.002)

    speaker = threading.Thread(target=speak)
    speaker.start()
    found = list(batches(inbox))
    speaker.join()
    assert [piece for batch in found for piece in batch] == pieces(*(f"{number} " for number in range(200)))
    assert 1 < len(found) < 100


def test_a_fault_comes_after_the_pieces_before_it() -> None:
    made = batches(filled(*pieces("It ", end=False), RuntimeError("broken")))
    assert [piece.text for piece in next(made)] == ["It "]
    with pytest.raises(RuntimeError, match="broken"):
        next(made)


@pytest.mark.parametrize("letter", ["x", "é", "🙂", "\x00", '"'])
@pytest.mark.parametrize("words", [1, 50])
def test_no_frame_is_too_large_and_no_letter_is_lost(letter: str, words: int) -> None:
    said = pieces(*[letter * (100_000 // words)] * words)
    posted: list[bytes] = []
    frames = Frames(posted.append, "r" * 64)
    for part in fitting(said, completion()):
        for chunk in completion().chunks(part):
            frames.send("chunk", data=chunk)
    assert all(len(frame) <= FRAME_BYTES for frame in posted)
    choices = [json.loads(frame)["data"]["choices"][0] for frame in posted]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "".join(piece.text for piece in said)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len(posted) < 60


def test_frames_are_numbered_and_take_no_unknown_field() -> None:
    posted: list[bytes] = []
    frames = Frames(posted.append, "mine")
    frames.send("loading", progress=0.5)
    frames.send("error", status=400, error={"message": "half \ud800"})
    assert [(json.loads(frame)["request"], json.loads(frame)["seq"]) for frame in posted] == [("mine", 0), ("mine", 1)]
    assert json.loads(posted[1])["error"]["message"] == "half \ud800"
    with pytest.raises(AssertionError):
        frames.send("loading", similarity=0.9)


def test_a_frame_that_was_not_sent_keeps_its_number() -> None:
    posted: list[bytes] = []
    faults = [OSError("not now")]

    def post(data: bytes) -> None:
        if faults:
            raise faults.pop()
        posted.append(data)

    frames = Frames(post, "mine")
    with pytest.raises(OSError, match="not now"):
        frames.send("loading", progress=0.5)
    frames.send("loading", progress=0.6)
    assert json.loads(posted[0])["seq"] == 0
