"""The choices that a reply ends in; the page reads the same examples the same way (tests/browser/test_choices.py)."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import text

from serving.choices import MOST, as_move, choices
from tests.conftest import ROOT

EXAMPLES = json.loads((ROOT / "tests/serving/choices.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example["reply"])[:40])
def test_choices_are_read_and_said_in_the_visitors_words(example: dict[str, Any]) -> None:
    assert choices(example["reply"]) == example["choices"]
    assert [as_move(choice) for choice in example["choices"]] == example["moves"]


@given(text(max_size=200), text(max_size=80), text(max_size=80))
def test_whatever_is_told_gives_some_choices_or_none(told: str, one: str, other: str) -> None:
    for reply in (told, f"{told} Do you {one}, or {other}?"):
        assert len(choices(reply)) in (0, *range(2, MOST + 1))
