"""Memory and words of a command, from outside."""

import os
import sys

import pytest

from model.errors import InputError
from pipeline.bench.measured import measured
from tests.conftest import ROOT


def test_measured_memory_is_the_childs() -> None:
    ended = measured([sys.executable, "-c", "import time; x = bytearray(300 << 20); time.sleep(0.3); print('done')"],
                     ROOT, dict(os.environ))  # fmt: skip
    assert ended.text == "done\n"
    assert 300 < ended.peak_mb < 600


def test_command_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(InputError, match=r"(?s)failed:.*ZeroDivisionError"):
        measured([sys.executable, "-c", "1 / 0"], ROOT, dict(os.environ))
