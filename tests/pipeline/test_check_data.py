"""What check-data tells an author of our own data, with faults planted in a copy of it."""

import shutil
from pathlib import Path

import pytest

from pipeline.check_data import Findings, check
from pipeline.command_line import main
from tests.conftest import ROOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "cache_data", tmp_path / "cache_data"))


def edit(file: Path, before: str, after: str) -> int:
    """Replaces a text that stands once; the line it stands on."""
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1
    file.write_text(text.replace(before, after), encoding="utf-8")
    return text[: text.index(before)].count("\n") + 1


def test_every_files_error_is_told_at_once(data: Path, tmp_path: Path) -> None:
    (data / "persona.yaml").write_text("name: [\n", encoding="utf-8")
    dev = data / "validation/dev"
    (dev / "out_of_domain.yaml").write_text('- {question: "Hm?", kind: riddle}\n', encoding="utf-8")
    found = check(data, tmp_path)
    assert [error.split(": ")[0] for error in found.errors] == [
        f"{data}/persona.yaml:2",
        f"{dev}/out_of_domain.yaml:1",
    ]
    assert found.warnings == [f"no cache in {tmp_path}, so likeness was not looked at: run make pipeline"]


def test_broken_entries_leave_the_questions_for_later(data: Path, tmp_path: Path) -> None:
    line = edit(data / "entries/people.yaml", "- id: who-is-toto\n", "- id: Who Is Toto\n")
    found = check(data, tmp_path)
    assert len(found.errors) == 1
    assert f"people.yaml:{line}: 'Who Is Toto' does not match" in found.errors[0]
    assert found.warnings == ["the questions were not looked at, because they name intents"]


def test_a_leak_is_an_error(data: Path, tmp_path: Path) -> None:
    with (data / "validation/dev/paraphrases.yaml").open("a", encoding="utf-8") as file:
        file.write('- {question: "is toto WHO?", intent: who-is-toto}\n')
    [error] = check(data, tmp_path).errors
    assert "'is toto WHO?' of validation/dev has the same words as" in error
    assert "people.yaml:" in error


def test_near_duplicates_missed_paraphrases_and_suggestions(embedded_build: Path, data: Path, tmp_path: Path) -> None:
    line = edit(data / "entries/people.yaml", "    - Who is Toto?\n", "    - Who is Toto?\n    - Who's the Wizard?\n")
    misses = tmp_path / "misses.txt"
    cold, warm = "How do I bake sourdough bread?", "I ask myself whether Toto is the small dog Dorothy owns"
    misses.write_text(f"{cold}\n\n{warm}\n{warm}\n", encoding="utf-8")
    found = check(data, embedded_build, misses)
    assert found.errors == []
    assert found.warnings[0] == f"{embedded_build}/cache is of an earlier state of the entries: run make pipeline"
    twins = [warning for warning in found.warnings if "is nearly" in warning]
    assert any(f"people.yaml:{line + 1}" in twin and "'who-is-the-wizard'" in twin for twin in twins)
    cosines = [float(twin.split("cosine ")[1].split(";")[0]) for twin in twins]
    assert cosines == sorted(cosines, reverse=True) and min(cosines) >= 0.95
    missed = [warning for warning in found.warnings if " misses '" in warning]
    assert missed and all("validation/dev/paraphrases.yaml:" in warning for warning in missed)
    assert not any(cold in suggestion for suggestion in found.suggestions)


def test_a_question_short_of_a_hit_is_suggested_for_its_intent(embedded_build: Path, tmp_path: Path) -> None:
    """What `validation/dev` misses by little, as if a server had logged it."""
    first = check(ROOT / "cache_data", embedded_build)
    texts = [warning.split(".yaml:")[1].split(": ", 1)[1] for warning in first.warnings if " misses '" in warning]
    questions = [text.rpartition(" misses '")[0].strip("'\"") for text in texts]
    misses = tmp_path / "misses.txt"
    misses.write_text("\n".join(questions), encoding="utf-8")
    found = check(ROOT / "cache_data", embedded_build, misses)
    assert found.suggestions
    shorts = [float(suggestion.split("which is ")[1].split(" short")[0]) for suggestion in found.suggestions]
    assert shorts == sorted(shorts) and shorts[0] >= 0 and shorts[-1] <= 0.1


def test_the_command_prints_findings_and_fails_on_errors(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check-data", "--data", str(data), "--build", str(tmp_path / "none")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("warning: no cache in ")
    assert "0 errors, 1 warnings, 0 suggestions" in said.err
    (data / "persona.yaml").unlink()
    assert main(command) == 2
    assert capsys.readouterr().out.startswith(f"error: {data}/persona.yaml: missing")


def test_unreadable_misses_are_named(embedded_build: Path, tmp_path: Path) -> None:
    assert main(["check-data", "--misses", str(tmp_path / "gone"), "--build", str(embedded_build)]) == 2


def test_findings_of_our_own_data_hold_no_error(tmp_path: Path) -> None:
    assert check(ROOT / "cache_data", tmp_path) == Findings(
        [], [f"no cache in {tmp_path}, so likeness was not looked at: run make pipeline"], []
    )
