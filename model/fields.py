"""Frozen dataclasses whose fields check themselves: type and range are written once, in the annotation.

    @dataclass(frozen=True, kw_only=True)
    class Sampling(Checked):
        temperature: Annotated[float, Range(0, 2)] = 0.7

`Sampling(temperature=3)` and `--set …temperature=3` meet the same check and the same message.
"""

import types
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from model.errors import InputError


class Range(NamedTuple):
    """Inclusive bounds of a number; None leaves that side open."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of configurations: every field is checked against its annotation when an instance is made."""

    def __post_init__(self) -> None:
        kind: type = type(self)
        hints = _annotations(kind)
        for field in fields(self):
            check_value(f"{kind.__name__}.{field.name}", getattr(self, field.name), hints[field.name])


def check_value(name: str, value: object, annotation: Any) -> None:
    """Raises InputError, in `name`'s words, unless `value` fits `annotation`."""
    if not _fits(value, annotation):
        raise InputError(f"{name} = {value!r}: expected {describe(annotation)}")


def parse_value(name: str, text: str, annotation: Any) -> object:
    """The value that `text` writes for a field of this annotation; InputError if it writes none."""
    value = _parse(text, annotation)
    check_value(name, value, annotation)
    return value


def describe(annotation: Any) -> str:
    """An annotation in a user's words: "a number from 0 to 2", "one of 4, 8, 16"."""
    if get_origin(annotation) is Annotated:
        return _described_bounds(describe(annotation.__origin__), annotation.__metadata__)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a comma-separated list, each {describe(get_args(annotation)[0])}"
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false", type(None): "none"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


@cache
def _annotations(kind: type) -> dict[str, Any]:
    """Resolved once for each class: a server checks the fields of every request."""
    return get_type_hints(kind, include_extras=True)


def _fits(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _fits(value, annotation.__origin__) and all(_within(value, bound) for bound in annotation.__metadata__)
    if get_origin(annotation) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(annotation)[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _within(value: float, bound: Range) -> bool:
    """A NaN is within nothing."""
    return (bound.low is None or value >= bound.low) and (bound.high is None or value <= bound.high) and value == value


def _described_bounds(words: str, bounds: tuple[Range, ...]) -> str:
    for low, high in bounds:
        if low is not None and high is not None:
            words += f" from {low} to {high}"
        else:
            words += f" of at least {low}" if low is not None else f" of at most {high}"
    return words


def _parse(text: str, annotation: Any) -> object:
    """Text to a value; text that cannot be read is returned as it is, for the check to refuse."""
    if get_origin(annotation) is Annotated:
        return _parse(text, annotation.__origin__)
    if get_origin(annotation) is Literal:
        return next((choice for choice in get_args(annotation) if str(choice) == text), text)
    if get_origin(annotation) in (Union, types.UnionType):
        options = sorted(get_args(annotation), key=lambda option: option is not type(None))  # "none" is also text
        values = [(_parse(text, option), option) for option in options]
        return next((value for value, option in values if _fits(value, option)), text)
    if get_origin(annotation) is tuple:
        return tuple(_parse(item, get_args(annotation)[0]) for item in text.split(",") if item)
    if annotation is type(None):
        return None if text.lower() == "none" else text
    if annotation is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return annotation(text)
    except ValueError:
        return text
