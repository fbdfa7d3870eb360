"""The canary: what a tag names today is pulled and judged, and found out when it is slower than when it was built."""

import json
from pathlib import Path

import pytest
from docker.models.images import Image

from tests.image.conftest import EMULATED, image_cli, registry_at, run_module
from tests.image.test_image import Change, failed

FASTER = """USER 0
RUN sed -i 's/"decode_tokens_per_s": /"decode_tokens_per_s": 1000/' /emerald/build/reports/latency.json
USER 10001:10001"""
"""What the latency gate says of itself, ten thousand times as fast as it was, or more."""


@pytest.mark.skipif(EMULATED != [], reason="the canary runs on the architecture of its image")
def test_what_a_tag_names_is_pulled_and_compared_with_its_gate(image: Image, changed: Change, tmp_path: Path) -> None:
    report, summary = tmp_path / "canary.json", tmp_path / "summary.md"
    with registry_at(tmp_path, password=False) as registry:
        for tag, pushed, code in (("sound", image, 0), ("slow", changed(FASTER), 1)):
            candidate = image_cli("push", str(pushed.id), registry.repository, "--as", tag)
            assert candidate.code == 0, candidate.err
            name = f"{registry.repository}:{tag}"
            ended = run_module("pipeline.workflow.monitor", "check", name, "--report", report, "--summary", summary)
            assert ended.code == code
            assert json.loads(report.read_text())["digest"] == candidate.out
            assert f"`{name}` is `{candidate.out}`" in summary.read_text()
        assert "checks passed" in summary.read_text()
        assert "when it was built" in summary.read_text()
        assert failed(report) == {"decode speed, share of its gate's"}
        ended = run_module("pipeline.workflow.monitor", "check", f"{registry.repository}:none", "--report", report)
    assert (ended.code, "Nothing was promoted" in ended.err) == (0, True)
    assert failed(report) == set()
