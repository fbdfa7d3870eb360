"""How the persona speaks: for every model, for one, and refused."""

import pytest

from model.errors import InputError
from serving.persona import manner

SAMPLING = {"default": {"temperature": "0.5", "min_p": "0.05"}, "big": {"temperature": "0.9", "top_k": "40"}}


def test_a_models_own_values_come_first() -> None:
    assert manner({}, "small") == {}
    assert manner({"sampling": SAMPLING}, "small") == {"temperature": 0.5, "min_p": 0.05}
    assert manner({"sampling": SAMPLING}, "big") == {"temperature": 0.9, "min_p": 0.05, "top_k": 40}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": "3"}, "sampling.default.temperature.*from 0 to 2"),
        ({"top_k": "1.5"}, "sampling.default.top_k"),
        ({"top_p": "0"}, "sampling of the persona: Sampling.top_p = 0"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        manner({"sampling": {"default": values}}, "small")
