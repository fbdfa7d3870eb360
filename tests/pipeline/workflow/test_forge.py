"""One issue for one trouble, against a small server that keeps issues as GitHub does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from model.errors import InputError
from pipeline.workflow.forge import Repository

TOKEN = "token"
PATH = "/repos/oz/emerald/issues"


class Forge(ThreadingHTTPServer):
    """Issues and their comments; `status` makes it fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.issues: list[dict[str, Any]] = []
        self.comments: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


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
        assert asked.path == PATH
        label, state = (parse_qs(asked.query)[name][0] for name in ("labels", "state"))
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
