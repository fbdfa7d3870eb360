"""Our own texts: models are calibrated with one (calibration.txt) and judged by the other (gate.txt), in windows."""

from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError
from model.tokenizer import Tokenizer

CALIBRATION_TEXT = Path("pipeline/texts/calibration.txt")
GATE_TEXT = Path("pipeline/texts/gate.txt")
DOCUMENT_BREAK = "<|document|>"
SHARED_WORDS = 8
"""That two texts may not have in common, one after the other."""


def text_windows(text: Path, tokenizer: Tokenizer, window: int) -> list[Tensor]:
    """Full windows of token ids, each within one document of the text, in its order."""
    documents = text.read_text(encoding="utf-8").split(DOCUMENT_BREAK)
    pieces = [piece for part in documents for piece in torch.tensor(tokenizer.encode(part.strip())).split(window)]
    return [piece for piece in pieces if len(piece) == window]


def check_apart(calibration: Path, gate: Path) -> None:
    """Raises InputError if a passage is in both texts: a model must not be judged by what it was fitted to."""
    both = _passages(calibration) & _passages(gate)
    if both:
        raise InputError(f"{calibration} and {gate} share {' '.join(min(both))!r}: take it out of one of them")


def _passages(text: Path) -> set[tuple[str, ...]]:
    words = text.read_text(encoding="utf-8").lower().split()
    return {tuple(words[at : at + SHARED_WORDS]) for at in range(len(words) - SHARED_WORDS + 1)}
