"""A registry by its HTTP API: manifests by digest and tag, without pulling a layer.

A tag is moved by storing under its name the very bytes that a digest stands for; what was tested is what is tagged. The
API is OCI's distribution specification, with the token flow of Docker Hub; credentials are those of `docker login`.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urljoin

import docker.auth
import requests
from urllib3.exceptions import ProtocolError

from model.errors import InputError
from pipeline.progress import say

HUB, HUB_API = "docker.io", "https://registry-1.docker.io"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
SECONDS = 60
BUSY = (429, 502, 503, 504)
"""Answers after which the same request is sent again."""


class RepositoryUnavailableError(InputError):
    """A repository that does not exist, or is private: registries do not tell strangers which."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long a registry that is busy, or that limits requests, is asked again: with pauses that double."""

    first_seconds: float = 1.0
    total_seconds: float = 120.0
    """All pauses of one request together."""

    def start(self) -> "Pauses":
        """For one request."""
        return Pauses(self.first_seconds, self.total_seconds)


DEFAULT_BACKOFF = Backoff()


class Pauses:
    """The pauses of one request, between its attempts."""

    def __init__(self, first: float, total: float) -> None:
        self._next, self._left = first, total

    def wait(self, why: str, asked: float = 0.0) -> bool:
        """Waits, at least as many seconds as the server asks for; False, at once, if no such pause is left."""
        if self._left <= 0 or asked > self._left:
            return False
        pause = min(max(self._next, asked), self._left)
        say(f"  {why}: trying again in {pause:.0f} s")
        time.sleep(pause)
        self._left -= pause
        self._next *= 2
        return True


class Repository(NamedTuple):
    """Where images of one name are kept."""

    host: str
    name: str

    @classmethod
    def parse(cls, text: str) -> "Repository":
        """From what `docker push` takes, without a tag: `user/name`, `ghcr.io/user/name`, `127.0.0.1:5000/name`."""
        try:
            host, name = docker.auth.resolve_repository_name(text)
        except docker.errors.DockerException as fault:
            raise InputError(f"{text!r} names no repository: {fault}") from fault
        if not re.fullmatch(r"[a-z0-9]+([._/-]+[a-z0-9]+)*", name):
            raise InputError(f"{text!r} names no repository: write it as user/name or host/user/name, in small letters")
        return cls(host, f"library/{name}" if host == HUB and "/" not in name else name)

    @property
    def api(self) -> str:
        """The address of its registry; loopback needs no TLS, as for Docker."""
        if self.host == HUB:
            return HUB_API
        local = self.host.partition(":")[0] in ("localhost", "127.0.0.1")
        return f"{'http' if local else 'https'}://{self.host}"

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"


class Manifest(NamedTuple):
    """What a digest stands for: an image's list of layers, or an index of such."""

    content: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.content).hexdigest()}"


def parse_digest(reference: str) -> tuple[Repository, str]:
    """Repository and digest of REPOSITORY@sha256:…; InputError for anything else, such as a tag, which may move."""
    name, at, digest = reference.partition("@")
    if not at or not DIGEST.fullmatch(digest):
        raise InputError(f"{reference!r}: expected REPOSITORY@sha256: and 64 digits, since a tag may move")
    return Repository.parse(name), digest


def check_tag(tag: str) -> str:
    """The tag; InputError if it is none."""
    if not TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is no tag: letters, digits, underscore, dot and dash, at most 128")
    return tag


class Registry:
    """One repository's manifests and tags."""

    def __init__(self, repository: Repository, backoff: Backoff = DEFAULT_BACKOFF) -> None:
        self.repository = repository
        self._backoff = backoff
        self._http = requests.Session()
        self._authorization: str | None = None

    def digest_of(self, tag: str) -> str | None:
        """What a tag points to; None if there is no such tag. Like all reading, raises RepositoryUnavailableError."""
        answer = self._call("HEAD", f"manifests/{tag}", missing=True)
        return answer.headers.get("Docker-Content-Digest") if answer is not None else None

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a digest. Raises InputError if there is none, or if what comes is another."""
        answer = self._call("GET", f"manifests/{digest}", missing=True)
        if answer is None:
            raise InputError(f"{self.repository}@{digest}: the registry holds no such image; push it first")
        found = Manifest(answer.content, answer.headers["Content-Type"])
        if found.digest != digest:
            raise InputError(
                f"{self.repository}@{digest}: the registry sent other bytes, of {found.digest}: nothing from it can be "
                "trusted until that is explained; nothing was tagged"
            )
        return found

    def tag(self, manifest: Manifest, tag: str) -> None:
        """Points a tag to a manifest that the registry holds. Raises InputError unless the registry then says so."""
        self.put(manifest, tag)
        found = self.digest_of(tag)
        if found != manifest.digest:
            raise InputError(f"{self.repository}:{tag} is {found} after it was set to {manifest.digest}: run again")

    def put(self, manifest: Manifest, tag: str) -> None:
        """As `tag`, for a tag that others may move at the same time: what it names afterwards is not asked."""
        self._call("PUT", f"manifests/{tag}", manifest)

    def tags(self) -> Iterator[str]:
        """Every tag, page by page."""
        place: str | None = "tags/list?n=1000"
        while place is not None:
            answer = self._call("GET", place, missing=True)
            if answer is None:
                return
            yield from answer.json()["tags"] or ()
            place = answer.links.get("next", {}).get("url")

    def _call(
        self, method: str, place: str, manifest: Manifest | None = None, *, missing: bool = False
    ) -> requests.Response | None:
        """Asks the registry, with a token if it wants one; None for what is not there, if that may be."""
        address = urljoin(f"{self.repository.api}/v2/{self.repository.name}/", place)
        answer = self._send(method, address, manifest)
        if answer.status_code == requests.codes.unauthorized:
            self._authorization = self._authorize(answer.headers.get("WWW-Authenticate", ""))
            answer = self._send(method, address, manifest)
        if answer.status_code == requests.codes.not_found and missing:
            return None
        if answer.status_code == requests.codes.unauthorized and missing and self._has_token():
            raise self._unavailable()
        if answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise InputError(self._refusal(f"{method} {place}: {answer.status_code}"))
        if not answer.ok:
            raise InputError(
                f"{self.repository}: the registry answered {answer.status_code} to {method} {place} "
                f"({answer.text[:200].strip()}); nothing else was done: try again"
            )
        return answer

    def _send(self, method: str, address: str, manifest: Manifest | None) -> requests.Response:
        headers = {"Accept": ", ".join(MANIFESTS)}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization
        if manifest is not None:
            headers["Content-Type"] = manifest.media_type
        content = manifest.content if manifest is not None else None
        return self._reach(method, address, data=content, headers=headers)

    def _authorize(self, challenge: str) -> str:
        """The Authorization header that a registry asks for: a password, or a token that a password buys."""
        scheme, _, rest = challenge.partition(" ")
        fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if scheme.lower() == "basic":
            name, password = self._credentials()
            if name is None:
                raise InputError(self._refusal("it asks for a name and a password"))
            return str(requests.Request(auth=(name, password), url="http://x").prepare().headers["Authorization"])
        if scheme.lower() != "bearer" or "realm" not in fields:
            raise InputError(f"{self.repository}: the registry asks for {challenge!r}, which is not supported")
        return f"Bearer {self._token(fields)}"

    def _token(self, fields: dict[str, str]) -> str:
        """From the token server that the registry names."""
        name, password = self._credentials()
        actions = "pull" if name is None else "pull,push"
        scope = f"repository:{self.repository.name}:{actions}"
        asked = {"service": fields.get("service", ""), "scope": scope}
        if name == "":  # an identity token, which credential helpers keep
            form = {**asked, "grant_type": "refresh_token", "refresh_token": password, "client_id": "emerald"}
            answer = self._reach("POST", fields["realm"], data=form)
        else:
            login = None if name is None else (name, password)
            answer = self._reach("GET", fields["realm"], params=asked, auth=login)
        if name is None and answer.status_code in (requests.codes.unauthorized, requests.codes.forbidden):
            raise self._unavailable()  # as GitHub's registry answers, where Docker Hub gives a token for nothing
        if not answer.ok:
            raise InputError(self._refusal(f"its token server answered {answer.status_code}"))
        found: dict[str, Any] = answer.json()
        return str(found.get("token") or found["access_token"])

    def _credentials(self) -> tuple[str | None, str]:
        """Name and password of `docker login`; the name is empty for an identity token, None if there are none."""
        try:
            login: Any = docker.auth.load_config().resolve_authconfig(self.repository.host)
        except docker.errors.DockerException as fault:
            raise InputError(f"Docker's credentials for {self.repository.host} cannot be read: {fault}") from fault
        if not login:
            return None, ""
        identity = login.get("identitytoken") or login.get("IdentityToken")
        if identity:
            return "", str(identity)
        return str(login.get("username") or login.get("Username")), str(login.get("password") or login.get("Password"))

    def _refusal(self, why: str) -> str:
        return (
            f"{self.repository}: the registry refused ({why}): docker login {self.repository.host} with a name and a "
            "token that may push there; nothing was tagged"
        )

    def _has_token(self) -> bool:
        return (self._authorization or "").startswith("Bearer ")

    def _unavailable(self) -> RepositoryUnavailableError:
        anonymous = self._credentials()[0] is None
        unread = "cannot be read without credentials" if anonymous else "these credentials may not read it"
        return RepositoryUnavailableError(
            f"{self.repository}: the registry shows no such repository: it does not exist yet, or is private and "
            f"{unread}: check the name, or docker login {self.repository.host} with a name and a token that may; "
            "nothing was tagged"
        )

    def _reach(self, method: str, address: str, **options: Any) -> requests.Response:
        """Sends a request, and sends it again while the registry is busy or hangs up."""
        pauses = self._backoff.start()
        while True:
            try:
                answer = self._http.request(method, address, timeout=SECONDS, **options)
            except requests.RequestException as fault:
                if method != "POST" and _was_reset(fault) and pauses.wait(f"{self.repository}: the registry hung up"):
                    continue
                raise InputError(
                    f"{self.repository}: the registry does not answer ({fault}): try again when it does; nothing else "
                    "was done"
                ) from fault
            if answer.status_code not in BUSY:
                return answer
            asked = _retry_after(answer)
            if not pauses.wait(f"{self.repository}: the registry answered {answer.status_code}", asked):
                raise InputError(self._busy(method, answer, asked))

    def _busy(self, method: str, answer: requests.Response, asked: float) -> str:
        """What to do about a registry that was busy until patience ended, or that asks for more of it."""
        when = f"{datetime.now(UTC) + timedelta(seconds=asked):%Y-%m-%d %H:%M} UTC, as it asks" if asked else "later"
        limit = f", or docker login {self.repository.host}, which raises the limit" if answer.status_code == 429 else ""
        said = answer.text[:200].strip()
        return (
            f"{self.repository}: the registry answered {answer.status_code} to {method} ({said}), and waiting for it "
            f"ends at {self._backoff.total_seconds:.0f} s: try again {when}{limit}; nothing else was done"
        )


def _was_reset(fault: requests.RequestException) -> bool:
    """Whether a connection that stood was ended by the other side."""
    return bool(fault.args) and isinstance(fault.args[0], ProtocolError)


def _retry_after(answer: requests.Response) -> float:
    """The seconds that a Retry-After header asks for, which has them or a date; 0 without one that can be read."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0
