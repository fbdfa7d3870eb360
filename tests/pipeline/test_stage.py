"""When a stage runs: over tiny stages, by the real command line in a process of its own."""

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.cpu import COMPILER_FLAGS, family
from model.errors import InputError
from pipeline.configs import ReportConfig
from pipeline.fingerprint import imports_of
from pipeline.stage import Stage, check_table
from tests.conftest import ROOT
from tests.pipeline.conftest import cli, environment

ALL_RAN = {"join": "ran", "count": "ran", "apart": "ran"}
NOTHING_RAN = {"join": "unchanged", "count": "unchanged", "apart": "unchanged"}
OUTPUT = {"joined.txt": "ONE TWO THREE!", "counted/0.txt": "ONE", "counted/2.txt": "THREE!", "copy.txt": "alone"}


def receipt_of(build: Path, stage: str) -> Path:
    return build / f".receipts/{stage}.json"


def require_whole(build: Path) -> None:
    for name, text in OUTPUT.items():
        assert (build / name).read_text() == text
    assert sorted(path.name for path in (build / "counted").iterdir()) == ["0.txt", "1.txt", "2.txt"]


def test_first_run_runs_all_and_second_run_nothing(tree: Path) -> None:
    first = cli("run", folder=tree)
    assert (first.code, first.states) == (0, ALL_RAN)
    build = tree / "build/embedded"
    require_whole(build)
    before = {path: path.stat().st_mtime_ns for path in build.rglob("*.txt")}
    second = cli("run", folder=tree)
    assert (second.code, second.states) == (0, NOTHING_RAN)
    assert {path: path.stat().st_mtime_ns for path in build.rglob("*.txt")} == before
    assert cli("explain", "count", folder=tree).out == "count is up to date\n"


def test_edited_source_reruns_exactly_its_dependents(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    (built_tree / "notes/b.txt").write_text("four")
    explained = cli("explain", "join", folder=built_tree)
    assert explained.out == "join would run:\n  source notes/b.txt changed\n"
    assert cli("run", folder=built_tree).states == {"join": "ran", "count": "ran", "apart": "unchanged"}
    assert (build / "counted/2.txt").read_text() == "FOUR!"


def test_added_and_removed_sources_are_named(built_tree: Path) -> None:
    (built_tree / "notes/a.txt").rename(built_tree / "notes/c.txt")
    explained = cli("explain", "join", folder=built_tree)
    assert explained.out.splitlines()[1:] == ["  source notes/a.txt is gone", "  source notes/c.txt is new"]


def test_dependents_of_an_identical_output_do_not_run(built_tree: Path) -> None:
    (built_tree / "notes/b.txt").write_text("THREE")  # joined in upper case: the same
    assert cli("run", folder=built_tree).states == {"join": "ran", "count": "unchanged", "apart": "unchanged"}


def test_changed_setting_is_named_with_both_values(built_tree: Path) -> None:
    settings = ["--set", "export.context_tokens=100"]
    explained = cli("explain", "join", *settings, folder=built_tree)
    assert "configuration join.context_tokens was 2048, is 100" in explained.out
    ended = cli("run", *settings, folder=built_tree)
    assert ended.states == {"join": "ran", "count": "unchanged", "apart": "unchanged"}
    assert "because configuration join.context_tokens was 2048, is 100" in ended.err


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pipeline/join.py", '" ".join', '"  ".join'),
        ("model/loud.py", "text.upper()", "text.title().upper()"),  # imported inside a function
        ("model/mark.py", '"!"', '"?"'),  # imported by that module
    ],
)
def test_changed_code_reruns_the_stages_that_import_it(built_tree: Path, file: str, old: str, new: str) -> None:
    build = built_tree / "build/embedded"
    (built_tree / file).write_text((built_tree / file).read_text().replace(old, new))
    assert cli("explain", "join", folder=built_tree).out == f"join would run:\n  code {file} changed\n"
    assert cli("explain", "apart", folder=built_tree).out == "apart is up to date\n"
    assert cli("run", folder=built_tree).states["join"] == "ran"
    assert ("?" in (build / "joined.txt").read_text()) == (new == '"?"')


@pytest.mark.parametrize("file", ["model/unused.py", "pipeline/configs.py", "pipeline/fetch.py"])
def test_code_that_no_stage_imports_and_configurations_rerun_nothing(built_tree: Path, file: str) -> None:
    (built_tree / file).write_text((built_tree / file).read_text() + "\n# edited\n")
    assert cli("run", folder=built_tree).states == NOTHING_RAN


def test_imports_of_a_real_stage() -> None:
    code, packages = imports_of(ROOT / "pipeline/quantize.py")
    names = {str(file.relative_to(ROOT)) for file in code}
    direct, through_others = {"pipeline/quantize.py", "model/quantization.py"}, {"model/errors.py", "model/llama.py"}
    assert direct | through_others <= names
    assert {"torch", "torchao", "safetensors"} <= packages
    assert not {"json", "pathlib", "model", "pipeline"} & packages


def test_configurations_are_no_code_of_a_stage_that_imports_them() -> None:
    code, _ = imports_of(ROOT / "pipeline/fetch.py")
    assert ROOT / "pipeline/configs.py" not in code
    assert ROOT / "pipeline/sources.py" in code


def test_package_imported_inside_a_function_counts() -> None:
    _, packages = imports_of(ROOT / "pipeline/export_embedder.py")
    assert "sentence_transformers" in packages


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def duplicate(file: Path) -> None:
    file.with_name("extra.txt").write_bytes(file.read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, flip, truncate, duplicate])
def test_damaged_output_is_noticed_and_rebuilt(built_tree: Path, damage: object) -> None:
    build = built_tree / "build/embedded"
    assert callable(damage)
    damage(build / "counted/1.txt")
    explained = cli("explain", "count", folder=built_tree)
    assert explained.out == "count would run:\n  output counted is missing or not what this stage wrote\n"
    assert cli("run", folder=built_tree).states == {"join": "unchanged", "count": "ran", "apart": "unchanged"}
    require_whole(build)


def test_damaged_input_is_rebuilt_before_it_is_read(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    flip(build / "joined.txt")
    ended = cli("run", "count", folder=built_tree)
    assert ended.states == {"join": "ran", "count": "unchanged"}
    require_whole(build)


def test_an_output_that_nobody_must_read_may_be_gone(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    (build / "joined.txt").unlink()
    ended = cli("run", "count", folder=built_tree)
    assert ended.states == {"join": "unchanged", "count": "unchanged"}
    assert not (build / "joined.txt").exists()
    assert cli("run", folder=built_tree).states == {"join": "ran", "count": "unchanged", "apart": "unchanged"}
    require_whole(build)


@pytest.mark.parametrize("again", [["--set", "savings.reply_tokens=99"], ["--force"]])
def test_an_output_that_is_gone_is_made_again_for_a_stage_that_must_run(built_tree: Path, again: list[str]) -> None:
    (built_tree / "build/embedded/joined.txt").unlink()
    assert cli("run", "count", *again, folder=built_tree).states == {"join": "ran", "count": "ran"}
    require_whole(built_tree / "build/embedded")


def test_an_output_that_came_out_as_it_was_has_nothing_made_again(tree: Path) -> None:
    stages, apart = tree / "pipeline/stages.py", tree / "pipeline/apart.py"
    stages.write_text(stages.read_text().replace('sources=(Path("apart.txt"),)', 'inputs=(Path("counted"),)'))
    apart.write_text(apart.read_text().replace("shutil.copyfile(source, output)", "output.write_text(source.name)"))
    assert cli("run", folder=tree).code == 0
    counted, note = tree / "build/embedded/counted", tree / "notes/a.txt"
    shutil.rmtree(counted)
    note.write_text("One two")  # of which the first stage makes capitals
    assert cli("run", "apart", folder=tree).states == {"join": "ran", "count": "unchanged", "apart": "unchanged"}
    assert not counted.exists()
    note.write_text("one two four")
    assert set(cli("run", "apart", folder=tree).states.values()) == {"ran"}


def test_what_is_published_of_a_stage_is_all_that_later_stages_need_elsewhere(built_tree: Path, tmp_path: Path) -> None:
    build, other = built_tree / "build/embedded", tmp_path / "other/embedded"
    _, *kept = cli("key", "join", folder=built_tree).out.splitlines()
    assert kept == ["build/embedded/joined.txt", "build/embedded/.receipts/join.json"]
    for path in map(built_tree.joinpath, kept):
        place = other / path.relative_to(build)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    assert cli("run", "count", "--build", other, folder=built_tree).states == {"join": "unchanged", "count": "ran"}
    # of both together nothing but reports and receipts is read by others
    assert cli("key", "count", folder=built_tree).out.splitlines()[1:] == [
        "build/embedded/reports/count.json",
        "build/embedded/.receipts/join.json",
        "build/embedded/.receipts/count.json",
    ]


def test_a_check_runs_nothing_and_names_what_is_out_of_date(built_tree: Path) -> None:
    (built_tree / "build/embedded/joined.txt").unlink()
    assert cli("run", "count", "--check", folder=built_tree).code == 0
    flip(built_tree / "build/embedded/counted/1.txt")
    ended = cli("run", "count", "--check", folder=built_tree)
    assert ended.code == 1
    assert "count is out of date: output counted is missing or not what this stage wrote" in ended.err
    assert not (built_tree / "build/embedded/joined.txt").exists()
    assert cli("run", "count", "--check", "--set", "export.context_tokens=100", folder=built_tree).code == 1


def test_verdicts_as_markdown(built_tree: Path) -> None:
    table = cli("status", "--markdown", folder=built_tree).out
    assert "| ✅ | words | | 3 | at most 150 |" in table
    assert cli("run", "--set", "savings.reply_tokens=2", folder=built_tree).code == 1
    assert "| ❌ | words | | 3 | at most 2 |" in cli("status", "--markdown", folder=built_tree).out


def test_a_key_is_known_before_anything_runs_and_changes_with_what_is_read(tree: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    before = cli("key", "count", "--github-output", outputs, folder=tree).out.splitlines()
    assert outputs.read_text() == "\n".join(
        [f"key={before[0]}", "paths<<END_OF_PATHS", *before[1:], "END_OF_PATHS", ""]
    )
    assert cli("run", folder=tree).code == 0
    assert cli("key", "count", folder=tree).out.splitlines() == before
    for change in (["--set", "savings.reply_tokens=99"], ["--set", "export.context_tokens=100"]):
        assert cli("key", "count", *change, folder=tree).out.splitlines()[0] != before[0]
    assert cli("key", "apart", *change, folder=tree).out == cli("key", "apart", folder=tree).out
    (tree / "notes/b.txt").write_text("four")
    assert cli("key", "count", folder=tree).out.splitlines()[0] != before[0]


def test_kill_between_publishing_and_receipt_recovers(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    receipt_of(build, "count").unlink()
    leftover = build / ".partial/count/counted"
    leftover.mkdir(parents=True)
    (leftover / "9.txt").write_text("half")
    ended = cli("run", folder=built_tree)
    assert ended.states == {"join": "unchanged", "count": "ran", "apart": "unchanged"}
    assert "because it has not run yet" in ended.err
    require_whole(build)
    assert not leftover.exists()


def test_kill_inside_a_stage_leaves_no_receipt_and_recovers(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    (built_tree / "notes/b.txt").write_text("four")
    assert cli("run", folder=built_tree, DIE_IN="join").code == -9
    assert not receipt_of(build, "join").exists()
    assert (build / "joined.txt").read_text() == OUTPUT["joined.txt"]
    assert (build / ".partial/join/joined.txt").read_text() == "half of it"
    assert cli("run", folder=built_tree).states == {"join": "ran", "count": "ran", "apart": "unchanged"}
    assert (build / "joined.txt").read_text() == "ONE TWO FOUR!"


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00" * 64, b"\xff\xfe", b"{", b"[]", b"null", b"{}", b'{"passed": true, "outputs": {}}']
)
def test_unreadable_receipt_means_not_run(built_tree: Path, garbage: bytes) -> None:
    build = built_tree / "build/embedded"
    receipt_of(build, "apart").write_bytes(garbage)
    assert cli("explain", "apart", folder=built_tree).out == "apart would run:\n  it has not run yet\n"
    assert cli("run", folder=built_tree).states == {"join": "unchanged", "count": "unchanged", "apart": "ran"}


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"[]", b"7", b'{"/": 7}'])
def test_unreadable_digest_memo_is_forgotten(built_tree: Path, garbage: bytes) -> None:
    build = built_tree / "build/embedded"
    (build / ".receipts/digests.json").write_bytes(garbage)
    ended = cli("run", folder=built_tree)
    assert (ended.code, ended.states) == (0, NOTHING_RAN)


def test_force_runs_what_it_names(built_tree: Path) -> None:
    forced = cli("run", "count", "--force", folder=built_tree)
    assert forced.states == {"join": "unchanged", "count": "ran"}
    assert "because forced" in forced.err
    assert cli("run", "--force", folder=built_tree).states == ALL_RAN


def test_named_stage_runs_only_what_it_needs(tree: Path) -> None:
    assert cli("run", "count", folder=tree).states == {"join": "ran", "count": "ran"}
    assert not (tree / "build/embedded/copy.txt").exists()
    assert cli("run", "apart", folder=tree).states == {"apart": "ran"}


def test_build_elsewhere_has_the_same_fingerprints(built_tree: Path, tmp_path: Path) -> None:
    build = built_tree / "build/embedded"
    other = tmp_path / "elsewhere/deep"
    assert cli("run", "--build", other, folder=built_tree, PYTHONHASHSEED="7").code == 0
    for stage in ALL_RAN:
        here, there = (json.loads(receipt_of(place, stage).read_text()) for place in (build, other))
        assert here["fingerprint"] == there["fingerprint"]
        assert here["outputs"] == there["outputs"]
        assert str(built_tree) not in json.dumps(here["fingerprint"])


def test_order_of_a_fingerprint_does_not_matter(built_tree: Path) -> None:
    build = built_tree / "build/embedded"
    for stage in ALL_RAN:
        receipt = json.loads(receipt_of(build, stage).read_text())
        receipt["fingerprint"] = dict(reversed(receipt["fingerprint"].items()))
        receipt_of(build, stage).write_text(json.dumps(receipt))
    assert cli("run", folder=built_tree).states == NOTHING_RAN


@contextmanager
def waiting_run(tree: Path, release: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that holds the build folder until `release` exists, which is made at the end."""
    command = [sys.executable, "-m", "pipeline", "run"]
    first = subprocess.Popen(command, cwd=tree, env=environment({"WAIT_FOR": str(release)}), stderr=subprocess.DEVNULL)
    written = tree / "build/embedded/.partial/join/joined.txt"
    try:
        give_up = time.monotonic() + 30
        while not written.exists():
            assert first.poll() is None and time.monotonic() < give_up
            time.sleep(0.02)
        yield first
    finally:
        release.touch()
        first.wait(30)


def test_second_run_at_once_is_refused_and_names_the_first(tree: Path, tmp_path: Path) -> None:
    with waiting_run(tree, tmp_path / "release") as first:
        second = cli("run", folder=tree)
        elsewhere = cli("run", "--build", tmp_path / "other", folder=tree)
    assert second.code == 2
    assert f"another run (process {first.pid}) is at work here; wait for it or stop it" in second.err
    assert elsewhere.code == 0
    assert first.returncode == 0
    assert cli("run", folder=tree).states == NOTHING_RAN


def stage(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Stage:
    return Stage(name=name, config=ReportConfig(), inputs=tuple(map(Path, inputs)), outputs=tuple(map(Path, outputs)))


def test_table_refuses_an_input_that_nobody_writes_before() -> None:
    later = [stage("reader", ("made",), ("read",)), stage("writer", (), ("made",))]
    with pytest.raises(InputError, match="stage reader: input made is written by no earlier stage"):
        check_table(later)
    check_table(later[::-1])


def test_table_refuses_an_output_written_twice() -> None:
    with pytest.raises(InputError, match="stages first and second both write made"):
        check_table([stage("first", (), ("made",)), stage("second", (), ("made",))])


def test_broken_table_is_bad_input(tree: Path) -> None:
    table = tree / "pipeline/stages.py"
    table.write_text(table.read_text().replace("inputs=(joined,)", 'inputs=(Path("typo.txt"),)'))
    ended = cli("run", folder=tree)
    assert ended.code == 2
    assert "input typo.txt is written by no earlier stage" in ended.err


def keys(tree: Path, *arguments: str) -> tuple[str, list[str]]:
    """The digest and the paths that the command prints."""
    digest, *paths = cli("key", *arguments, folder=tree).out.split()
    return digest, paths


def test_a_key_of_what_is_done_holds_its_content_and_not_its_making(built_tree: Path) -> None:
    """So that a stage whose input came out as before finds what was kept."""
    whole, given = keys(built_tree, "count"), keys(built_tree, "count", "--given", "join")
    assert given[1] == ["build/embedded/reports/count.json", "build/embedded/.receipts/count.json"]
    assert "build/embedded/.receipts/join.json" in whole[1] and whole[0] != given[0]
    (built_tree / "notes/b.txt").rename(built_tree / "notes/c.txt")  # another making, with the same outcome
    assert cli("run", "join", folder=built_tree).states == {"join": "ran"}
    assert keys(built_tree, "count", "--given", "join") == given
    assert keys(built_tree, "count")[0] != whole[0]
    (built_tree / "notes/c.txt").write_text("four")
    assert cli("run", "join", folder=built_tree).states == {"join": "ran"}
    assert keys(built_tree, "count", "--given", "join")[0] != given[0]


def test_what_serves_every_cpu_alike_is_kept_by_architecture_alone(built_tree: Path) -> None:
    """Runners of one kind differ in features; programs are for the family that they are compiled for."""
    receipts = {name: json.loads(receipt_of(built_tree / "build/embedded", name).read_text()) for name in ALL_RAN}
    found = {name: receipt["fingerprint"]["cpu"] for name, receipt in receipts.items()}
    assert found == {"join": family(), "count": platform.machine(), "apart": platform.machine()}
    other = next(known for known in COMPILER_FLAGS if known != family())
    compiled_for_it = cli("explain", "join", "--set", f"export.cpu={other}", folder=built_tree).out
    assert f"cpu was {family()}, is {other}" in compiled_for_it
