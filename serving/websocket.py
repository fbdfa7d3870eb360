"""Frames of a WebSocket connection that API Gateway holds: numbered, small enough, posted one after the other.

Nobody in this process has the socket. API Gateway keeps it, invokes the function with every message, and takes what is
to be sent as signed requests of its management API. A client that has left shows as 410 there, and nowhere else. A
frame is posted only when the one before has been accepted, so frames come in order; one whose acceptance got lost on
the way is posted again, so a client that has seen a number drops it.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

LOG = logging.getLogger("emerald.requests")
FRAME_BYTES = 32 * 1024
"""API Gateway's limit of a WebSocket frame, and its unit of billing; a message may have 128 KB, in several frames."""
GATEWAY_SECONDS = 27.0
"""An answer of this age is still within the 29 seconds that API Gateway waits for an invocation."""
LAST_SECONDS = 5.0
"""Of an invocation, what is kept for ending it in order."""
API = "apigatewaymanagementapi"
ENDPOINT = "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI"
"""AWS's own name for the variable that sends posts elsewhere."""
POSTING = Config(connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 4})
"""A post that is refused for now (429, 5xx) or not answered is repeated after a pause, within some 30 seconds."""
FRAMES: Mapping[str, tuple[str, ...]] = {
    "prologue": ("persona", "title", "scenes", "model", "badge"),
    "scene": ("scene",),
    "loading": ("progress",),
    "ready": ("cache",),
    "origin": ("source", "entry", "tier", "certificate", "false_hit_bound", "miss", "dropped_turns"),
    "chunk": ("data",),
    "done": ("usage", "timings"),
    "error": ("status", "error", "retry_after"),
}
"""Every type of frame and the fields it may have beside `type`, `request` and `seq`."""

NAME_CHARACTERS = 64
Post = Callable[[bytes], None]


class GoneError(Exception):
    """The client has left: nothing can be sent to it any more."""


class UnsentError(Exception):
    """API Gateway took a frame neither at once nor after some repetitions."""


class Frames:
    """The frames of one request, numbered from 0."""

    def __init__(self, post: Post, request: str) -> None:
        self.request = request
        self._post, self._sent = post, 0

    def send(self, kind: str, **fields: Any) -> None:
        """Posts the next frame. Raises GoneError or UnsentError."""
        assert fields.keys() <= set(FRAMES[kind]), f"{kind} has no such fields: {sorted(fields)}"
        self._post(encoded({"type": kind, "request": self.request, "seq": self._sent, **fields}))
        self._sent += 1


def allowance(wished: float, left_ms: float, *, awaited: bool) -> float:
    """Seconds that an answer may take: less than the invocation has left, and than API Gateway waits, if it does."""
    seconds = min(wished, left_ms / 1000 - LAST_SECONDS)
    return max(0.0, min(seconds, GATEWAY_SECONDS) if awaited else seconds)


def named(name: object) -> bool:
    """Whether a client may give its request this name, which every frame repeats."""
    return isinstance(name, str) and 0 < len(name) <= NAME_CHARACTERS and name.isascii() and name.isprintable()


def encoded(content: Mapping[str, Any]) -> bytes:
    """JSON as it is sent; half of a surrogate pair, which UTF-8 has no bytes for, as JSON's escape."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class Poster:
    """API Gateway's management API, and its clients' connections."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}

    def forget(self) -> None:
        """Drops connections and credentials, which a restored snapshot must not go on with."""
        self._clients.clear()

    def to(self, context: Mapping[str, Any]) -> Post:
        """What posts to the connection of an event's request context."""
        client, connection = self._client(context), str(context["connectionId"])

        def post(data: bytes) -> None:
            if len(data) > FRAME_BYTES:
                raise UnsentError(f"a frame of {len(data)} bytes was to be sent, and API Gateway takes {FRAME_BYTES}")
            try:
                client.post_to_connection(ConnectionId=connection, Data=data)
            except ClientError as fault:
                gone = fault.response["ResponseMetadata"]["HTTPStatusCode"] == 410
                raise (GoneError() if gone else UnsentError(str(fault))) from fault
            except BotoCoreError as fault:
                raise UnsentError(str(fault)) from fault

        return post

    def _client(self, context: Mapping[str, Any]) -> Any:
        """By the API's own name, which also holds where clients come by another domain."""
        region = os.environ["AWS_REGION"]
        suffix = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        url = f"https://{context['apiId']}.execute-api.{region}.{suffix}/{context['stage']}"
        url = os.environ.get(ENDPOINT, url)
        if url not in self._clients:
            session = botocore.session.get_session()
            self._clients[url] = session.create_client(API, region, endpoint_url=url, config=POSTING)
        return self._clients[url]
