"""A text from a hub on 127.0.0.1: what arrives, and what is said when it cannot be had."""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from model.artifact import file_digest
from model.errors import InputError
from pipeline.windows import WIKITEXT_2, HubText
from tests.hub import OPEN, REVISION, Hub, serving

CONTENT = " \n = First = \n \n One . \n = = A part = = \n \n Two . \n = Second = \n \n Three . \n"


@dataclass
class Served:
    """A small archive in the form of WikiText's, and the hub that serves it."""

    hub: Hub
    text: HubText


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    folder = tmp_path / "served"
    folder.mkdir()
    with zipfile.ZipFile(folder / "text.zip", "w") as archive:
        archive.writestr("wiki.test.raw", CONTENT)
    text = HubText(OPEN, REVISION, "text.zip", file_digest(folder / "text.zip"), "wiki.test.raw", WIKITEXT_2.title)
    with serving(folder) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield Served(hub, text)


def test_articles_are_documents_and_come_once(served: Served) -> None:
    found = served.text.read()
    assert found.documents == ("= First = \n \n One . \n = = A part = = \n \n Two .", "= Second = \n \n Three .")
    assert found.name == f"{OPEN}@{REVISION[:12]}/wiki.test.raw"
    sent = dict(served.hub.sent)
    assert served.text.read() == found
    assert dict(served.hub.sent) == sent == {"text.zip": (served.hub.folder / "text.zip").stat().st_size}


def test_another_archive_is_refused(served: Served) -> None:
    with pytest.raises(InputError, match=r"text\.zip: SHA-256 is [0-9a-f]+, expected 0+: damaged"):
        served.text._replace(sha256="0" * 64).read()


def test_a_text_out_of_reach_names_the_other(served: Served) -> None:
    other = served.text._replace(revision="f" * 40)
    with pytest.raises(InputError, match=re.escape("judge by our own text: --set gate_quality.text=own")):
        other.read()
