"""What workflows ask of GitHub beyond running: who keeps an artifact, and one issue for one trouble."""

import os
import re
from collections.abc import Collection
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from model.errors import InputError

SECONDS = 30.0
"""How long GitHub may take to answer."""
ARTIFACTS = "`permissions: actions: read`"
ISSUES = "`permissions: issues: write`, and the repository must have issues switched on"
PRIVATE = "GITHUB_TOKEN, if the repository is private, and its name as OWNER/NAME"
"""What a job needs for its requests."""


class Repository:
    """The repository whose workflow this is, through GitHub's REST interface."""

    def __init__(self, url: str, name: str, token: str) -> None:
        self._url = f"{url}/repos/{name}"
        self._session = requests.Session()
        again = Retry(total=3, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504), raise_on_status=False)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=again))
        self._session.headers.update({
            "Accept": "application/vnd.github+json",
            "X-GitHub-Api-Version": "2022-11-28",
            **({"Authorization": f"Bearer {token}"} if token else {}),
        })  # fmt: skip

    @classmethod
    def of_this_run(cls) -> "Repository":
        """From what GitHub Actions sets. Raises InputError elsewhere, and without a token."""
        missing = [name for name in ("GITHUB_REPOSITORY", "GITHUB_TOKEN") if not os.environ.get(name)]
        if missing:
            raise InputError(f"{missing[0]} is not set: in a workflow, pass `GITHUB_TOKEN: ${{{{ github.token }}}}`")
        return cls(_api(), os.environ["GITHUB_REPOSITORY"], os.environ["GITHUB_TOKEN"])

    @classmethod
    def named(cls, name: str) -> "Repository":
        """Any repository, as OWNER/NAME; with GITHUB_TOKEN if it is set. Raises InputError for another form."""
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise InputError(f"{name!r} is no repository: give OWNER/NAME, as in its address")
        return cls(_api(), name, os.environ.get("GITHUB_TOKEN", ""))

    def description(self) -> dict[str, Any]:
        """What GitHub says of it: its number, its owner, whether it is private."""
        found: dict[str, Any] = self._call("GET", self._url, PRIVATE)
        return found

    def keeper(self, artifact: str, branches: Collection[str]) -> int | None:
        """The run that keeps the newest artifact of that name, or None; only of these branches of this repository.

        Pull requests, a fork's and a robot's among them, run here too, and may keep what they like under any name.
        """
        named = {"name": artifact, "per_page": "100"}
        found = self._call("GET", f"{self._url}/actions/artifacts", ARTIFACTS, params=named)
        for kept in sorted(found["artifacts"], key=lambda one: one["created_at"] or "", reverse=True):
            run = kept["workflow_run"]
            ours = run and run["head_repository_id"] == run["repository_id"] and run["head_branch"] in branches
            if ours and not kept["expired"]:
                return int(run["id"])
        return None

    def tell(self, label: str, title: str, trouble: str | None) -> str:
        """Opens, renews or closes the one issue of that label; `trouble` is None when all is well. Says what it did.

        The label finds it again: a trouble that lasts a month is one issue, with a comment for every day on which
        something about it changed, and not thirty issues.
        """
        issues = f"{self._url}/issues"
        found = self._call("GET", issues, ISSUES, params={"labels": label, "state": "open"})
        known = next((issue for issue in found if "pull_request" not in issue), None)
        if trouble is None and known is None:
            return "all is well, and no issue is open"
        if known is None:
            made = self._call("POST", issues, ISSUES, {"title": title, "body": trouble, "labels": [label]})
            return f"opened {made['html_url']}"
        place = f"{issues}/{known['number']}"
        if trouble is None:
            self._call("POST", f"{place}/comments", ISSUES, {"body": "All is well again."})
            self._call("PATCH", place, ISSUES, {"state": "closed", "state_reason": "completed"})
            return f"closed {known['html_url']}"
        if known["body"] == trouble:
            return f"{known['html_url']} says it already"
        self._call("PATCH", place, ISSUES, {"title": title, "body": trouble})
        self._call("POST", f"{place}/comments", ISSUES, {"body": trouble})
        return f"renewed {known['html_url']}"

    def _call(
        self, method: str, url: str, needs: str, body: object = None, params: dict[str, str] | None = None
    ) -> Any:
        try:
            answer = self._session.request(method, url, json=body, params=params, timeout=SECONDS)
        except requests.RequestException as fault:
            raise InputError(f"GitHub cannot be reached at {url} ({type(fault).__name__}): run again later") from fault
        if answer.status_code in (401, 403, 404, 410):
            raise InputError(f"GitHub refuses {method} {url} with {answer.status_code}: the job needs {needs}")
        if not answer.ok:
            raise InputError(f"GitHub answers {method} {url} with {answer.status_code}: run again later")
        return answer.json()


def _api() -> str:
    return os.environ.get("GITHUB_API_URL", "https://api.github.com")
