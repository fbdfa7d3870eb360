"""What an author can get wrong in cache_data, and what the message then says; and that our own data is right."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from model.errors import InputError
from pipeline.author_data import (
    Entry,
    Question,
    check_apart,
    read_contrast,
    read_document,
    read_entries,
    read_validation,
    texts_of,
)
from tests.conftest import ROOT

DATA = ROOT / "cache_data"
SCHEMAS = DATA / "schema"
NUMBERS = "one two three four five six seven eight".split()


def entry(name: str, subject: str, answer: str = "So it is.") -> str:
    """An intent of eight phrasings, as an author writes it; the first phrasing is on its fourth line."""
    phrasings = "".join(f"    - {number} {subject}?\n" for number in NUMBERS)
    return f"- id: {name}\n  answer: {answer}\n  phrasings:\n{phrasings}"


def entries_of(folder: Path, files: Mapping[str, str]) -> list[Entry]:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return read_entries(folder, SCHEMAS)


def require_refusal(folder: Path, text: str, *messages: str) -> None:
    with pytest.raises(InputError) as raised:
        entries_of(folder, {"a.yaml": text})
    for message in messages:
        assert message in str(raised.value)


def test_entries_are_read_in_order_of_file_and_place(tmp_path: Path) -> None:
    files = {"b.yaml": entry("third", "c"), "a.yaml": entry("first", "a") + entry("second", "b")}
    read = entries_of(tmp_path, files)
    assert [row.id for row in read] == ["first", "second", "third"]
    assert read[0] == Entry(id="first", answer="So it is.", phrasings=tuple(f"{number} a?" for number in NUMBERS))
    assert list(texts_of(read))[7:9] == [("first", "eight a?"), ("second", "one b?")]


def test_every_scalar_is_text_and_lines_of_an_answer_are_joined(tmp_path: Path) -> None:
    answer = "|\n    One line\n    and its rest.\n\n    Another paragraph."
    text = entry("a", "a", answer).replace("one a?", "1900").replace("two a?", "Yes")
    [read] = entries_of(tmp_path, {"a.yaml": text})
    assert read.phrasings[:2] == ("1900", "Yes")
    assert read.answer == "One line and its rest.\n\nAnother paragraph."


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    text = entry("first", "a").replace("- three a?", '- "three a?')
    require_refusal(tmp_path, text, f"{tmp_path}/a.yaml:", "broken YAML", "check indentation, colons and quotes")
    require_refusal(tmp_path, entry("a", "a") + "  - x: [1\n", f"{tmp_path}/a.yaml:12: broken YAML")


def test_control_character_names_file(tmp_path: Path) -> None:
    require_refusal(tmp_path, entry("a", "a\x07"), f"{tmp_path}/a.yaml: broken YAML")


def test_key_given_twice_in_an_entry(tmp_path: Path) -> None:
    text = entry("a", "a") + "  answer: But no.\n"
    require_refusal(tmp_path, text, f"{tmp_path}/a.yaml:12: 'answer' is given twice", "first at line 2", "keep one")


def test_intent_given_twice_would_have_two_answers(tmp_path: Path) -> None:
    text = entry("same", "a", "Yes.") + entry("same", "b", "No.")
    place = f"{tmp_path}/a.yaml"
    require_refusal(tmp_path, text, f"{place}:12: intent 'same' stands already at {place}:1", "two answers; merge them")


def test_intent_given_twice_in_two_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"b\.yaml:1: intent 'same' stands already at .*a\.yaml:1"):
        entries_of(tmp_path, {"a.yaml": entry("same", "a"), "b.yaml": entry("same", "b")})


@pytest.mark.parametrize("same", ["three a?", "THREE A", "three,  a!", "Three a?!"])
def test_phrasing_of_two_intents_whatever_its_case_and_punctuation(tmp_path: Path, same: str) -> None:
    text = entry("first", "a") + entry("second", "b").replace("two b?", f'"{same}"')
    place = f"{tmp_path}/a.yaml"
    require_refusal(
        tmp_path,
        text,
        f"{place}:16: phrasing {same!r} of intent 'second' stands already at {place}:6, of intent 'first'",
        "keep one",
    )


def test_phrasing_given_twice_in_one_intent(tmp_path: Path) -> None:
    require_refusal(tmp_path, entry("a", "a").replace("two a?", "One A"), "a.yaml:5", "of the same intent; keep one")


def test_phrasing_without_a_word(tmp_path: Path) -> None:
    require_refusal(tmp_path, entry("a", "a").replace("two a?", '"?!"'), "a.yaml:5: phrasing '?!' holds no word")


def test_too_few_phrasings(tmp_path: Path) -> None:
    text = entry("a", "a").replace("    - eight a?\n", "")
    require_refusal(tmp_path, text, "a.yaml:4: 7 given, at least 8 expected; see cache_data/README.md")


def test_unknown_key(tmp_path: Path) -> None:
    require_refusal(tmp_path, entry("a", "a") + "  anser: Typo.\n", "a.yaml:1: ", "'anser' was unexpected")


def test_missing_key(tmp_path: Path) -> None:
    text = entry("first", "a") + entry("second", "b").replace("  answer: So it is.\n", "")
    require_refusal(tmp_path, text, "a.yaml:12: 'answer' is a required property")


def test_list_where_text_is_expected(tmp_path: Path) -> None:
    require_refusal(tmp_path, entry("a", "a", "[Yes, No]"), "a.yaml:2: expected text")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "id: a\n"])
def test_file_that_is_no_list(tmp_path: Path, text: str) -> None:
    require_refusal(tmp_path, text, "a.yaml:1: expected a list")


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(entry("a", "caf\u00e9").encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.yaml: not UTF-8 text .*; save it as UTF-8"):
        read_entries(tmp_path, SCHEMAS)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"persona\.yaml: missing; see cache_data/README\.md"):
        read_document(tmp_path / "persona.yaml", SCHEMAS / "persona.schema.json")


def test_folder_without_entries(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.yaml file; add intents"):
        read_entries(tmp_path, SCHEMAS)


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """A sound validation set about the intents `first` and `second`."""
    questions = {
        "paraphrases": '- {question: "Paraphrase?", intent: first}\n'
        '- {question: "Another?", intent: second, style: short, also: [first]}\n',
        "near_misses": '- {question: "Trap?", kind: negation, near: second}\n',
        "out_of_domain": '- {question: "Elsewhere?", kind: code}\n',
    }
    for name, text in questions.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


INTENTS = {"first", "second"}


def test_validation_says_what_must_answer(validation: Path) -> None:
    read = read_validation(validation, SCHEMAS, INTENTS)
    assert read == [
        Question(text="Paraphrase?", stratum="paraphrases", intent="first"),
        Question(text="Another?", stratum="paraphrases/short", intent="second", also=("first",)),
        Question(text="Trap?", stratum="near_misses/negation", near="second"),
        Question(text="Elsewhere?", stratum="out_of_domain/code"),
    ]
    assert [row.place for row in read] == [
        f"{validation}/{place}" for place in ("paraphrases.yaml:1", "paraphrases.yaml:2", "near_misses.yaml:1")
    ] + [f"{validation}/out_of_domain.yaml:1"]
    assert [row.group for row in read] == ["paraphrases", "paraphrases", "near_misses", "out_of_domain"]


def test_what_answers_a_question_fairly(validation: Path) -> None:
    paraphrase, another, trap, _ = read_validation(validation, SCHEMAS, INTENTS)
    assert another.fairly_answered_by("second") and another.fairly_answered_by("first")
    assert paraphrase.fairly_answered_by("first") and not paraphrase.fairly_answered_by("second")
    assert not trap.fairly_answered_by("second")


def test_contrast_needs_no_paraphrases(validation: Path) -> None:
    (validation / "paraphrases.yaml").unlink()
    assert [row.text for row in read_contrast(validation, SCHEMAS, INTENTS)] == ["Trap?", "Elsewhere?"]


@pytest.mark.parametrize(("file", "line"), [("paraphrases", 2), ("near_misses", 1)])
def test_validation_naming_an_unknown_intent(validation: Path, file: str, line: int) -> None:
    with pytest.raises(InputError, match=rf"{file}\.yaml:{line}: no intent 'second' in cache_data/entries"):
        if file == "near_misses":
            (validation / "paraphrases.yaml").write_text('- {question: "Paraphrase?", intent: first}\n')
        read_validation(validation, SCHEMAS, {"first"})


def test_question_in_two_files(validation: Path) -> None:
    (validation / "out_of_domain.yaml").write_text('- {question: "another?", kind: code}\n')
    with pytest.raises(InputError, match=r"out_of_domain\.yaml:1: the question stands already at .*es\.yaml:2"):
        read_validation(validation, SCHEMAS, INTENTS)


def test_unknown_kind_of_trap(validation: Path) -> None:
    (validation / "near_misses.yaml").write_text('- {question: "Trap?", kind: trick, near: first}\n')
    with pytest.raises(InputError, match=re.escape("near_misses.yaml:1: 'trick' is not one of")):
        read_validation(validation, SCHEMAS, INTENTS)


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return read_entries(DATA / "entries", SCHEMAS)


@pytest.mark.parametrize("same", ["one A", "A, one?"])
def test_a_leak_is_refused_whatever_the_order_of_words(tmp_path: Path, validation: Path, same: str) -> None:
    folder = tmp_path / "entries"
    folder.mkdir()
    read = entries_of(folder, {"a.yaml": entry("first", "a") + entry("second", "b")})
    (validation / "near_misses.yaml").write_text(f'- {{question: "{same}", kind: negation, near: first}}\n')
    questions = read_validation(validation, SCHEMAS, INTENTS)
    with pytest.raises(InputError, match=r"near_misses\.yaml:1: .* of cert has the same words as .*a\.yaml:4, so"):
        check_apart(read, {"cert": questions})


def test_a_question_of_two_sets_is_a_leak(validation: Path) -> None:
    questions = read_validation(validation, SCHEMAS, INTENTS)
    check_apart([], {"dev": questions})
    with pytest.raises(InputError, match=r"paraphrases\.yaml:1: 'Paraphrase\?' of cert has the same words as"):
        check_apart([], {"dev": questions, "cert": questions})


def test_own_entries_are_many(entries: list[Entry]) -> None:
    assert len(entries) >= 150
    assert sum(len(row.phrasings) for row in entries) >= 1800


def test_own_persona_and_prologue_load() -> None:
    persona = read_document(DATA / "persona.yaml", SCHEMAS / "persona.schema.json").content
    assert "Emerald" in persona["system_prompt"]
    assert read_document(DATA / "prologue.yaml", SCHEMAS / "prologue.schema.json").content["scenes"]


def test_own_sets_have_nothing_in_common(entries: list[Entry]) -> None:
    ids = {row.id for row in entries}
    sets = {"contrast": read_contrast(DATA / "contrast", SCHEMAS, ids)}
    sets |= {part: read_validation(DATA / "validation" / part, SCHEMAS, ids) for part in ("dev", "cert")}
    check_apart(entries, sets)


def test_own_certification_asks_each_intent_once_in_each_style(entries: list[Entry]) -> None:
    cert = read_validation(DATA / "validation/cert", SCHEMAS, {row.id for row in entries})
    asked = [(row.intent, row.stratum) for row in cert if row.intent]
    assert len(set(asked)) == len(asked) > 600
    kinds = {row.stratum for row in cert}
    assert len([kind for kind in kinds if kind.startswith("near_misses/")]) == 12
    assert len([kind for kind in kinds if kind.startswith("out_of_domain/")]) == 10
