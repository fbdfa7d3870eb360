"""python -m serving, as a person uses it."""

import io
from pathlib import Path

import pytest

from serving.__main__ import main
from serving.choices import as_move
from serving.settings import VARIABLES, Settings
from tests.conftest import ROOT


def test_ask_answers_on_stdout_and_says_who_answered_on_stderr(
    embedded_build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "What are you capable of?", "--build", str(embedded_build)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("I tell you a story")
    assert "cache: capabilities, exact match" in said.err


def test_a_seed_makes_the_models_reply_repeatable(embedded_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ask", "I look up.", "--seed", "3", "--max-tokens", "8", "--build", str(embedded_build)]
    texts = []
    for _ in range(2):
        assert main(command) == 0
        said = capsys.readouterr()
        assert "model: " in said.err
        texts.append(said.out)
    assert texts[0] == texts[1] != ""


def test_explain_gives_the_reason(embedded_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "And who is Toto?", "--build", str(embedded_build)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("miss: ")
    for words in (
        "nearest ",
        "rival ",
        "novelty ",
        "score ",
        " is certified)",
        "conversation: it continues an earlier",
    ):
        assert words in said
    assert "comparison: no objection" in said


def test_without_a_certificate_only_exact_matches_answer_and_it_says_so(
    embedded_build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("engine", "embedder", "cache"):
        (tmp_path / name).symlink_to(embedded_build / name)
    question = "Could you tell me who the Wizard is, please?"
    assert main(["explain", question, "--build", str(tmp_path)]) == 0
    reason = f"{tmp_path}/certificate.json: missing; run"
    said = capsys.readouterr().out
    assert said.startswith(f"miss: only exact matches answer: {reason}")
    assert "(no certified threshold)" in said
    assert f"the cache answers exact matches only: {reason}" in caplog.text
    assert main(["ask", "who is the WIZARD", "--build", str(tmp_path)]) == 0
    assert "[cache: who-is-the-wizard, exact match" in capsys.readouterr().err


def test_an_answer_by_likeness_names_its_bound(embedded_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Could you tell me who the Wizard is, please?"
    assert main(["ask", question, "--build", str(embedded_build)]) == 0
    assert "[cache: who-is-the-wizard, wrong at most" in capsys.readouterr().err


def test_a_revoked_answer_is_named_on_a_typo(
    embedded_build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMERALD_REVOKED", "who-is-toto, who-is-totto")
    assert main(["ask", "Who is Toto?", "--build", str(embedded_build)]) == 2
    assert "cannot revoke 'who-is-totto'" in capsys.readouterr().err


def test_chat_holds_a_conversation(
    embedded_build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is Toto?\nI pat him.\n/new\n/help\n/quit\n"))
    assert main(["chat", "--max-tokens", "6", "--build", str(embedded_build)]) == 0
    said = capsys.readouterr()
    assert said.out.count("Welcome, traveller") == 2
    assert "[cache: who-is-toto" in said.err
    assert "[model: " in said.err


def test_a_number_takes_the_choice_that_was_offered(
    embedded_build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own reply, of a seed that ends in choices; a number that was not offered is a move like any other."""
    monkeypatch.setattr("sys.stdin", io.StringIO("I open the green door\n2\n99\n/quit\n"))
    assert main(["chat", "--seed", "1", "--build", str(embedded_build)]) == 0
    said = capsys.readouterr().err
    offered = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("  2  ")]
    assert offered and as_move(offered[0]) in said.splitlines()
    assert "99" not in said.splitlines()


def test_a_refused_message_leaves_the_conversation_as_it_was(
    embedded_build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'wizard ' * 3000}\nI pat the lion.\n/quit\n"))
    assert main(["chat", "--max-tokens", "4", "--build", str(embedded_build)]) == 0
    said = capsys.readouterr()
    assert "error: the message is too long" in said.err
    assert "[model: " in said.err
    assert "forgotten" not in said.err


def test_nothing_built_names_the_folder_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "hello", "--build", str(tmp_path)]) == 2
    assert f'no {tmp_path}/cache: run "make pipeline"' in capsys.readouterr().err


@pytest.mark.parametrize(("variable", "value"), [("PORT", "many"), ("PORT", "70000"), ("EMERALD_WAITING", "-1")])
def test_a_bad_variable_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["serve"]) == 2
    assert f"{variable} = " in capsys.readouterr().err


def test_a_key_that_is_no_digest_ends_the_server_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMERALD_API_KEYS", "open sesame")
    assert main(["serve"]) == 2
    said = capsys.readouterr().err
    assert "API key 1 is no SHA-256" in said
    assert "sesame" not in said


def test_every_setting_has_a_variable_and_the_readme_names_it() -> None:
    assert set(VARIABLES) == set(Settings.__dataclass_fields__)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{variable}`" in readme for variable in VARIABLES.values())
