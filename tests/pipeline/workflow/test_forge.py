"""What workflows ask of GitHub, against a small server that keeps issues and lists artifacts as GitHub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from model.errors import InputError
from pipeline.workflow import find_artifact
from pipeline.workflow.forge import Repository

TOKEN = "token"
PATH = "/repos/oz/emerald/issues"
OURS, THEIRS = 1, 2
"""Repositories: the one whose workflows run, and a fork."""


class Forge(ThreadingHTTPServer):
    """Issues, their comments, and artifacts; `status` makes it fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.issues: list[dict[str, Any]] = []
        self.comments: list[str] = []
        self.artifacts: list[dict[str, Any]] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def keep(self, name: str, run: int, *, by: int = OURS, expired: bool = False) -> None:
        """An artifact, as GitHub describes it."""
        made_by = {"id": run, "repository_id": OURS, "head_repository_id": by}
        made = {"name": name, "created_at": f"2026-01-{run:02}T00:00:00Z", "expired": expired, "workflow_run": made_by}
        self.artifacts.append(made)


class Handler(BaseHTTPRequestHandler):
    server: Forge

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return content

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        if asked.path == "/repos/oz/emerald/actions/artifacts":
            self.answer({"artifacts": [kept for kept in self.server.artifacts if kept["name"] == query["name"]]})
            return
        assert asked.path == PATH
        label, state = query["labels"], query["state"]
        self.answer([issue for issue in self.server.issues if label in issue["labels"] and issue["state"] == state])

    def do_POST(self) -> None:
        body = self.body()
        if self.path == PATH:
            number = len(self.server.issues) + 1
            issue = {**body, "number": number, "state": "open", "html_url": f"issue {number}"}
            self.server.issues.append(issue)
            self.answer(issue)
        else:
            assert self.path == f"{PATH}/{len(self.server.issues)}/comments"
            self.server.comments.append(body["body"])
            self.answer({})

    def do_PATCH(self) -> None:
        number = int(self.path.rpartition("/")[2])
        self.server.issues[number - 1] |= self.body()
        self.answer(self.server.issues[number - 1])


@pytest.fixture
def forge() -> Iterator[Forge]:
    server = Forge()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
    assert repository.keeper("weights-1") is None
    for run in (3, 5, 4):
        forge.keep("weights-1", run)
    forge.keep("weights-2", 6)
    assert repository.keeper("weights-1") == 5


def test_an_artifact_of_a_fork_or_that_has_expired_is_not_taken(forge: Forge, repository: Repository) -> None:
    forge.keep("weights-1", 3)
    forge.keep("weights-1", 4, expired=True)
    forge.keep("weights-1", 5, by=THEIRS)
    assert repository.keeper("weights-1") == 3


def test_a_job_that_may_not_read_artifacts_learns_which_permission_it_needs(
    forge: Forge, repository: Repository
) -> None:
    forge.status = 403
    with pytest.raises(InputError, match="permissions: actions: read"):
        repository.keeper("weights-1")


@pytest.fixture
def of_this_run(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "GITHUB_API_URL": forge.url,
        "GITHUB_REPOSITORY": "oz/emerald",
        "GITHUB_TOKEN": TOKEN,
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("of_this_run")
def test_a_step_learns_which_run_keeps_its_artifact(
    forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    command = ["weights-1", "--github-output", str(output)]
    assert find_artifact.main(command) == 0
    assert not output.exists()
    assert find_artifact.main([*command, "--required"]) == 2
    assert "no run keeps weights-1 any longer" in capsys.readouterr().err
    forge.keep("weights-1", 7)
    assert find_artifact.main([*command, "--required"]) == 0
    assert output.read_text() == "run=7\n"
