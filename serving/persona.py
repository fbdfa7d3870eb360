"""How the persona speaks unless a client says otherwise: the sampling that its author chose, by model."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from model.errors import InputError
from model.fields import parse_value
from model.sampling import Sampling

EVERY_MODEL = "default"
"""Stands for a model's name where the author means all of them."""


def manner(persona: Mapping[str, Any], model_id: str) -> dict[str, Any]:
    """The persona's own values of `Sampling`, those for this model first. Raises InputError for one that is none."""
    given: Mapping[str, Mapping[str, str]] = persona.get("sampling", {})
    hints = get_type_hints(Sampling, include_extras=True)
    values: dict[str, Any] = {}
    for name in (EVERY_MODEL, model_id):
        for field, text in given.get(name, {}).items():
            values[field] = parse_value(f"sampling.{name}.{field}", text, hints[field])
    try:
        Sampling(**values)
    except InputError as fault:
        raise InputError(f"sampling of the persona: {fault}") from None
    return values
