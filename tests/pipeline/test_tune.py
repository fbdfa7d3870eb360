"""Teaching a model the persona's voice: what is learnt, kept, resumed and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from pipeline import fetch, tune
from pipeline.adapter import DOWN, UP, Adapter
from pipeline.configs import FetchConfig, TuneConfig
from pipeline.hub_checkpoint import ADAPTER, open_checkpoint
from tests.conftest import ROOT

SCHEMAS = ROOT / "cache_data/schema"
TEN = TuneConfig(
    steps=12, rank=4, learning_rate=0.02, dialogues_per_step=2, held_out=2, evaluate_every=4, longest_tokens=256
)
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def author(tiny_model: Path, tmp_path: Path) -> Path:
    """A fetched model, a persona of few words, and ten dialogues that are much alike."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    fetch.run(FetchConfig(source=f"folder:{model}", model_id="tiny", licence="MIT"), model, tmp_path / "checkpoint")
    (tmp_path / "persona.yaml").write_text("name: E\ngreeting: Hi.\nsystem_prompt: You are E.\n")
    (tmp_path / "prologue.yaml").write_text(
        "title: T\nscenes:\n- id: road\n  text: A road.\n  question: Which?\n  choices:\n"
        "  - {id: left, label: Left, shapes: It goes left.}\n  - {id: right, label: Right, shapes: It goes right.}\n"
    )
    write_stories(tmp_path, [story(number) for number in range(10)])
    return tmp_path


def story(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "place": "a road",
        "turns": [{"move": f"I go {number}.", "reply": f"You go to {number}, or stay?"}],
        **fields,
    }


def write_stories(author: Path, stories: list[dict[str, Any]]) -> None:
    (author / "stories").mkdir(exist_ok=True)
    (author / "stories/all.yaml").write_text(json.dumps(stories))


def paths(author: Path, config: TuneConfig = TEN) -> list[Path]:
    taught = [author / "stories", author / "persona.yaml", author / "prologue.yaml", SCHEMAS]
    sources = taught if config.trains else [Path(config.adapter.removeprefix("folder:"))] if config.adapter else []
    return [*sources, author / "checkpoint", author / "tuned", author / "tuning.json"]


def trained(author: Path, config: TuneConfig = TEN) -> Mapping[str, Any]:
    """The report of a run."""
    tune.run(config, *paths(author, config))
    report: dict[str, Any] = json.loads((author / "tuning.json").read_text())
    return report


def merged(author: Path) -> torch.Tensor:
    with open_checkpoint(author / "tuned") as opened:
        return opened.tensor(PROJECTION)


def test_it_learns_and_says_how(author: Path) -> None:
    report = trained(author)
    assert report["passed"] and report["dialogues"] == 8 and report["held_out"] == 2 and report["replies"] == 8
    assert [point["step"] for point in report["curve"]] == [0, 4, 8, 12]
    assert report["perplexity_after"] < 0.9 * report["perplexity_before"]
    base = SafetensorsCheckpoint(author / "checkpoint").tensor(PROJECTION)
    assert not torch.equal(merged(author), base), "whoever opens the folder gets the taught weights"
    assert torch.equal(SafetensorsCheckpoint(author / "tuned").tensor(PROJECTION), base), "the base is left as it was"
    source = json.loads((author / "tuned/source.json").read_text())
    assert source["adapter"] == report["adapter"]
    assert "adapter" not in json.loads((author / "checkpoint/source.json").read_text())


def test_a_kept_adapter_of_the_same_is_used_and_another_is_named(
    author: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = trained(author)
    first = (author / "tuned" / ADAPTER).read_bytes()
    shutil.copyfile(author / "tuned" / ADAPTER, author / "stories" / ADAPTER.name)
    capsys.readouterr()
    assert trained(author) == report
    assert "was trained on just this: no training" in capsys.readouterr().err
    assert (author / "tuned" / ADAPTER).read_bytes() == first
    write_stories(author, [story(number) for number in range(1, 11)])
    trained(author)
    assert "was trained on something else (dialogues" in capsys.readouterr().err
    trained(author, replace(TEN, rank=2))
    assert "configuration rank" in capsys.readouterr().err


def test_the_same_data_give_the_same_bytes(author: Path) -> None:
    trained(author)
    first = (author / "tuned" / ADAPTER).read_bytes()
    trained(author)
    assert (author / "tuned" / ADAPTER).read_bytes() == first


@pytest.mark.parametrize("kept_every", [3, 5])
def test_a_killed_training_goes_on_to_the_same_bytes(
    author: Path, kept_every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(author)
    whole = (author / "tuned" / ADAPTER).read_bytes()
    report = (author / "tuning.json").read_bytes()
    (author / "tuning.json").unlink()
    script = (
        "import sys, pickle, torch; torch.set_num_threads(1); from pipeline import tune; from pathlib import Path\n"
        f"tune.KEPT_EVERY = {kept_every}; real = tune._Training._step\n"
        "def slow(self, step):\n    import time; time.sleep(0.3); return real(self, step)\n"
        "tune._Training._step = slow\n"
        f"from tests.pipeline.test_tune import TEN\ntune.run(TEN, *map(Path, sys.argv[1:]))\n"
    )
    state = author / "training.safetensors"
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, paths(author))], cwd=ROOT)
    try:
        for _ in range(1200):
            if state.exists():
                break
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert state.exists() and not (author / "tuning.json").exists()
    halfway = state.read_bytes()
    capsys.readouterr()
    trained(author)
    assert "of 12 steps are done" in capsys.readouterr().err
    assert (author / "tuned" / ADAPTER).read_bytes() == whole
    assert (author / "tuning.json").read_bytes() == report

    state.write_bytes(halfway[:1000])
    trained(author)
    assert "damaged" in capsys.readouterr().err
    assert (author / "tuned" / ADAPTER).read_bytes() == whole


def test_without_steps_the_model_is_as_it_came(author: Path) -> None:
    assert trained(author, replace(TEN, steps=0))["tuned"] is False
    assert torch.equal(merged(author), SafetensorsCheckpoint(author / "checkpoint").tensor(PROJECTION))


def test_a_training_that_makes_it_worse_does_not_pass(author: Path) -> None:
    record = {**trained(author)}
    adapter = Adapter.read(author / "tuned" / ADAPTER)
    worse = {**adapter.record, "perplexity_after": 2 * record["perplexity_before"]}
    Adapter(tensors=adapter.tensors, trained_on=adapter.trained_on, record=worse).write(
        author / "stories" / ADAPTER.name
    )
    (check,) = tune.run(TEN, *paths(author))
    assert not check.passed and check.value == pytest.approx(2)


def test_training_ends_when_nothing_gets_better(author: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = trained(author, replace(TEN, steps=400, learning_rate=1.0, evaluate_every=1))
    assert report["curve"][-1]["step"] < 400
    assert "enough" in capsys.readouterr().err
    assert report["perplexity_after"] <= report["perplexity_before"]
    best = min(report["curve"], key=lambda point: float(point["held_out"]))
    assert best["step"] == report["best_step"]


def test_a_loss_that_is_no_number_is_an_error_with_the_remedy(author: Path) -> None:
    file = author / "checkpoint/model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    file.unlink()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"the loss is nan at step 1; lower tune.learning_rate = 0.02"):
        trained(author)


@pytest.mark.parametrize(
    ("stories", "words"),
    [
        ([story(1, turns=[{"reply": "You wait."}])], r"all.yaml:1: 'move' is a required property"),
        ([story(1, turns=[{"move": "I go", "reply": " "}])], "all.yaml:1"),
        ([story(1, turns=[])], "0 given, at least 1 expected"),
        ([story(1, turns=[{"move": "I go", "reply": "far " * 100}])], r"has \d+ tokens with the persona's prompt"),
        ([story(1, choices={"road": "up"})], "scene 'road' offers no 'up'"),
        ([story(1, choices={"river": "up"})], "the prologue has no scene 'river'"),
        ([story(1), story(2, turns=story(1)["turns"])], "the same reply stands at"),
        ([story(1)], "nothing is left to learn from; write more, or hold out fewer"),
    ],
)
def test_bad_dialogues_are_named_with_their_line(author: Path, stories: list[dict[str, Any]], words: str) -> None:
    write_stories(author, stories)
    with pytest.raises(InputError, match=words):
        trained(author)


def peft(folder: Path, rows: int = 128, columns: int = 128, rank: int = 4, **settings: Any) -> Path:
    """An adapter of one matrix, as PEFT writes it."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(rank, columns, generator=random) * 0.1,
        f"{name}.lora_B.weight": torch.randn(rows, rank, generator=random) * 0.1,
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("settings", "scale"), [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 1}, 0.25)])
def test_somebody_elses_adapter_is_merged_as_peft_would(author: Path, settings: dict[str, Any], scale: float) -> None:
    given = peft(author / "given", **settings)
    report = trained(author, replace(TEN, adapter=f"folder:{given}"))
    assert report["given"] == "given" and report["tuned"]
    factors = load_file(given / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    base = SafetensorsCheckpoint(author / "checkpoint").tensor(PROJECTION)
    torch.testing.assert_close(merged(author).float(), base.float() + scale * up @ down, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": 64}, r"lora_A.weight is \[4, 64\], but this base and r = 4 ask for \[4, 128\]"),
        ({"rank": 4, "lora_alpha": 0}, "expected plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora is set"),
    ],
)
def test_an_adapter_of_another_kind_or_base_is_refused(author: Path, changes: dict[str, Any], words: str) -> None:
    given = peft(author / "given", **changes)
    with pytest.raises(InputError, match=words):
        trained(author, replace(TEN, adapter=f"folder:{given}"))


def test_half_an_adapter_and_a_rank_that_is_not_there_are_refused(author: Path) -> None:
    given = peft(author / "given")
    tensors = load_file(given / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, given / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="has no counterpart"):
        trained(author, replace(TEN, adapter=f"folder:{given}"))
    with pytest.raises(InputError, match=r"tune.rank = 999.*choose at most 64"):
        trained(author, replace(TEN, rank=999))


def test_an_adapter_keeps_its_record(tmp_path: Path) -> None:
    tensors = {PROJECTION + UP: torch.ones(2, 1), PROJECTION + DOWN: torch.ones(1, 2)}
    Adapter(tensors=tensors, trained_on={"a": "b"}, record={"curve": [1, 2.5]}).write(tmp_path / "a.safetensors")
    assert Adapter.read(tmp_path / "a.safetensors").record == {"curve": [1, 2.5]}
