"""What workflows ask of GitHub, against a server that keeps issues and lists artifacts as GitHub does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import InputError
from pipeline.workflow import find_artifact
from pipeline.workflow.forge import Repository
from tests.forge import THEIRS, TOKEN, Forge, artifact, forge_served

MAIN = {"main"}


@pytest.fixture
def forge() -> Iterator[Forge]:
    with forge_served() as server:
        yield server


@pytest.fixture
def repository(forge: Forge) -> Repository:
    return Repository(forge.url, "oz/emerald", TOKEN)


def test_a_trouble_is_one_issue_from_its_beginning_to_its_end(forge: Forge, repository: Repository) -> None:
    assert repository.tell("canary", "The canary", None) == "all is well, and no issue is open"
    assert repository.tell("canary", "The canary", "slow") == "opened issue 1"
    assert repository.tell("canary", "The canary", "slow") == "issue 1 says it already"
    assert repository.tell("canary", "The canary", "slow and wrong") == "renewed issue 1"
    assert [(issue["body"], issue["labels"]) for issue in forge.issues] == [("slow and wrong", ["canary"])]
    assert repository.tell("canary", "The canary", None) == "closed issue 1"
    assert forge.issues[0]["state"] == "closed"
    assert forge.comments == ["slow and wrong", "All is well again."]
    assert repository.tell("canary", "The canary", "slow") == "opened issue 2"


def test_a_pull_request_of_that_label_is_no_issue(forge: Forge, repository: Repository) -> None:
    forge.issues.append({"number": 1, "labels": ["canary"], "state": "open", "pull_request": {}, "body": "slow"})
    assert repository.tell("canary", "The canary", "slow") == "opened issue 2"


@pytest.mark.parametrize(("status", "remedy"), [(403, "issues: write"), (404, "issues: write"), (502, "run again")])
def test_a_refusal_says_what_to_do(forge: Forge, repository: Repository, status: int, remedy: str) -> None:
    forge.status = status
    with pytest.raises(InputError, match=remedy):
        repository.tell("canary", "The canary", "slow")


def test_a_forge_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot be reached at http://127\.0\.0\.1:9/"):
        Repository("http://127.0.0.1:9", "oz/emerald", TOKEN).tell("canary", "The canary", None)


def test_outside_a_workflow_the_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    monkeypatch.setenv("GITHUB_REPOSITORY", "oz/emerald")
    with pytest.raises(InputError, match="GITHUB_TOKEN is not set"):
        Repository.of_this_run()


def test_the_newest_artifact_of_a_name_is_found(forge: Forge, repository: Repository) -> None:
    assert repository.keeper("weights-1", MAIN) is None
    forge.artifacts = lambda: [*(artifact("weights-1", run) for run in (3, 500, 4)), artifact("weights-2", 600)]
    assert repository.keeper("weights-1", MAIN) == 500


def test_what_a_pull_request_has_left_is_not_taken(forge: Forge, repository: Repository) -> None:
    forge.artifacts = lambda: [
        artifact("weights-1", 3),
        artifact("weights-1", 4, expired=True),
        artifact("weights-1", 5, by=THEIRS),
        artifact("weights-1", 6, branch="robot/newer-action"),
        {**artifact("weights-1", 7), "workflow_run": None},
    ]
    assert repository.keeper("weights-1", MAIN) == 3
    assert repository.keeper("weights-1", {*MAIN, "robot/newer-action"}) == 6


def test_a_forge_that_stumbles_is_asked_again(forge: Forge, repository: Repository) -> None:
    forge.artifacts = lambda: [artifact("weights-1", 3)]
    forge.faults = [502, 503]
    assert repository.keeper("weights-1", MAIN) == 3
    assert forge.faults == []


def test_a_job_that_may_not_read_artifacts_learns_which_permission_it_needs(
    forge: Forge, repository: Repository
) -> None:
    forge.status = 403
    with pytest.raises(InputError, match="permissions: actions: read"):
        repository.keeper("weights-1", MAIN)


def test_a_step_learns_which_run_keeps_its_artifact(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("API_URL", forge.url), ("REPOSITORY", "oz/emerald"), ("TOKEN", TOKEN), ("REF_NAME", "work")):
        monkeypatch.setenv(f"GITHUB_{name}", value)
    output = tmp_path / "output"
    command = ["weights-1", "--github-output", str(output)]
    assert find_artifact.main(command) == 0
    assert not output.exists()
    assert find_artifact.main([*command, "--required"]) == 2
    assert "no run keeps weights-1: run the workflow pipeline" in capsys.readouterr().err
    forge.artifacts = lambda: [
        artifact("weights-1", 6),
        artifact("weights-1", 7, branch="work"),
        artifact("weights-1", 8, branch="other"),
    ]
    assert find_artifact.main([*command, "--required"]) == 0
    assert output.read_text() == "run=7\n"
