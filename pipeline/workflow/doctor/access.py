"""What GitHub, the registry and the model hub let this build do, asked with the credentials that it would use.

A server that does not answer is a warning: the check says that it was not made, and the build may do without it. No
answer and no error ever shows a token.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipeline.configs import Config
from pipeline.install import ROOT
from pipeline.workflow.doctor.findings import Finding, error, ok, warning
from pipeline.workflow.doctor.variables import HUB, PAGE, Environment, image_of

SECONDS = 10.0
"""How long a server may take to answer."""
RETRY = "check the network, and run again"
HUB_LOGIN, HUB_REGISTRY = "index.docker.io", "https://registry-1.docker.io"
"""Docker Hub has one name in images, one in `docker login`'s file, and one for its registry."""
SOURCE = re.compile(r"hub:([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
REASONS = {
    "disabled_fork": "GitHub switches scheduled workflows off in a new fork",
    "disabled_inactivity": "GitHub switches scheduled workflows off after 60 days without activity",
    "disabled_manually": "somebody switched it off",
}


class UncheckedError(Exception):
    """Why something could not be looked at, and what to do about it."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


class Answer(NamedTuple):
    """What a server says, refusals included."""

    status: int
    headers: Message
    content: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object that it holds. Raises UncheckedError if it holds none, such as the page of a proxy."""
        try:
            found = json.loads(self.content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UncheckedError("the answer is no JSON object", "see whether a proxy answers for the server")
        return found


class _SameServer(HTTPRedirectHandler):
    """Takes credentials along to another address of the same server, such as a repository's new name, not beyond."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            following.remove_header("Authorization")
        return following


def ask(url: str, authorization: str = "", method: str = "GET") -> Answer:
    """One request. Raises UncheckedError if no answer comes."""
    if not url.startswith(("http://", "https://")):
        raise UncheckedError(f"{url!r} is no address of a server", "write it with https://")
    place = urlsplit(url).netloc
    headers = {"User-Agent": "emerald-doctor", "Accept": "application/json"}
    if authorization:
        headers["Authorization"] = authorization
    try:
        return _answered(Request(url, headers=headers, method=method))
    except URLError as fault:
        raise UncheckedError(f"{place} cannot be reached ({fault.reason})", RETRY) from fault
    except (OSError, HTTPException, ValueError) as fault:  # their words may hold a header, and so a token
        raise UncheckedError(f"{place} gives no answer ({type(fault).__name__})", RETRY) from fault


def _answered(request: Request) -> Answer:
    try:
        with build_opener(_SameServer).open(request, timeout=SECONDS) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except HTTPError as refusal:
        with refusal:
            return Answer(refusal.code, refusal.headers, refusal.read())


def tried(thing: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds; a warning if it could not be made."""
    try:
        return list(check())
    except UncheckedError as fault:
        return [warning(thing, f"not checked: {fault}", fault.remedy)]


def fork(environment: Environment) -> list[Finding]:
    """What GitHub says about the repository; nothing outside a workflow, where there is no token."""
    name, token = environment.get("GITHUB_REPOSITORY"), environment.get("GITHUB_TOKEN")
    if not name or not token:
        return []
    url = f"{environment.get('GITHUB_API_URL') or 'https://api.github.com'}/repos/{name}"
    return [
        *tried("repository", lambda: _settings(_github(url, token, "contents"))),
        *tried("workflows", lambda: _workflows(_github(f"{url}/actions/workflows?per_page=100", token, "actions"))),
    ]


def _github(url: str, token: str, permission: str) -> dict[str, Any]:
    answer = ask(url, f"Bearer {token}")
    if answer.status in (401, 403, 404):
        raise UncheckedError(f"GitHub answers {answer.status}", f"give the job `permissions: {permission}: read`")
    if answer.status != 200:
        raise UncheckedError(f"GitHub answers {answer.status}", RETRY)
    return answer.fields


def _settings(described: Mapping[str, Any]) -> Iterator[Finding]:
    """Settings of the repository that some workflow depends on."""
    name = described.get("full_name")
    thing, visible = f"repository {name}", "private" if described.get("private") else "public"
    if described.get("archived"):
        yield error(thing, "it is archived", "nothing runs in it: Settings, General, Unarchive this repository")
    if described.get("disabled"):
        yield error(thing, "GitHub has disabled it", "nothing runs in it: ask GitHub's support why")
    if described.get("has_issues") is False:
        remedy = "the workflow monitor tells trouble in an issue: Settings, General, Features, Issues"
        yield warning(thing, "issues are switched off", remedy)
    if described.get("private"):
        yield warning(
            thing,
            "it is private",
            "attestations are off, which take GitHub Enterprise Cloud (variable EMERALD_ATTEST); keyless signing is "
            "off, which publishes the repository's name (EMERALD_SIGN); the account's plan limits stored artifacts",
        )
    yield ok(thing, f"found, {visible}")


def _workflows(described: Mapping[str, Any]) -> Iterator[Finding]:
    """Workflows of this tree that GitHub does not start."""
    ours = {f".github/workflows/{file.name}" for file in (ROOT / ".github/workflows").glob("*.yml")}
    known = [workflow for workflow in described.get("workflows", []) if workflow.get("path") in ours]
    for workflow in known:
        name, state = workflow.get("name"), workflow.get("state")
        if state != "active":
            remedy = f"{REASONS.get(state, 'it does not run')}: on the tab Actions, choose {name}, then Enable workflow"
            yield warning(f"workflow {name}", str(state), remedy)
    yield ok("workflows", f"GitHub knows {len(known)} of the {len(ours)} in this tree")


def registry(environment: Environment) -> list[Finding]:
    """Whether the credentials of `docker login` may push the image; nothing without an image's name or a login."""
    image = image_of(environment)
    return tried(f"push to {'/'.join(image)}", lambda: _push(environment, *image)) if image else []


def _push(environment: Environment, host: str, name: str) -> Iterator[Finding]:
    login = credentials(environment, host)
    if login is None:
        return
    thing, user = f"push to {host}/{name}", login[0]
    answer = _judged(host, name, "Basic " + base64.b64encode(":".join(login).encode()).decode())
    allowed = _actions(answer, name)
    if answer.status in (401, 403) and b"insufficient scope" in answer.content:
        allowed = {"pull"}  # how Docker Hub refuses to give a read-only token more
    elif answer.status in (401, 403):
        remedy = "user name or token is wrong, or the token has expired: make a new one with Read & Write, and log in"
        yield error(thing, f"the registry refuses the user {user!r} with this token ({answer.status})", remedy)
        return
    elif answer.status != 200:
        raise UncheckedError(f"{host} answers {answer.status}", RETRY)
    if allowed is None or allowed & {"push", "*"}:
        yield ok(thing, f"{user!r} is let in")
        return
    yield error(
        thing,
        f"the token of {user!r} may only read ({', '.join(sorted(allowed)) or 'nothing'} allowed)",
        "make one with Read & Write and log in with it; if it is one, the account may not write to "
        f"{name.partition('/')[0]!r}: change the image's name",
    )


def _judged(host: str, name: str, basic: str) -> Answer:
    """The answer of whoever judges credentials: the token server that the registry names, or the registry itself."""
    scheme = "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"  # as for Docker
    api = f"{HUB_REGISTRY if host == HUB else f'{scheme}://{host}'}/v2/"
    answer = ask(api)
    scheme, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
    if answer.status != 401:
        return answer
    if scheme.lower() != "bearer":
        return ask(api, basic)
    fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    asked = {"service": fields.get("service", ""), "scope": f"repository:{name}:pull,push"}
    return ask(f"{fields.get('realm', '')}?{urlencode(asked)}", basic)


def _actions(answer: Answer, name: str) -> set[str] | None:
    """What a token lets its bearer do, by its own words; None if they are for the registry alone to read."""
    try:
        fields = json.loads(answer.content)
        _, payload, _ = (fields.get("token") or fields["access_token"]).split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return {action for entry in claims["access"] if entry["name"] == name for action in entry["actions"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def credentials(environment: Environment, host: str) -> tuple[str, str] | None:
    """Name and token of the image's account, or what `docker login` left; None if there is nothing to be read."""
    user, token = environment.get("DOCKERHUB_USERNAME"), environment.get("DOCKERHUB_TOKEN")
    if user and token:
        return user, token
    file = Path(environment.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    wanted = HUB_LOGIN if host == HUB else host
    try:
        logins = json.loads(file.read_bytes()).get("auths", {})
        for address, login in logins.items():
            if address.rpartition("://")[2].partition("/")[0] == wanted and login.get("auth"):
                user, _, password = base64.b64decode(login["auth"]).decode().partition(":")
                return user, password
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as fault:
        raise UncheckedError(f"{file} cannot be read ({type(fault).__name__})", "run docker login again") from fault
    return None


def model(environment: Environment, config: Config) -> list[Finding]:
    """Whether the hub gives the model's files to this token; nothing for a model that comes from elsewhere."""
    source = config.fetch.source
    if not source.startswith("hub:"):
        return []
    found = SOURCE.fullmatch(source)
    if found is None:
        return [
            error("fetch.source", repr(source), "expected hub:OWNER/NAME@REVISION, with a commit hash of 40 digits")
        ]
    return tried(f"model {found[1]}", lambda: _model(environment, *found.groups()))


def _model(environment: Environment, name: str, revision: str) -> Iterator[Finding]:
    endpoint = (environment.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    thing, page, token = f"model {name}", f"{endpoint}/{name}", hub_token(environment)
    file, secret = f"{page}/resolve/{revision}/config.json", environment.get("HAS_HF_TOKEN")
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield ok(thing, "HF_HUB_OFFLINE is set: it has to be in the local cache")
    elif token is None and secret == "true":
        yield ok(thing, "the secret HF_TOKEN is set; the job that fetches the model gets it, this one does not")
    elif token is None and secret != "false" and _is_open(file):
        yield ok(thing, "everybody may read it")
    elif token is None:
        remedy = (
            f"ask for access at {page}, make a token with read permission at {endpoint}/settings/tokens, and set it"
        )
        yield error(thing, "HF_TOKEN is not set", f"{remedy}: as a secret ({PAGE}), or with export HF_TOKEN=… here")
    else:
        bearer = f"Bearer {token}"
        answer = ask(f"{endpoint}/api/models/{name}/revision/{revision}", bearer)
        if answer.status == 200:  # everybody may read what describes a model; its files say who may have them
            answer = ask(file, bearer, "HEAD")
        yield _admission(thing, answer, page, revision)


def _is_open(file: str) -> bool:
    """Whether it is given to whoever asks; as pipeline.workflow.plan sees it, a workflow has a token all the same."""
    try:
        return ask(file, method="HEAD").status == 200
    except UncheckedError:
        return False


def _admission(thing: str, answer: Answer, page: str, revision: str) -> Finding:
    """What the hub's answer means. For a model that it does not show to this account, it says 401 with a code."""
    if answer.status == 200:
        return ok(thing, "the token may read it")
    if answer.status == 404 or answer.headers.get("X-Error-Code") == "RepoNotFound":
        remedy = f"check the name, and take a commit hash from {page}/commits/main; it may also be private"
        return error(thing, f"no such model, or it has no revision {revision}", remedy)
    if answer.status == 401:
        remedy = f"make a new one with read permission at {urljoin(page, '/settings/tokens')}, and set it"
        return error(thing, "HF_TOKEN is wrong or has expired", remedy)
    if answer.status == 403:
        remedy = f"ask for access at {page}; a fine-grained token must also allow reading public gated repositories"
        return error(thing, "the account of HF_TOKEN has no access to it", remedy)
    raise UncheckedError(f"the hub answers {answer.status}", RETRY)


def hub_token(environment: Environment) -> str | None:
    """HF_TOKEN, or what `hf auth login` has kept; as huggingface_hub finds it, which forgives white space around."""
    if token := environment.get("HF_TOKEN", "").strip():
        return token
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(environment.get("HF_HOME") or cache / "huggingface")
    file = Path(environment.get("HF_TOKEN_PATH") or home / "token")
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None
