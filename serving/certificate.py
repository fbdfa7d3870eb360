"""The certificate: proof that the cache, as it is served, answers wrongly no more often than was promised.

`pipeline/certify_cache.py` writes it; here it is checked against what is about to be served. It names the digests of
embedder, cache (index, entries, policy) and of the code that decides, and closes with a seal over its own content. If
any of them differs, nothing is answered by likeness: exact matches stay, and the reason is given with every miss.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.artifact import file_digest, read_json, write_json
from model.errors import InputError
from serving.cache import Cache

FORMAT_VERSION = 1
DECIDED_BY = ("cache.py", "certificate.py", "embedder.py", "guards.py", "text.py")
"""The files of this package that make the decision."""
REMEDY = 'run "python -m pipeline run certify_cache"'


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was certified."""

    identity: str
    """The seal, which names this certificate."""
    threshold: float
    confidence: float
    bound: float
    """Upper limit of the share of semantic hits that are wrong, at that confidence."""


def sealed(cache: Cache) -> dict[str, str]:
    """Digests of all that a certificate vouches for."""
    code = "\n".join(file_digest(Path(__file__).with_name(name)) for name in DECIDED_BY)
    return {
        "embedder": cache.embedder.digest,
        "cache": cache.digest,
        "decision": hashlib.sha256(code.encode()).hexdigest(),
    }


def write_certificate(file: Path, content: dict[str, Any]) -> None:
    """Closes the content with its seal."""
    write_json(file, {"format": FORMAT_VERSION, **content, "seal": _seal({"format": FORMAT_VERSION, **content})})


def read_certificate(file: Path, cache: Cache) -> Certificate:
    """The certificate of this very cache. Raises InputError with what does not match."""
    content = read_json(file, REMEDY)
    identity = content.pop("seal", None)
    if content.get("format") != FORMAT_VERSION or identity != _seal(content):
        raise InputError(f"{file}: its content does not match its seal, so it was changed or damaged; {REMEDY}")
    for name, digest in sealed(cache).items():
        if content["sealed"][name] != digest:
            raise InputError(
                f"{file}: it is of {name} {content['sealed'][name][:12]}…, and this one is {digest[:12]}…; {REMEDY}"
            )
    if not content["certified"]:
        raise InputError(f"{file}: certification failed: {content['reason']}")
    return Certificate(
        identity=identity,
        threshold=content["threshold"],
        confidence=content["confidence"],
        bound=content["false_hits"]["upper"],
    )


def admit(cache: Cache, file: Path) -> Certificate | None:
    """Opens the cache's semantic tier at the certified threshold; without a fit certificate it says why it is shut."""
    try:
        certificate = read_certificate(file, cache)
    except InputError as fault:
        cache.threshold, cache.uncertified = None, str(fault)
        return None
    cache.threshold = certificate.threshold
    return certificate


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
