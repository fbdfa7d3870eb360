"""SIGKILL at ten random moments of the whole embedded pipeline: it always finishes, with byte-identical artifacts."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from model.artifact import file_digest, files_below
from tests.conftest import ROOT

KILLS = 10
SETTINGS = (
    "quantize.method=search",  # GPTQ takes longer than a run is left alive, and no later stage would be killed
    "gate_quality.kl_mean_max=1",
    "gate_quality.same_top1_min=0.5",
    "gate_quality.perplexity_ratio_max=2",
    "gate_replies.openings=4",  # of weights that were rounded so, and few: an interval of few replies is wide
    "gate_replies.visits=1",
    "gate_replies.float_openings=2",
    "gate_replies.sealed=2",
    *(f"gate_replies.{name}_max=1" for name in ("loops", "cut", "other_faults", "foreign_names")),
    *(f"gate_replies.{name}_min=0" for name in ("choices", "second_person", "length", "taken_up", "nobody_unmet")),
    "gate_replies.distinct3_min=0",
    "gate_replies.perplexity_max=1000",
    "gate_replies.perplexity_ratio_max=2",
    "gate_replies.worse_than_float_max=12",
    "train_embedder.steps=2",  # an embedder that has learnt nothing yet, which no certificate is asked of
    "certify_cache.required=false",
    "certify_cache.recall_min=0",
    "certify_cache.out_of_domain_rejected_min=0",
)
ARTIFACTS = ("checkpoint", "tuned", "int4", "engine", "trained", "embedder", "cache")


def digests(build: Path) -> dict[str, str]:
    """SHA-256 of every file of every artifact; reports hold timings and differ."""
    files = [Path(artifact) / name for artifact in ARTIFACTS for name in files_below(build / artifact)]
    return {str(file): file_digest(build / file) for file in [*files, Path("certificate.json")]}


def test_a_pipeline_killed_ten_times_builds_the_same_bytes(tmp_path: Path) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command, undisturbed = [sys.executable, "-m", "pipeline", "run", *settings, "--build"], tmp_path / "undisturbed"
    subprocess.run([*command, str(undisturbed)], cwd=ROOT, check=True)
    killed, moments = tmp_path / "killed", random.Random(7)
    for kill in range(KILLS):
        process = subprocess.Popen([*command, str(killed)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=moments.uniform(0.5, 25.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), f"run {kill} ended by itself with {process.returncode}"
    subprocess.run([*command, str(killed)], cwd=ROOT, check=True)
    assert digests(killed) == digests(undisturbed)
    shutil.rmtree(tmp_path)
