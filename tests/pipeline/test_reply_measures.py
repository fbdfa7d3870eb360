"""What is said of a reply, example by example."""

from dataclasses import replace

import pytest

from pipeline.reply_measures import Figure, Heard, World, distinct, ends_in_choice, judged, loops, names_in, sentences
from pipeline.stories import read_stories
from tests.conftest import ROOT

GOOD = (
    'The lamp glows as you lift it from the hook. "Mind the wick," says the old lamplighter, coming up behind you. '
    "Far below, the market bell begins to ring. Do you climb down to the market, or ask him about the wick?"
)
SYSTEM = "You are Emerald, the storyteller of a fantasy adventure in the Emerald City of Oz. Keep replies short."
WORLD = World(
    names=names_in(["The Emerald City of Oz", "Dorothy and Toto"]),
    figures=(Figure("Dorothy", frozenset({"kansas"})), Figure("Lion", frozenset({"forest"}))),
    unsafe=frozenset({"gun"}),
    alike=0.5,
)
HEARD = Heard(system=SYSTEM, before=("I take the lamp from its hook",), reply=GOOD, cut=False, likeness=0.1)


def verdict(name: str, **changes: object) -> bool | None:
    return judged(replace(HEARD, **changes), WORLD)[name]  # type: ignore[arg-type]


def test_a_good_reply_has_no_fault() -> None:
    assert judged(HEARD, WORLD) == {
        "loops": False,
        "cut by the limit": False,
        "ends in a choice": True,
        "second person, present": True,
        "length as asked": True,
        "another language": False,
        "leaks the system prompt": False,
        "claims to be human": False,
        "unsafe words": False,
        "foreign names": False,
        "takes up the move": True,
        "nobody unmet": True,
    }


@pytest.mark.parametrize(
    ("name", "reply", "expected"),
    [
        ("loops", "I am the story of Oz. " * 5, True),
        ("loops", "the green door and the red door and the green door and the blue door", False),
        ("loops", "One lamp, two lamps, three lamps, four lamps. " * 2, False),
        ("second person, present", "The lamp glows. The hook is bare.", False),
        ("second person, present", '"You!" cries the man. The lamp glows.', False),
        ("second person, present", "You walked to the door. You were tired, and you had no lamp.", False),
        ("second person, present", 'You wait. "You were late," he says. "He had gone, and she had gone."', True),
        ("length as asked", "You wait.", False),
        ("length as asked", "You wait. " * 9, False),
        ("another language", "Die Lampe leuchtet, und du steigst hinab zum Markt, wo Glocken klingen.", True),
        (
            "leaks the system prompt",
            "You are Emerald, the storyteller of a fantasy adventure.",
            True,
        ),
        ("claims to be human", "I am a real human, as you are.", True),
        ("claims to be human", '"I am a man of straw," he says, and you laugh.', False),
        ("claims to be human", "I am a storytelling program.", False),
        ("unsafe words", "He lifts a gun.", True),
        ("unsafe words", "The game has begun.", False),
        ("foreign names", "Then you meet Gandalf by the gate.", True),
        ("foreign names", "Then you meet Dorothy in Oz.", False),
        ("takes up the move", "You see a green street.", False),
        ("takes up the move", "Several lamps glow.", True),
        ("nobody unmet", "Dorothy waves at you.", False),
        ("nobody unmet", 'You hear a voice. "Dorothy went home," it says.', True),
        ("nobody unmet", "A Lion sits there.", True),
        ("nobody unmet", "The Lion sits there.", False),
        ("nobody unmet", "In the forest the Lion sits there.", True),
    ],
)
def test_each_measure(name: str, reply: str, expected: bool) -> None:
    assert verdict(name, reply=reply) is expected


def test_what_was_said_before_counts() -> None:
    before = ("Where is Dorothy?", "She is near.", "I call Frodo")
    assert verdict("nobody unmet", before=before, reply="Dorothy waves.") is True
    assert verdict("foreign names", before=before, reply="Then Frodo comes, and Frodo sits.") is False


def test_a_move_of_no_content_asks_for_none_and_likeness_counts_as_well() -> None:
    assert verdict("takes up the move", before=("go on",)) is None
    assert verdict("takes up the move", reply="You see a street.", likeness=0.6) is True
    assert verdict("takes up the move", reply="You see a street.", likeness=None) is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You wait. Do you sit, or stand?", True),
        ('"Do you sit, or stand?"', True),
        ("Do you sit, or stand? The bell rings.", False),
        ("You sit or stand.", False),
        ("What do you do?", False),
        ("", False),
    ],
)
def test_the_choice_stands_in_the_last_sentence(text: str, expected: bool) -> None:
    assert ends_in_choice(text) is expected


def test_sentences_end_within_quotes_too() -> None:
    assert len(sentences('"Stop!" he says. You stop. "Why?" you hear. You wait.')) == 6


def test_distinct_is_the_share_of_runs_that_differ() -> None:
    assert distinct(["a b c", "a b d"], 2) == 3 / 4
    assert distinct(["a b"], 3) == 0
    assert distinct(["a b c d"], 3) == 1


def test_replies_by_hand_do_not_loop() -> None:
    stories = read_stories(ROOT / "cache_data/stories", ROOT / "cache_data/schema")
    assert not [turn.reply for story in stories for turn in story.turns if loops(turn.reply)]
