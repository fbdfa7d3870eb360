"""The command line's exit codes and tables, over tiny stages."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.pipeline.conftest import cli


def test_failed_gate_exits_1_names_itself_and_stops(tree: Path) -> None:
    strict = ["--set", "savings.reply_tokens=2"]
    ended = cli("run", *strict, folder=tree)
    assert ended.code == 1
    assert ended.states == {"join": "ran", "count": "failed"}
    report = tree / "build/embedded/reports/count.json"
    assert "gate count failed: words 3 (at most 2)" in ended.err
    assert str(tree / "build/embedded/counted") in ended.err
    assert '"passed": false' in report.read_text()
    assert cli("explain", "count", *strict, folder=tree).out == "count would run:\n  its gate failed last time\n"
    assert cli("run", *strict, folder=tree).code == 1
    assert cli("run", folder=tree).code == 0


def test_failed_gate_withdraws_what_an_earlier_build_made_behind_it(tree: Path) -> None:
    stages, told = tree / "pipeline/stages.py", tree / "build/embedded/summary.md"
    row = (
        'Stage(name="tell", config=config.report, inputs=(Path("reports/count.json"),), outputs=(Path("summary.md"),)),'
    )
    last = 'outputs=(Path("copy.txt"),)),'
    stages.write_text(stages.read_text().replace(last, f"{last}\n        {row}"))
    copies = "import shutil\n\ndef run(config, report, output):\n    shutil.copyfile(report, output)\n"
    (tree / "pipeline/tell.py").write_text(f'"""Tells."""\n{copies}')
    assert cli("run", folder=tree).code == 0
    assert told.exists()
    assert cli("run", "--set", "savings.reply_tokens=2", folder=tree).code == 1
    assert not told.exists()
    assert cli("run", folder=tree).code == 0
    assert told.exists()


def test_defect_of_a_stage_exits_3_with_its_traceback(tree: Path) -> None:
    (tree / "pipeline/apart.py").write_text('"""Fails."""\n\ndef run(config, source, output):\n    {}["gone"]\n')
    ended = cli("run", folder=tree)
    assert ended.code == 3
    assert "KeyError: 'gone'" in ended.err
    assert "this is a defect of the pipeline" in ended.err
    assert cli("run", "count", folder=tree).states == {"join": "unchanged", "count": "unchanged"}


def test_interrupt_exits_130_and_keeps_finished_stages(tree: Path) -> None:
    assert cli("run", "apart", folder=tree).code == 0
    stopped = cli("run", folder=tree, STOP_IN="join")
    assert stopped.code == 130
    assert "finished stages are kept" in stopped.err
    assert cli("run", folder=tree).states == {"join": "ran", "count": "ran", "apart": "unchanged"}


def test_unknown_stage_is_bad_input_and_lists_the_stages(tree: Path) -> None:
    for command in ("run", "explain"):
        ended = cli(command, "cuont", folder=tree)
        assert ended.code == 2
        assert ended.err == "error: no stage 'cuont'; the stages are join, count, apart\n"


def test_missing_source_is_bad_input(tree: Path) -> None:
    (tree / "apart.txt").unlink()
    ended = cli("run", folder=tree)
    assert ended.code == 2
    assert "apart.txt: no such file or folder" in ended.err
    assert "Traceback" not in ended.err


def test_list_shows_what_every_stage_reads_and_writes(tree: Path) -> None:
    ended = cli("list", folder=tree)
    assert ended.code == 0
    for words in ("join", "Joins the notes.", "notes", "joined.txt", "counted", "reports/count.json", "copy.txt"):
        assert words in ended.out
    assert not (tree / "build").exists()


def test_status_says_where_every_stage_stands(tree: Path) -> None:
    assert cli("status", folder=tree).out.count("to run: it has not run yet") == 3
    assert cli("run", folder=tree).code == 0
    (tree / "apart.txt").write_text("edited")
    ended = cli("status", folder=tree)
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    assert "up to date" in lines["join"] and "up to date" in lines["count"]
    assert "to run: source apart.txt changed" in lines["apart"]


def test_data_goes_to_stdout_and_talk_to_stderr(tree: Path) -> None:
    ended = cli("run", folder=tree)
    assert ended.out == ""
    assert "join: Joins the notes." in ended.err


def test_settings_shows_every_field_with_what_it_may_be(tree: Path) -> None:
    ended = cli("settings", "--set", "savings.reply_tokens=7", folder=tree)
    assert ended.code == 0
    lines = [line.split(maxsplit=2) for line in ended.out.splitlines()]
    assert ["count.reply_tokens", "7", "a whole number of at least 1"] in [
        [part.strip() for part in line] for line in lines
    ]


def test_without_its_packages_it_says_how_to_get_them() -> None:
    """As a newcomer meets it who has run nothing yet; only the doctor is at work then."""
    bare = [sys.executable, "-S", "-m", "pipeline"]  # without site-packages
    refused = subprocess.run([*bare, "run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not installed: run make setup" in refused.stderr and "Traceback" not in refused.stderr
    examined = subprocess.run([*bare, "doctor"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Python" in examined.stdout and "Traceback" not in examined.stderr
