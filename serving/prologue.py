"""What a visitor sees while the model loads. It is read without torch, so that it is there before anything else is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.artifact import MANIFEST, REMEDY, read_json, read_manifest
from model.errors import InputError

BADGES = (("llama", "Built with Llama"),)
"""What a licence wants shown to whoever talks to the model, by the start of the licence's name (Llama 3.1, 1.b.i)."""


def system_prompt(persona: Mapping[str, Any], prologue: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """The persona, and what the visitor's choices in the prologue add to it; InputError for one that is not offered."""
    scenes = {scene["id"]: scene.get("choices", ()) for scene in prologue["scenes"]}
    unknown = sorted(choices.keys() - scenes.keys())
    if unknown:
        raise InputError(f"choices: the prologue has no scene {unknown[0]!r}; see /prologue")
    shapes = []
    for scene, options in scenes.items():
        if scene in choices:
            shaped = next((option["shapes"] for option in options if option["id"] == choices[scene]), None)
            if shaped is None:
                raise InputError(f"choices: scene {scene!r} offers no {choices[scene]!r}; see /prologue")
            shapes.append(shaped)
    return " ".join([persona["system_prompt"].strip(), *shapes])


def visible(persona: Mapping[str, Any], prologue: Mapping[str, Any]) -> dict[str, Any]:
    """Persona and prologue as visitors see them: what a choice tells the model stays here."""
    scenes = [
        {**scene, "choices": [{"id": one["id"], "label": one["label"]} for one in scene["choices"]]}
        if "choices" in scene
        else scene
        for scene in prologue["scenes"]
    ]
    return {
        "persona": {"name": persona["name"], "greeting": persona["greeting"]},
        "prologue": {"title": prologue["title"], "scenes": scenes},
    }


def read_prologue(build: Path) -> dict[str, Any]:
    """The same from a build folder, whose cache is verified; InputError if nothing was built there."""
    cache = build / "cache"
    if not cache.is_dir():
        raise InputError(f'no {cache}: run "make pipeline", or set EMERALD_BUILD to a build folder')
    read_manifest(cache, "cache")
    content = read_json(cache / "entries.json", REMEDY)
    return visible(content["persona"], content["prologue"])


def model_id(build: Path) -> str:
    """The model's name, which its folder tells before it is loaded and verified."""
    return str(read_json(build / "engine" / MANIFEST, REMEDY).get("model_id", "unnamed"))


def badge(build: Path) -> str:
    """What the model's licence wants to be seen on the page; empty if nothing."""
    licence = str(read_json(build / "engine" / MANIFEST, REMEDY).get("licence", ""))
    return next((words for start, words in BADGES if licence.startswith(start)), "")
