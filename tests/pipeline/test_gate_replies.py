"""The gate of replies: passes what is served, and turns red for what was planted in it."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from model.artifact import MANIFEST, write_manifest
from model.engine import Engine
from model.errors import InputError
from model.llama import sequence_logits
from model.networks import Int4Folder, quantized_network
from pipeline import gate_replies
from pipeline.configs import embedded
from pipeline.stages import ENTRIES, PERSONA, PROLOGUE, SCHEMA, STORIES, UNSAFE_WORDS, VISITS
from pipeline.stories import Persona
from pipeline.verdict import Check
from pipeline.visits import Visit, hold, read_visits
from tests.conftest import ROOT

SOURCES = (VISITS, STORIES, ENTRIES, PERSONA, PROLOGUE, SCHEMA, UNSAFE_WORDS)
FEW = replace(embedded().gate_replies, openings=24, visits=2, float_openings=0, sealed=2)
Spoil = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def persona() -> Persona:
    return Persona(ROOT / PERSONA, ROOT / PROLOGUE, ROOT / SCHEMA)


def gated(build: Path, persona: Path, report: Path) -> list[Check]:
    """What the gate says of an engine that speaks as a persona."""
    sources = [ROOT / path if path != PERSONA else persona for path in SOURCES]
    return gate_replies.run(FEW, *sources, build / "engine", build / "embedder", report)


def failed(checks: Sequence[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


class Sound(NamedTuple):
    """What the gate says of the build as it is."""

    failed: frozenset[str]
    report: dict[str, Any]


@pytest.fixture(scope="module")
def sound(embedded_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    report = tmp_path_factory.mktemp("sound") / "report.json"
    checks = gated(embedded_build, ROOT / PERSONA, report)
    return Sound(frozenset(failed(checks)), json.loads(report.read_text()))


def test_what_is_served_has_few_faults(sound: Sound) -> None:
    """By what was seen: the limits of the configuration are for more replies, whose intervals are narrower."""
    seen = {name: figure["share"] for name, figure in sound.report["measures"]["all"].items()}
    assert sound.report["replies"] == 24 + 2 * 4
    assert seen["ends in a choice"] > 0.9 and seen["length as asked"] > 0.9
    assert seen["loops"] <= 0.05 and seen["cut by the limit"] == 0
    assert len(sound.report["worst"]) == 10 and all(one["reply"] for one in sound.report["worst"])


def without_penalties(_engine: Path, persona: Path) -> None:
    content = yaml.safe_load(persona.read_text())
    content["sampling"] = {"default": {"temperature": 0, "repetition_penalty": 1}}
    persona.write_text(yaml.safe_dump(content))


def another_prompt(_engine: Path, persona: Path) -> None:
    content = yaml.safe_load(persona.read_text())
    content["system_prompt"] = content["system_prompt"][:40]
    persona.write_text(yaml.safe_dump(content))


def another_template(engine: Path, _persona: Path) -> None:
    chat = json.loads((engine / "chat.json").read_text())
    chat["template"] = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    rewrite(engine / "chat.json", json.dumps(chat).encode())


def noise(engine: Path, _persona: Path) -> None:
    """As a wrong adapter or a zeroed layer is: a hundredth of the weights' bytes."""
    file = next(engine.glob("weights-*.safetensors"))
    content = bytearray(file.read_bytes())
    start = len(content) // 2
    content[start : start + len(content) // 100] = bytes(len(content) // 100)
    rewrite(file, bytes(content))


def rewrite(file: Path, content: bytes) -> None:
    """In a folder whose manifest knows nothing of it."""
    file.unlink()  # a link
    file.write_bytes(content)
    manifest = json.loads((file.parent / MANIFEST).read_text())
    (file.parent / MANIFEST).unlink()
    facts = {name: manifest[name] for name in manifest if name not in ("format", "files", "kind")}
    write_manifest(file.parent, manifest["kind"], facts)


@pytest.mark.parametrize("spoil", [another_prompt, another_template, noise, without_penalties])
def test_a_planted_defect_turns_it_red(embedded_build: Path, sound: Sound, tmp_path: Path, spoil: Spoil) -> None:
    dropped = shutil.ignore_patterns(*({path.name for path in embedded_build.iterdir()} - {"engine", "embedder"}))
    build = tmp_path / "build"
    shutil.copytree(embedded_build, build, ignore=dropped)
    persona = Path(shutil.copyfile(ROOT / PERSONA, tmp_path / "persona.yaml"))
    spoil(build / "engine", persona)
    assert set(failed(gated(build, persona, tmp_path / "report.json"))) - sound.failed


def test_scores_are_those_of_the_reference(embedded_build: Path) -> None:
    """Log-probabilities of a text by the engine, beside the eager network's of the same weights."""
    engine = Engine.load(embedded_build / "engine")
    tokens = engine.tokenizer.encode("The road was paved with yellow bricks, and the sun shone brightly. " * 40)
    network = quantized_network(Int4Folder(embedded_build / "int4"), as_served=True, products=torch.float64)
    expected = sequence_logits(network, torch.tensor(tokens)).log_softmax(dim=-1)
    expected = expected[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    assert len(tokens) > 512, "more than one step"
    found = engine.score(tokens)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0.05)
    assert torch.equal(engine.score(tokens), found), "what is known of a text changes nothing"


def test_replies_do_not_depend_on_who_else_is_there(embedded_build: Path, persona: Persona) -> None:
    engine = Engine.load(embedded_build / "engine", sequences=4)
    visits = [(visit, 3) for visit in read_visits(ROOT / VISITS / "dev.yaml", ROOT / SCHEMA)[:3]]
    visits.append((Visit(kind="story", choices={}, moves=("I look up", "I go on"), line="x"), 5))
    manner = {"temperature": 0.6, "max_tokens": 24}
    told = {
        together: {(one.visit.line, one.turn): one.reply for one in hold(engine, persona, visits, manner, together)}
        for together in (1, 4)
    }
    assert told[1] == told[4] and len(told[1]) == 5
    assert all(told[1].values())


def test_a_conversation_ends_where_the_context_does(embedded_build: Path, persona: Persona) -> None:
    engine = Engine.load(embedded_build / "engine")
    long = Visit(kind="story", choices={}, moves=("I look up", "I call out " * 800, "I wait"), line="x")
    told = list(hold(engine, persona, [(long, 1)], {"max_tokens": 8}, 2))
    assert [one.turn for one in told] == [0] and told[0].cut


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- {kind: story, moves: []}", "visits.yaml:1: 0 given, at least 1 expected"),
        ("- {kind: dance, moves: [I dance]}", "visits.yaml:1: 'dance' is not one of"),
        ("- {kind: story}", "'moves' is a required property"),
    ],
)
def test_a_bad_visit_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "visits.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_visits(tmp_path / "visits.yaml", ROOT / SCHEMA)


def test_a_choice_that_the_prologue_does_not_offer_is_named(embedded_build: Path, persona: Persona) -> None:
    visit = Visit(kind="story", choices={"road": "up"}, moves=("I go",), line="cert.yaml:7")
    with pytest.raises(InputError, match=r"cert.yaml:7: choices: scene 'road' offers no 'up'"):
        list(hold(Engine.load(embedded_build / "engine"), persona, [(visit, 1)], {}, 1))
