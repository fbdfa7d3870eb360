"""A registry by its HTTP API: manifests by digest and tag, without pulling a layer.

A tag is moved by storing under its name the very bytes that a digest stands for; what was tested is what is tagged. The
API is OCI's distribution specification, with the token flow of Docker Hub; credentials are those of `docker login`.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urljoin

import docker.auth
import requests

from model.errors import InputError

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

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._http = requests.Session()
        self._authorization: str | None = None

    def digest_of(self, tag: str) -> str | None:
        """What a tag points to; None if there is no such tag."""
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
        self._call("PUT", f"manifests/{tag}", manifest)
        found = self.digest_of(tag)
        if found != manifest.digest:
            raise InputError(f"{self.repository}:{tag} is {found} after it was set to {manifest.digest}: run again")

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
        return self._reach(lambda: self._http.request(method, address, data=content, headers=headers, timeout=SECONDS))

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
        scope = f"repository:{self.repository.name}:pull,push"
        asked = {"service": fields.get("service", ""), "scope": scope}
        name, password = self._credentials()
        if name == "":  # an identity token, which credential helpers keep
            form = {**asked, "grant_type": "refresh_token", "refresh_token": password, "client_id": "emerald"}
            answer = self._reach(lambda: self._http.post(fields["realm"], data=form, timeout=SECONDS))
        else:
            login = None if name is None else (name, password)
            answer = self._reach(lambda: self._http.get(fields["realm"], params=asked, auth=login, timeout=SECONDS))
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

    def _reach(self, send: Any) -> requests.Response:
        try:
            answer: requests.Response = send()
        except requests.RequestException as fault:
            raise InputError(
                f"{self.repository}: the registry does not answer ({fault}): try again when it does; nothing else was "
                "done"
            ) from fault
        return answer
