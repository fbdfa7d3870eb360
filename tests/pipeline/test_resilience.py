"""SIGKILL at ten random moments of fetching and quantizing; tests/resilience does the same to the whole pipeline."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from model.artifact import file_digest, files_below
from tests.conftest import ROOT, TINY, write_tiny_model
from tests.pipeline.conftest import cli, environment, from_folder

KILLS = 10
NOT_INSTANT = replace(TINY, layers=3, hidden=512, head_dim=128, mlp=1536)
"""Quantized in about as long as Python takes to import torch, so that many kills come while files are written."""


def digests(build: Path) -> dict[str, str]:
    """Every file that a stage has published."""
    names = [name for name in files_below(build) if name.parts[0] not in (".receipts", ".lock")]
    return {str(name): file_digest(build / name) for name in names}


def kill_after(seconds: float, command: list[str]) -> int:
    process = subprocess.Popen(command, cwd=ROOT, env=environment({}), stderr=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def test_killed_ten_times_the_build_has_the_same_bytes(tmp_path: Path) -> None:
    settings = from_folder(write_tiny_model(tmp_path / "model", NOT_INSTANT))
    undisturbed = ["run", "fetch", "quantize", "--force", "--build", str(tmp_path / "undisturbed"), *settings]
    assert cli(*undisturbed).code == 0  # also warms up, so that the next one takes as long as those that are killed
    start = time.monotonic()
    assert cli(*undisturbed).code == 0
    duration = time.monotonic() - start

    killed, moments = tmp_path / "killed", random.Random(20)
    stages = ["fetch", "quantize", "--force"]  # forced, so that finished work is torn down and killed again
    command = [sys.executable, "-m", "pipeline", "run", *stages, "--build", str(killed), *settings]
    codes = [kill_after(moments.uniform(0.2, duration), command) for _ in range(KILLS)]
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= KILLS // 2

    ended = cli("run", "quantize", "--build", killed, *settings)
    assert ended.code == 0, ended.err
    assert digests(killed) == digests(tmp_path / "undisturbed")
