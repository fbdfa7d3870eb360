"""What a model's licence asks of whoever passes its weights on, and whether a folder of notices gives it.

Int4 weights are a changed copy of the original's, and pushing an image publishes them. Apache-2.0 asks for a copy of
the licence and for a notice of the changes. Llama's community licences (1.b) ask for a copy, for their own words in a
file named "Notice", for "Built with Llama" where people see it, and for a name that begins with "Llama".
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import InputError

LICENCE_FILES = ("LICENSE*", "USE_POLICY*", "NOTICE*")
"""What model repositories ship beside their weights, and every folder made from these carries along."""
APACHE = "Apache-2.0"
LLAMA = re.compile(r"llama3\.([1-9])")
CHANGES = (
    "Changes: the weights were quantized, packed for a CPU's matrix kernels and compiled into programs by Emerald; "
    "manifest.json beside the weights has the particulars."
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What one licence asks for."""

    text: str
    """Words that a copy of it holds."""
    notice: str
    """What has to stand in NOTICE."""
    badge: str | None = None
    """What has to be displayed to people: in the model card, and in the image's labels."""


def terms_of(licence: str, model_id: str) -> Terms:
    """What a licence asks for. Raises InputError for one that no one has read for this purpose."""
    llama = LLAMA.fullmatch(licence)
    if licence == APACHE:
        return Terms(text="Apache License", notice=f"{model_id}, licensed under the Apache License, Version 2.0")
    if llama:
        name = f"Llama 3.{llama[1]}"
        return Terms(
            text=f"{name} Community License Agreement".upper(),
            notice=f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. "
            "All Rights Reserved.",
            badge="Built with Llama",
        )
    raise InputError(
        f"licence {licence!r} of {model_id}: pipeline/licences.py does not know what it asks of whoever passes weights "
        f"on; known are {APACHE} and llama3.1 and later. Read it, and add what it asks for to terms_of"
    )


def copy_licences(source: Path, target: Path) -> None:
    """Copies the files of `LICENCE_FILES`; a model that is one file has none."""
    for pattern in LICENCE_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def notices(artifact: Path, manifest: dict[str, Any], apache: Path) -> dict[str, bytes]:
    """The files that go with an artifact's weights: its licence's copy and policy, and NOTICE; {name: content}.

    `apache` is the text that stands in for a missing copy of that licence, which reads the same everywhere. Raises
    InputError where another licence's copy did not come with the weights.
    """
    files = {
        file.name: file.read_bytes()
        for pattern in LICENCE_FILES
        for file in sorted(artifact.glob(pattern))
        if file.name in manifest["files"]
    }
    licence, model = manifest["licence"], manifest["model_id"]
    terms = terms_of(licence, model)
    if not any(name.startswith("LICENSE") for name in files):
        if licence != APACHE:
            raise InputError(
                f"{artifact}: no copy of the licence {licence!r} came with {model}: put the LICENSE file of its "
                "repository beside the weights and run fetch again"
            )
        files["LICENSE"] = apache.read_bytes()
    own = b"".join(files.pop(name) + b"\n" for name in sorted(files) if name.startswith("NOTICE"))
    lines = [terms.notice, *([terms.badge] if terms.badge else []), CHANGES, f"Source: {manifest['source']}"]
    return files | {"NOTICE": own + "\n".join(lines).encode() + b"\n"}


def missing(files: dict[str, str], card: str, labels: dict[str, str], manifest: dict[str, Any]) -> list[str]:
    """What an image lacks of what its model's licence asks for, in words; empty if it lacks nothing.

    `files` are the notices inside, {name: text}; `card` is the model card.
    """
    terms = terms_of(manifest["licence"], manifest["model_id"])
    copies = [_words(text) for name, text in files.items() if name.startswith("LICENSE")]
    lacks = []
    if not any(_words(terms.text) in copy.replace("**", "") for copy in copies):
        lacks.append(f"a copy of the licence {manifest['licence']}")
    if _words(terms.notice) not in _words(files.get("NOTICE", "")):
        lacks.append(f"NOTICE with the words {terms.notice!r}")
    if manifest["model_id"] not in card:
        lacks.append(f"a model card that names {manifest['model_id']}")
    if terms.badge:
        lacks += _missing_badge(terms.badge, card, labels)
    return lacks


def _missing_badge(badge: str, card: str, labels: dict[str, str]) -> list[str]:
    lacks = []
    if badge not in card:
        lacks.append(f"{badge!r} in the model card")
    if not any(badge in value for value in labels.values()):
        lacks.append(f"{badge!r} in the labels")
    if not any(line.startswith("# Llama") for line in card.splitlines()):
        lacks.append("a model name that begins with 'Llama', as the card's heading")
    return lacks


def _words(text: str) -> str:
    """Without differences of line breaks and case."""
    return " ".join(text.split()).casefold()
