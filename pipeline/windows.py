"""Texts in windows of tokens: our own, to calibrate models with and to judge them by, and WikiText-2 from the hub."""

import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import httpx2
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor

from model.artifact import file_digest
from model.errors import InputError
from model.tokenizer import Tokenizer

DOCUMENT_BREAK = "<|document|>"
SHARED_WORDS = 8
"""That two texts may not have in common, one after the other."""


class Text(NamedTuple):
    """Documents; no window reaches from one into the next."""

    name: str
    documents: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "Text":
        """One of our own texts."""
        parts = path.read_text(encoding="utf-8").split(DOCUMENT_BREAK)
        return cls(str(path), tuple(part.strip() for part in parts))


class HubText(NamedTuple):
    """A text in a zip file of a dataset on the Hugging Face hub, at a pinned revision."""

    repository: str
    revision: str
    archive: str
    sha256: str
    """The archive's."""
    member: str
    title: re.Pattern[str]
    """Where an article begins."""

    def read(self) -> Text:
        """Downloaded, or from the client's cache. Raises InputError if it is damaged or the hub cannot be reached."""
        try:
            path = Path(hf_hub_download(self.repository, self.archive, repo_type="dataset", revision=self.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, httpx2.TransportError) as fault:
            raise InputError(
                f"the text {self.repository}/{self.archive} cannot be had from {constants.ENDPOINT} ({fault}): check "
                "the network, or judge by our own text: --set gate_quality.text=own"
            ) from fault
        if (found := file_digest(path)) != self.sha256:
            raise InputError(f"{path}: SHA-256 is {found}, expected {self.sha256}: damaged; delete it and run again")
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            content = archive.read(self.member).decode()
        starts = [found.start() for found in self.title.finditer(content)]
        ends = [*starts[1:], len(content)]
        articles = tuple(content[start:end].strip() for start, end in zip(starts, ends, strict=True))
        return Text(f"{self.repository}@{self.revision[:12]}/{self.member}", articles)


WIKITEXT_2 = HubText(
    repository="ggml-org/ci",
    revision="927b3642933080f1b0e811e2f916e14c292992f9",
    archive="wikitext-2-raw-v1.zip",
    sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    member="wikitext-2-raw/wiki.test.raw",
    title=re.compile(r"^ = [^=\n]+ = $", re.MULTILINE),
)
"""The test part (Merity et al. 2016, arXiv:1609.07843; CC BY-SA 3.0), in the archive that llama.cpp measures with."""


def text_windows(text: Text, tokenizer: Tokenizer, window: int) -> list[Tensor]:
    """Full windows of token ids, each within one document of the text, in its order."""
    pieces = [piece for part in text.documents for piece in torch.tensor(tokenizer.encode(part)).split(window)]
    return [piece for piece in pieces if len(piece) == window]


def check_apart(calibration: Text, gate: Text) -> None:
    """Raises InputError if a passage is in both texts: a model must not be judged by what it was fitted to."""
    both = _passages(calibration) & _passages(gate)
    if both:
        raise InputError(
            f"{calibration.name} and {gate.name} share {' '.join(min(both))!r}: take it out of one of them"
        )


def _passages(text: Text) -> set[tuple[str, ...]]:
    words = [part.lower().split() for part in text.documents]
    return {tuple(part[at : at + SHARED_WORDS]) for part in words for at in range(len(part) - SHARED_WORDS + 1)}
