"""A full disk, which here is a small tmpfs in a mount namespace of our own: said plainly, and nothing finished is lost.

Needs a kernel that lets us make user and mount namespaces, as on GitHub's runners for root.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, write_tiny_model
from tests.hub import OPEN, REVISION, serving
from tests.pipeline.conftest import PATIENCE, Ended, environment, from_folder, write_sharded_model

WIDE = replace(TINY, hidden=512, head_dim=128, mlp=1024)
"""About 11 MB as bf16 and 4 MB quantized."""

NAMESPACE = ["unshare", "--mount", "--map-root-user"]
allowed = shutil.which("unshare") is not None and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0
pytestmark = pytest.mark.skipif(not allowed, reason="this machine allows no mount namespaces")

SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
shift 2
if [ -n "$FILL" ]; then head -c "$FILL" /dev/zero > "$DISK/filler" 2> /dev/null; fi
"$@"; echo "ended with $?" >&2
mount -o remount,size=64m "$DISK" || exit 99
rm -f "$DISK/filler"
"$@"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "wide", WIDE)


def run_short_of_space(source: list[str], disk: Path, size: str, **extra: str) -> tuple[Ended, Ended]:
    """A run on a disk of that size, and the same command once more with room."""
    disk.mkdir()
    pipeline = [sys.executable, "-m", "pipeline", "run", "quantize", "--build", str(disk / "build")]
    command = [*NAMESPACE, "sh", "-c", SCRIPT, "sh", size, str(disk), *pipeline, *source]
    settings = environment({"DISK": str(disk), "FILL": "", **extra})
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    before, ended, after = done.stderr.partition("ended with ")
    assert ended, done.stderr
    code, _, after = after.partition("\n")
    return Ended(int(code), "", before), Ended(done.returncode, done.stdout, after)


def require_plain_words(ended: Ended, disk: Path) -> None:
    assert ended.code == 2
    assert f"error: no space left on the disk of {disk}" in ended.err
    assert "free some and run again; finished stages are kept" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("size", "stopped_in", "kept"),
    [("1m", "fetch", "ran"), ("13m", "quantize", "unchanged")],
)
def test_disk_that_fills_up(model: Path, tmp_path: Path, size: str, stopped_in: str, kept: str) -> None:
    disk = tmp_path / "disk"
    short, roomy = run_short_of_space(from_folder(model), disk, size)
    require_plain_words(short, disk)
    assert (stopped_in == "quantize") == ("quantize: " in short.err)
    assert roomy.code == 0
    assert roomy.states == {"fetch": kept, "tune": kept, "quantize": "ran"}


def test_disk_that_is_full_from_the_start(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    short, roomy = run_short_of_space(from_folder(model), disk, "1m", FILL="2m")
    require_plain_words(short, disk)
    assert roomy.code == 0
    assert roomy.states == {"fetch": "ran", "tune": "ran", "quantize": "ran"}


def test_disk_that_fills_up_while_a_shard_is_downloaded(tmp_path: Path) -> None:
    disk, shards = tmp_path / "disk", write_sharded_model(tmp_path / "served", replace(WIDE, layers=4))
    largest = max(file.stat().st_size for file in shards.glob("*.safetensors"))
    with serving(shards) as hub:
        source = ["--set", f"fetch.source=hub:{OPEN}@{REVISION}", "--set", "fetch.streamed=true"]
        others = ("fetch.sha256=none", "tune.steps=0", "quantize.method=search")
        settings = [*source, *(part for one in others for part in ("--set", one))]
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        short, roomy = run_short_of_space(settings, disk, f"{largest * 3 // 4 >> 10}k", **place)
    require_plain_words(short, disk)
    assert "from the hub" in short.err
    assert roomy.code == 0
    assert roomy.states == {"fetch": "unchanged", "tune": "unchanged", "quantize": "ran"}
