"""API keys: the server keeps their digests, and compares what callers present in constant time."""

import base64
import hashlib
import hmac
from collections.abc import Sequence


def key_name(presented: bytes, digests: Sequence[str]) -> str | None:
    """A short name for a key whose SHA-256 is among the digests; None for any other."""
    digest = hashlib.sha256(presented).hexdigest()
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return f"key {digest[:12]}" if any(matches) else None


def presented_key(authorization: str) -> bytes:
    """The key in an Authorization header: a Bearer token, or the password of Basic; empty if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:  # binascii's own is one
            return b""
    return key_bytes(value.strip()) if scheme.lower() == "bearer" else b""


def key_bytes(text: str) -> bytes:
    """A header's text as the bytes that were sent; empty for what no header can hold, which is no key."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return b""
