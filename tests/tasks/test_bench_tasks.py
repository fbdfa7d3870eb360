"""Questions put to the reference and to int4 through the real lm-evaluation-harness; needs `make test-tasks`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from model.artifact import write_json
from model.checkpoint import SafetensorsCheckpoint
from model.errors import InputError
from model.llama import sequence_logits
from model.networks import float_network
from model.tokenizer import Tokenizer, chat_settings
from pipeline.bench.tasks import Scored, grouped, main, only_right
from tests.conftest import ROOT

QUESTIONS = [
    ("The capital of France is", [" Paris", " Berlin", " Madrid"], 0),
    ("Water freezes into", [" smoke", " ice", " sand"], 1),
    ("The opposite of hot is", [" loud", " round", " cold"], 2),
    ("A dog is an", [" animal", " hour", " idea"], 0),
    ("In the morning the sun", [" sings", " rises", " barks"], 1),
    ("Two plus two is", [" nine", " blue", " four"], 2),
    ("Fish live in", [" water", " paper", " music"], 0),
    ("You read a", [" soup", " book", " cloud"], 1),
]
TASK = """
task: plain_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of the harness over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": text, "choices": choices, "answer": right} for text, choices, right in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "plain_questions.yaml").write_text(TASK.format(file=folder / "questions.jsonl"))
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """The embedded model, as `make pipeline` leaves it."""
    found = ROOT / "build/embedded"
    for name in ("tuned", "int4"):
        shutil.copytree(found / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("most", [1, 12, 10_000])
def test_likelihoods_are_those_of_whole_sequences(tiny: Scored, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens are computed together."""
    monkeypatch.setattr("pipeline.bench.tasks.PASS_TOKENS", most)
    monkeypatch.setattr("pipeline.bench.tasks.HEAD_TOKENS", most)
    network, tokenizer = tiny.network, tiny.tokens
    pairs = [("One two", " three"), ("One two", " four"), ("Long ago", " a road"), ("One two", " three")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = tiny.loglikelihood(asked, disable_tqdm=True)
    for (before, after), (likely, greedy) in zip(pairs, found, strict=True):
        tokens = torch.tensor(tokenizer.encode(before + after))
        start = len(tokenizer.encode(before))
        logits = sequence_logits(network, tokens)[start - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.double(), tokens[start:], reduction="sum")
        assert likely == pytest.approx(-float(expected), abs=1e-4)
        assert greedy == bool((logits.argmax(dim=-1) == tokens[start:]).all())
    assert found[0] == found[3] != found[1]


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path) -> Scored:
    folder = shutil.copytree(tiny_model, tmp_path / "tiny")
    write_json(folder / "chat.json", chat_settings(folder))
    return Scored(float_network(SafetensorsCheckpoint(folder), torch.float32), Tokenizer.load(folder))


def test_both_models_answer_and_are_compared(build: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--build", str(build), "--tasks", "plain_questions", "--include", str(tasks)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["plain_questions"]
    report = json.loads((build / "reports/tasks.json").read_text())
    assert code == 0 and report["passed"] is True
    assert found["questions"] == len(QUESTIONS)
    assert found["reference"] >= 0.75 and found["int4"] >= 0.6  # a third by chance; SmolLM2 knows these
    share = (found["only_int4_right"] - found["only_reference_right"]) / len(QUESTIONS)
    assert found["int4"] - found["reference"] == pytest.approx(share)


def test_a_model_that_cannot_pass_ends_with_1(build: Path, tasks: Path) -> None:
    """No chance is above 1, so a limit above it is never met."""
    arguments = ["--build", str(build), "--tasks", "plain_questions", "--include", str(tasks), "--limit", "2"]
    assert main([*arguments, "--p-min", "1.1"]) == 1
    assert json.loads((build / "reports/tasks.json").read_text())["passed"] is False


def test_groups_keep_order_and_size() -> None:
    items = [((number,), (number,)) for number in range(5)]
    groups = grouped(items, [3, 2, 9, 1, 4], 5)
    assert groups == [items[:2], items[2:3], items[3:]]


def test_questions_are_paired() -> None:
    reference = {0: True, 1: True, 2: True, 3: False, 4: False}
    int4 = {0: True, 1: False, 2: False, 3: True, 4: False}
    assert (only_right(reference, int4), only_right(int4, reference)) == (2, 1)
    with pytest.raises(InputError, match="2 questions were put to one model only"):
        only_right({0: True, 1: True}, {1: True, 2: True})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "knows no no_such_task"),
        (["--tasks", "plain_questions", "--metric", "bleu"], "does not state 'bleu'"),
    ],
)
def test_what_is_not_there_is_named(
    build: Path, tasks: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--build", str(build), "--include", str(tasks), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_generating_tasks_are_refused(tiny: Scored) -> None:
    with pytest.raises(InputError, match="choose multiple-choice tasks"):
        tiny.generate_until([])
