"""The door of the server: API keys, limits on what is sent and how slowly, headers that make browsers strict."""

import asyncio
import hashlib
import json
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import error_body
from serving.keys import key_name, presented_key
from serving.settings import Settings

OPEN_PATHS = ("/health/live", "/health/ready")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class RefusedError(Exception):
    """A request that is answered at the door."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}


class Door:
    """ASGI middleware around everything else; puts the caller's name, for fairness, into the scope's `client_name`."""

    def __init__(self, app: ASGIApp, settings: Settings, digests: Sequence[str]) -> None:
        self._app = app
        self._digests = digests
        self._body_bytes_max, self._receive_seconds = settings.body_bytes_max, settings.receive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]  # files are sent whole
        headers = Headers(scope=scope)
        try:
            scope["client_name"] = self._caller(scope, headers)
            body = await self._body(scope, headers, receive)
        except RefusedError as fault:
            await _answer(send_with_headers, fault)
            return
        await self._app(scope, _replaying(body, receive), send_with_headers)

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """A short name of the key, or the address where no key is asked for."""
        address = scope["client"][0] if scope.get("client") else "unknown"
        if not self._digests or scope["path"] in OPEN_PATHS:
            return str(address)
        name = key_name(presented_key(headers.get("authorization", "")), self._digests)
        if name is None:
            raise RefusedError(
                401,
                "an API key is needed: send it as Authorization: Bearer KEY (browsers: as the password)",
                {"WWW-Authenticate": 'Basic realm="Emerald", charset="UTF-8"'},
            )
        return name

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        try:
            declared = int(headers.get("content-length", "0"))
        except ValueError:
            raise RefusedError(400, "Content-Length is no number") from None
        if declared > self._body_bytes_max:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._receive_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(408, "the connection closed before the whole request came")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._body_bytes_max:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RefusedError(408, f"the request did not come within {self._receive_seconds:g} seconds") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and scope["method"] == "POST":
            raise RefusedError(415, "send the body as JSON, with Content-Type: application/json")
        return b"".join(parts)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the request is larger than {self._body_bytes_max} bytes", {"Connection": "close"})


def veiled(text: str, settings: Settings) -> str:
    """What a log holds of users' words: length and digest; the words themselves only where the operator wants it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return repr(text) if settings.log_prompts else f"{len(text)} characters, SHA-256 {digest}"


def _replaying(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever the connection says: that it closed."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, fault: RefusedError) -> None:
    body = json.dumps(error_body(fault.status, str(fault))).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **fault.headers}
    raw: Sequence[tuple[bytes, bytes]] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": list(raw)})
    await send({"type": "http.response.body", "body": body})
