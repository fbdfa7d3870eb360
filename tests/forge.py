"""A forge for the tests: keeps issues with their comments, and lists artifacts and workflows, as GitHub's REST
interface does.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.conftest import ROOT

TOKEN = "token-of-the-run"
OURS, THEIRS = 1, 2
"""Repositories: the one whose workflows run, and a fork."""
OWNER = 77
"""Number of whoever owns them."""
Described = dict[str, Any]
"""An issue or an artifact, as the interface gives it."""


class Forge(ThreadingHTTPServer):
    """Whatever the repository is called; a `status` other than 200 makes it refuse, and each of `faults` does once."""

    def __init__(
        self, artifacts: Callable[[], list[Described]], issues: list[Described], *, private: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private = private
        self.artifacts = artifacts
        self.issues = issues
        self.comments: list[str] = []
        self.status = 200
        self.faults: list[int] = []

    @property
    def url(self) -> str:
        """What workflows know as GITHUB_API_URL."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def forge_served(
    artifacts: Callable[[], list[Described]] = list, issues: list[Described] | None = None, *, private: bool = False
) -> Iterator[Forge]:
    """Serves until the block ends; `issues` are those of before, and get what is reported."""
    with Forge(artifacts, [] if issues is None else issues, private=private) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def artifact(name: str, run: int, *, by: int = OURS, branch: str = "main", expired: bool = False) -> Described:
    """As GitHub describes it: kept by the run of that number, later ones later."""
    return {
        "name": name,
        "created_at": f"{datetime(2026, 1, 1) + timedelta(seconds=run):%Y-%m-%dT%H:%M:%SZ}",
        "expired": expired,
        "workflow_run": {"id": run, "repository_id": OURS, "head_repository_id": by, "head_branch": branch},
    }


class _Handler(BaseHTTPRequestHandler):
    server: Forge

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        if not self._admitted():
            return
        if self._is(""):
            owner, name = urlsplit(self.path).path.split("/")[2:]
            facts = {"private": self.server.private, "has_issues": True, "archived": False, "disabled": False}
            names = {"name": name, "full_name": f"{owner}/{name}", "owner": {"login": owner, "id": OWNER}}
            self._answer({"id": OURS, **names, **facts})
        elif self._is("actions/workflows"):
            files = sorted((ROOT / ".github/workflows").glob("*.yml"))
            listed = [{"name": one.stem, "path": str(one.relative_to(ROOT)), "state": "active"} for one in files]
            self._answer({"workflows": listed})
        elif self._is("actions/artifacts"):
            self._answer({"artifacts": [kept for kept in self.server.artifacts() if kept["name"] == query["name"]]})
        else:
            assert self._is("issues")
            label, state = query["labels"], query["state"]
            issues = self.server.issues
            self._answer([issue for issue in issues if label in issue["labels"] and issue["state"] == state])

    def do_POST(self) -> None:
        body = self._body()
        if not self._admitted():
            return
        if self._is("issues"):
            number = len(self.server.issues) + 1
            issue = {**body, "number": number, "state": "open", "html_url": f"issue {number}"}
            self.server.issues.append(issue)
            self._answer(issue)
        else:
            assert self._is(f"issues/{len(self.server.issues)}/comments")
            self.server.comments.append(body["body"])
            self._answer({})

    def do_PATCH(self) -> None:
        body = self._body()
        if self._admitted():
            number = int(self.path.rpartition("/")[2])
            assert self._is(f"issues/{number}")
            self.server.issues[number - 1] |= body
            self._answer(self.server.issues[number - 1])

    def _is(self, place: str) -> bool:
        """Whether this place of a repository is asked for."""
        return re.fullmatch(rf"/repos/[^/]+/[^/]+/{place}".rstrip("/"), urlsplit(self.path).path) is not None

    def _admitted(self) -> bool:
        status = self.server.status if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401
        if self.server.faults:
            status = self.server.faults.pop(0)
        if status != 200:
            self._answer({"message": "refused"}, status)
        return status == 200

    def _body(self) -> Described:
        content: Described = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return content

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
