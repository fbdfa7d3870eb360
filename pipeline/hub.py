"""The Hugging Face hub: a model's small files, its shards one by one, and what is said when it refuses.

`huggingface_hub` downloads, takes up what broke off, follows redirects and tries again; HF_TOKEN is used when set. A
shard is checked against the size and SHA-256 that the hub stated when the model was fetched; half of one waits in a
`.partial` file for the next run, which the client's own downloads to a folder would throw away.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils._headers import build_hf_headers

from model.artifact import file_digest
from model.errors import InputError
from pipeline.licences import LICENCE_FILES

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
WEIGHTS = ["*.safetensors"]
OTHERS = ["*.json", "*.jinja", "*.txt", *LICENCE_FILES]
UNWANTED = ["original/*", "onnx/*", "openvino/*"]
"""Other copies of the same weights that model repositories carry."""


class Shard(NamedTuple):
    """A file of weights, as the hub states it."""

    bytes: int
    sha256: str


class HubModel(NamedTuple):
    """A repository at a pinned revision."""

    repository: str
    revision: str
    """A full commit hash."""

    @classmethod
    def parse(cls, source: str) -> "HubModel":
        """From `hub:OWNER/NAME@REVISION`."""
        repository, _, revision = source.removeprefix("hub:").partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not COMMIT.fullmatch(revision):
            raise InputError(
                f"source {source!r}: expected hub:OWNER/NAME@REVISION, the revision as a full commit hash of 40 "
                "digits, since a branch may move"
            )
        return cls(repository, revision)

    def snapshot(self, *, weights: bool) -> Path:
        """A local folder of the model's files, from the client's cache or downloaded into it."""
        wanted = [*WEIGHTS, *OTHERS] if weights else OTHERS
        with self._refusals():
            return Path(
                snapshot_download(
                    self.repository, revision=self.revision, allow_patterns=wanted, ignore_patterns=UNWANTED
                )
            )

    def shard(self, file: str) -> Shard:
        """Size and SHA-256 of a file of weights; raises InputError if the hub states none."""
        return self._stated(file)[0]

    def download(self, file: str, expected: Shard, folder: Path) -> Path:
        """The file, in `folder`: taken up where an earlier attempt ended. Raises InputError if it is another one."""
        stated, location = self._stated(file)
        if stated != expected:
            raise InputError(
                f"{self.repository}: {file} has changed since it was fetched ({expected.bytes} bytes, SHA-256 "
                f"{expected.sha256[:12]}…; now {stated.bytes}, {stated.sha256[:12]}…): nothing may change at a pinned "
                'revision; run "python -m pipeline run fetch --force" if you trust it'
            )
        path, partial = folder / file, folder / f"{file}.partial"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with self._refusals(), partial.open("ab") as out:
                http_get(
                    location, out, resume_size=out.tell(), headers=_headers(location), expected_size=expected.bytes
                )
            partial.replace(path)
        found = Shard(path.stat().st_size, file_digest(path))
        if found != expected:
            path.unlink()
            raise InputError(
                f"{self.repository}: {file} came as {found.bytes} bytes with SHA-256 {found.sha256}, but the hub "
                f"states {expected.bytes} and {expected.sha256}: damaged on the way; run again"
            )
        return path

    def _stated(self, file: str) -> tuple[Shard, str]:
        """What the hub says of a file, and where it is."""
        with self._refusals():
            url = hf_hub_url(self.repository, file, revision=self.revision)
            found = get_hf_file_metadata(url, headers=build_hf_headers(), retry_on_errors=True)
        if found.size is None or found.etag is None or not SHA256.fullmatch(found.etag):
            raise InputError(
                f"{self.repository}: the hub states no size and SHA-256 of {file} (ETag {found.etag!r}), so that it "
                "could not be checked; download the model and use folder:PATH"
            )
        return Shard(found.size, found.etag), found.location

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turns what the client raises into errors with a remedy."""
        page = f"{constants.ENDPOINT}/{self.repository}"
        try:
            yield
        except HFValidationError as fault:
            raise InputError(f"hub:{self.repository}: expected hub:OWNER/NAME@REVISION ({fault})") from fault
        except GatedRepoError as fault:
            raise InputError(
                f"{self.repository} is gated and this token may not read it: ask for access at {page}, create a token "
                "with read permission there, and set HF_TOKEN to it"
            ) from fault
        except RevisionNotFoundError as fault:
            raise InputError(
                f"{self.repository} has no revision {self.revision!r}: take a commit hash from {page}/commits/main"
            ) from fault
        except RepositoryNotFoundError as fault:
            raise InputError(
                f"{self.repository}: not found at {page}, or private: check the name; for a private or gated model set "
                "HF_TOKEN"
            ) from fault
        except RemoteEntryNotFoundError as fault:
            raise InputError(
                f"{self.repository}@{self.revision}: the hub no longer holds a file that it listed ({fault}); "
                'run "python -m pipeline run fetch --force"'
            ) from fault
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, httpx2.TransportError) as fault:
            raise InputError(
                f"the hub at {constants.ENDPOINT} cannot be reached and {self.repository}@{self.revision} is not in "
                f"the local cache ({constants.HF_HUB_CACHE}): check the network and HF_HUB_OFFLINE, or download the "
                "model elsewhere and use folder:PATH"
            ) from fault
        except HfHubHTTPError as fault:
            if fault.response.status_code == httpx2.codes.UNAUTHORIZED:
                raise InputError(
                    f"{self.repository}: the hub refused the token; it may have expired: create one at "
                    f"{constants.ENDPOINT}/settings/tokens, set HF_TOKEN to it, and run again"
                ) from fault
            raise InputError(f"the hub refused {self.repository}@{self.revision}: {fault}; try again later") from fault


def _headers(location: str) -> dict[str, str]:
    """The client's; the token goes to the hub alone, not to where it keeps its files."""
    headers = build_hf_headers()
    if httpx2.URL(location).netloc != httpx2.URL(constants.ENDPOINT).netloc:
        headers.pop("authorization", None)
    return headers
