"""Each guard rejects the turn it exists for, and lets the intent's own way of asking pass."""

import pytest

from serving.guards import GUARDS, Intent, novelty
from serving.text import lowered

ABILITIES = Intent.of(["What are you capable of?", "Tell me what you can do.", "What do you do?"], "I tell stories.")
BUILDER = Intent.of(["Who built the Emerald City?", "Who made the city?"], "The Wizard had it built by the people.")
WITCHES = Intent.of(
    ["How many witches are there?", "Tell me about the four witches"], "There are four, two of them wicked."
)

TRAPS = [
    ("negation", "What are you not capable of?", ABILITIES),
    ("negation", "What can't you do?", ABILITIES),
    ("several questions", "What can you do and who built the city?", ABILITIES),
    ("several questions", "What do you do? Who made you?", ABILITIES),
    ("several questions", "What can you do, and may I give you a nickname?", ABILITIES),
    ("hypothetical", "What if you could do it?", ABILITIES),
    ("comparison", "Are you capable of more than others?", ABILITIES),
    ("conversation", "And what can you do?", ABILITIES),
    ("conversation", "What is he capable of?", ABILITIES),
    ("conversation", "Tell me about the other one", WITCHES),
    ("question kind", "Why are you capable of it?", ABILITIES),
    ("question kind", "When was the Emerald City built?", BUILDER),
    ("hypothetical", "If nobody asked, what could you do?", ABILITIES),
]


@pytest.mark.parametrize(("guard", "question", "intent"), TRAPS)
def test_guard_rejects_its_trap(guard: str, question: str, intent: Intent) -> None:
    assert GUARDS[guard](lowered(question), intent) is not None


def test_a_when_inside_a_question_is_not_what_it_asks() -> None:
    trees = Intent.of(
        ["What do the trees do when travellers come near?", "Why do the trees fight?"], "They throw them."
    )
    assert GUARDS["question kind"](lowered("When were the trees planted?"), trees) == (
        "it asks when, and no phrasing of this answer does"
    )
    assert GUARDS["question kind"](lowered("What happens when I come near the trees?"), trees) is None
    assert GUARDS["question kind"](lowered("Tell me why they fight when someone comes"), trees) is None


def test_one_odd_phrasing_disarms_no_guard() -> None:
    ordinary = [f"What can you do on day {day}?" for day in range(24)]
    odd = Intent.of([*ordinary, "What can you not do?"], "Much.")
    assert GUARDS["negation"](lowered("What are you not capable of?"), odd) is not None
    usual = Intent.of([*ordinary, "What can you not do?", "What is it you can't do?"], "Much.")
    assert GUARDS["negation"](lowered("What are you not capable of?"), usual) is None


@pytest.mark.parametrize("intent", [ABILITIES, BUILDER, WITCHES])
def test_every_guard_passes_the_intents_own_phrasings(intent: Intent) -> None:
    for phrasing in intent.phrasings:
        assert {name: guard(phrasing, intent) for name, guard in GUARDS.items()} == dict.fromkeys(GUARDS)


def test_every_guard_has_a_trap_here() -> None:
    assert {guard for guard, _, _ in TRAPS} == set(GUARDS)


def test_a_curly_apostrophe_is_an_apostrophe() -> None:
    assert GUARDS["negation"](lowered("What can\N{RIGHT SINGLE QUOTATION MARK}t you do?"), ABILITIES) is not None


@pytest.mark.parametrize(
    ("guard", "question", "intent"),
    [
        ("conversation", "What did the people of the city do with their hands?", BUILDER),
        ("hypothetical", "I'd like to know if you can do anything", ABILITIES),
        ("negation", "I don't know what you do", ABILITIES),
    ],
)
def test_what_only_looks_like_a_turn_passes(guard: str, question: str, intent: Intent) -> None:
    assert GUARDS[guard](lowered(question), intent) is None


def test_the_reason_names_the_word_as_the_visitor_wrote_it() -> None:
    reason = GUARDS["conversation"](lowered("What is he capable of?"), ABILITIES)
    assert reason == "it refers to something said before ('he')"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who built the Emerald City?", 0.0),
        ("Who destroyed the Emerald City?", 1 / 3),
        ("Who built Rome?", 1 / 2),
        ("Tell me, please: what is it?", 0.0),
        ("How do I bake bread?", 1.0),
        ("I was hoping you'd let me know whos built that city", 0.0),
        ("Who'd have built cities like that of emeralds?", 0.0),
    ],
)
def test_novelty_is_the_share_of_new_words(question: str, expected: float) -> None:
    assert novelty(lowered(question), BUILDER) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("question", "phrasings", "objects"),
    [
        ("so who built it?", ["who built the city", "was it built by the people"], True),
        ("so who built it?", ["so much marble, who built the city"], True),
        ("so was it just a dream?", ["so was it a dream"], False),
        ("who built it all?", ["was it built by the people"], False),
    ],
)
def test_a_pronoun_in_what_goes_on_needs_a_phrasing_that_goes_on(
    question: str, phrasings: list[str], objects: bool
) -> None:
    assert (GUARDS["conversation"](question, Intent.of(phrasings, "an answer")) is not None) == objects
