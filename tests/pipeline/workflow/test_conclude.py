"""The aggregator of the pipeline workflow: red unless every job did what was planned."""

import json
from typing import Any

import pytest

from pipeline.workflow.conclude import main, shortfalls

DIGEST = "sha256:" + 64 * "a"
OTHER = "sha256:" + 64 * "b"


def needs(push: str = "true", **digests: str) -> dict[str, dict[str, Any]]:
    image = {"pushed": DIGEST, "verified": DIGEST, "promoted": DIGEST, **digests} if push == "true" else digests
    jobs = {name: {"result": "success", "outputs": {}} for name in ("doctor", "weights", "cache", "gates")}
    return {
        "plan": {"result": "success", "outputs": {"push": push}},
        **jobs,
        "image": {"result": "success", "outputs": image},
    }


@pytest.mark.parametrize("push", ["true", "false"])
def test_all_as_planned(push: str) -> None:
    assert shortfalls(needs(push)) == []


@pytest.mark.parametrize("job", ["doctor", "plan", "weights", "cache", "gates", "image"])
@pytest.mark.parametrize("result", ["failure", "cancelled", "skipped"])
def test_any_other_end_of_any_job_is_red(job: str, result: str) -> None:
    found = needs()
    found[job]["result"] = result
    assert shortfalls(found) == [f"job {job}: {result}"]


def test_a_job_that_is_no_longer_waited_for_is_red() -> None:
    found = needs()
    del found["gates"]
    assert shortfalls(found) == ["job gates: this workflow no longer waits for it"]


@pytest.mark.parametrize("step", ["pushed", "verified", "promoted"])
@pytest.mark.parametrize("digest", [OTHER, ""])
def test_what_is_pushed_verified_and_promoted_must_be_one_digest(step: str, digest: str) -> None:
    assert "not one digest" in shortfalls(needs(**{step: digest}))[0]


def test_a_newer_runs_image_may_stay_promoted() -> None:
    assert shortfalls(needs(promoted=OTHER, superseded="true")) == []
    assert "not one digest" in shortfalls(needs(promoted="", superseded="true"))[0]
    assert "not one digest" in shortfalls(needs(verified=OTHER, promoted=OTHER, superseded="true"))[0]


def test_a_push_that_was_planned_and_skipped_is_red() -> None:
    assert shortfalls(needs(pushed="", verified="", promoted=""))


def test_a_push_that_was_not_planned_is_red() -> None:
    assert shortfalls(needs("false", pushed=DIGEST)) == [f"job image: nothing was to be pushed, and {DIGEST} was"]


@pytest.mark.parametrize("push", ["", "True", None])
def test_a_plan_that_says_nothing_is_red(push: str | None) -> None:
    found = needs("false")
    found["plan"]["outputs"] = {"push": push}
    assert shortfalls(found)


def test_exit_code_and_annotations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEEDS", json.dumps(needs()))
    assert main() == 0
    assert f"{DIGEST} is promoted" in capsys.readouterr().out
    found = needs()
    found["gates"]["result"] = "cancelled"
    monkeypatch.setenv("NEEDS", json.dumps(found))
    assert main() == 1
    assert "::error::job gates: cancelled" in capsys.readouterr().out
