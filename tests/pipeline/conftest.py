"""What the pipeline's tests share: the command line in this process and in another, and a small tree of tiny stages."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.architecture import Architecture
from model.checkpoint import INDEX
from pipeline.command_line import main
from tests.conftest import ROOT, write_tiny_model

PATIENCE = 600.0
"""Seconds after which a test's subprocess counts as hung; compiling the embedder on a busy machine takes minutes."""


class Ended(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def states(self) -> dict[str, str]:
        """{stage: "ran" | "unchanged" | "failed"}, from the table that a run prints at its end."""
        rows = [line.split() for line in self.err.splitlines() if line[:1].strip()]
        return {row[0]: row[1] for row in rows if row[1:2] and row[1] in ("ran", "unchanged", "failed")}


Run = Callable[..., Ended]


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a command: one thread, no line breaks, none of the hub's settings or proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1", **extra}


def cli(*arguments: str | Path, folder: Path = ROOT, **extra: str) -> Ended:
    """Runs `python -m pipeline` in the tree at `folder`."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment(extra), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors on many threads mostly wait for each other, ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def one_core() -> Iterator[None]:
    """The same for stages that are run in this process, which take the cores that their table gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, so that slow imports are paid once."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return call


def from_folder(model: Path) -> list[str]:
    """The settings that make `fetch` read a folder, `tune` teach nothing, and `quantize` take no time to calibrate."""
    settings = [f"fetch.source=folder:{model}", "fetch.sha256=none", "tune.steps=0", "quantize.method=search"]
    return [part for setting in settings for part in ("--set", setting)]


SHARDS = 3


def write_sharded_model(folder: Path, architecture: Architecture) -> Path:
    """Three shards in the order of the network, which end within layers."""
    write_tiny_model(folder, architecture)
    tensors = load_file(folder / "model.safetensors")
    names = list(architecture.tensor_shapes())
    files: dict[str, str] = {}
    for number in range(SHARDS):
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        files |= dict.fromkeys(part, f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors")
    for file in set(files.values()):
        save_file({name: tensors[name] for name, of in files.items() if of == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


TINY_TREE = {
    "pipeline/stages.py": '''
"""A small data flow: notes are joined and counted; another stage stands apart."""
from pathlib import Path
from pipeline.configs import Config
from pipeline.stage import Stage

def table(config: Config) -> tuple[Stage, ...]:
    joined = Path("joined.txt")
    return (
        Stage(name="join", config=config.export, sources=(Path("notes"),), outputs=(joined,)),
        Stage(
            name="count",
            config=config.savings,
            inputs=(joined,),
            outputs=(Path("counted"), Path("reports/count.json")),
        ),
        Stage(name="apart", config=config.report, sources=(Path("apart.txt"),), outputs=(Path("copy.txt"),)),
    )
''',
    "pipeline/join.py": '''
"""Joins the notes."""
import os, signal, time
from pathlib import Path

def run(config, notes, output):
    from model.loud import loud
    output.write_text("half of it")
    while not Path(os.environ.get("WAIT_FOR", "/")).exists():
        time.sleep(0.02)
    if os.environ.get("DIE_IN") == "join":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("STOP_IN") == "join":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
    output.write_text(loud(" ".join(note.read_text() for note in sorted(notes.iterdir()))))
''',
    "pipeline/count.py": '''
"""Counts the words, of which there may be so many."""
from pipeline.verdict import Check, write_report

def run(config, joined, counted, report):
    words = joined.read_text().split()
    counted.mkdir()
    for index, word in enumerate(words):
        (counted / f"{index}.txt").write_text(word)
    checks = [Check(name="words", value=len(words), limit=config.reply_tokens, bound="at most")]
    write_report(report, "count", checks)
    return checks
''',
    "pipeline/apart.py": '''
"""Copies a file that no other stage reads."""
import shutil
from pipeline.configs import ReportConfig

def run(config: ReportConfig, source, output):
    shutil.copyfile(source, output)
''',
    "model/loud.py": "from model import mark\n\ndef loud(text):\n    return text.upper() + mark.MARK\n",
    "model/mark.py": 'MARK = "!"\n',
    "model/unused.py": "UNUSED = 1\n",
    "notes/a.txt": "one two",
    "notes/b.txt": "three",
    "apart.txt": "alone",
}


@pytest.fixture(scope="session")
def fresh_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fresh") / "tree"
    for package in ("pipeline", "model"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in TINY_TREE.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(scope="session")
def finished_tree(fresh_tree: Path) -> Path:
    root = shutil.copytree(fresh_tree, fresh_tree.parent / "finished")
    assert cli("run", folder=root).code == 0
    return root


@pytest.fixture
def tree(fresh_tree: Path, tmp_path: Path) -> Path:
    """The real command line and stage runner over `TINY_TREE`'s stages; run it with `cli(…, folder=tree)`."""
    return shutil.copytree(fresh_tree, tmp_path / "tree")


@pytest.fixture
def built_tree(finished_tree: Path, tmp_path: Path) -> Path:
    """The same with a finished build in build/embedded."""
    return shutil.copytree(finished_tree, tmp_path / "tree")
