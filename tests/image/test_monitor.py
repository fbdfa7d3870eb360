"""The canary: what a tag names today is pulled and judged, and found out when it is slower than when it was built."""

import json
from pathlib import Path

import pytest
from docker.models.images import Image

from pipeline import monitor
from tests.image.conftest import EMULATED, Registry, image_cli
from tests.image.test_image import Change, failed

FASTER = """USER 0
RUN sed -i 's/"decode_tokens_per_s": /"decode_tokens_per_s": 1000/' /emerald/build/reports/latency.json
USER 10001:10001"""
"""What the latency gate says of itself, ten thousand times as fast as it was, or more."""


@pytest.mark.skipif(EMULATED != [], reason="the canary runs on the architecture of its image")
def test_what_a_tag_names_is_pulled_and_compared_with_its_gate(
    image: Image, changed: Change, registry: Registry, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report, summary = tmp_path / "canary.json", tmp_path / "summary.md"
    for tag, pushed, code in (("sound", image, monitor.DONE), ("slow", changed(FASTER), monitor.FAILED)):
        promoted = image_cli("push", str(pushed.id), registry.repository, "--as", tag)
        assert promoted.code == 0, promoted.err
        name = f"{registry.repository}:{tag}"
        assert monitor.main(["check", name, "--report", str(report), "--summary", str(summary)]) == code
        assert json.loads(report.read_text())["digest"] == promoted.out
        said = summary.read_text()
        assert f"`{name}` is `{promoted.out}`" in said
    assert "checks passed" in said
    assert failed(report) == {"decode speed, share of its gate's"}
    assert "when it was built" in said
    assert monitor.main(["check", f"{registry.repository}:none", "--report", str(report)]) == monitor.BAD_INPUT
    assert "has no such tag" in capfd.readouterr().err
