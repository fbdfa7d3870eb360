from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from model.errors import InputError
from model.fields import Checked, Range, check_value, describe, parse_value

Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]


@dataclass(frozen=True, kw_only=True)
class Oven(Checked):
    """A configuration with one field of every kind."""

    name: str = "Emil"
    fill: Share = 0.5
    trays: Count = 2
    fan: bool = False
    bits: Literal[4, 8] = 4
    limit_s: Annotated[float, Range(None, 60)] | None = None
    shares: tuple[Share, ...] = (0.1, 0.2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fill", 1),
        ("fill", 0.0),
        ("trays", 10**6),
        ("bits", 8),
        ("limit_s", None),
        ("limit_s", -5.0),
        ("shares", ()),
        ("fan", True),
    ],
)
def test_accepts_what_the_annotation_says(field: str, value: Any) -> None:
    assert getattr(replace(Oven(), **{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("name", 3, "text"),
        ("fill", 1.01, "a number from 0 to 1"),
        ("fill", float("nan"), "a number from 0 to 1"),
        ("fill", True, "a number from 0 to 1"),
        ("fill", "0.5", "a number from 0 to 1"),
        ("trays", 0, "a whole number of at least 1"),
        ("trays", 2.0, "a whole number of at least 1"),
        ("trays", True, "a whole number of at least 1"),
        ("fan", 1, "true or false"),
        ("bits", 5, "one of 4, 8"),
        ("bits", "4", "one of 4, 8"),
        ("limit_s", 61, "a number of at most 60 or none"),
        ("limit_s", float("nan"), "a number of at most 60 or none"),
        ("shares", (0.1, 2.0), "a comma-separated list, each a number from 0 to 1"),
        ("shares", [0.1], "a comma-separated list, each a number from 0 to 1"),
    ],
)
def test_refuses_by_name_value_and_expectation(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(Oven(), **{field: value})
    assert str(caught.value) == f"Oven.{field} = {value!r}: expected {expected}"


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("12", int, 12),
        ("0.5", Share, 0.5),
        ("1", float, 1.0),
        ("true", bool, True),
        ("False", bool, False),
        ("8", Literal[4, 8], 8),
        ("int4-g32", Literal["int4-g32", "int4-channel"], "int4-g32"),
        ("none", float | None, None),
        ("2.5", float | None, 2.5),
        ("none", str | None, None),
        ("ab12", str | None, "ab12"),
        ("none", str, "none"),
        ("0.1,0.3", tuple[Share, ...], (0.1, 0.3)),
        ("", tuple[Share, ...], ()),
        ("folder:/a=b", str, "folder:/a=b"),
    ],
)
def test_parses_text_to_the_annotated_type(text: str, annotation: Any, value: object) -> None:
    parsed = parse_value("field", text, annotation)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        ("a", int),
        ("1.5", int),
        ("", float),
        ("nan", Share),
        ("yes", bool),
        ("16", Literal[4, 8]),
        ("x", float | None),
        ("0.1;0.3", tuple[Share, ...]),
        ("0.1,3", tuple[Share, ...]),
    ],
)
def test_refuses_text_in_the_same_words(text: str, annotation: Any) -> None:
    with pytest.raises(InputError, match=r"^--set oven\.field = .*: expected ") as caught:
        parse_value("--set oven.field", text, annotation)
    assert str(caught.value).endswith(describe(annotation))


def test_check_value_passes_in_silence() -> None:
    check_value("x", 0.3, Share)


def test_inherited_checks_hold_for_every_subclass() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bakery(Oven):
        price: Annotated[float, Range(0.01)] = 1.0

    with pytest.raises(InputError, match=r"Bakery\.trays = 0"):
        Bakery(trays=0)
    with pytest.raises(InputError, match=r"Bakery\.price = 0: expected a number of at least 0\.01"):
        Bakery(price=0)
