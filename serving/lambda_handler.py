"""AWS Lambda's way in: python -m awslambdaric serving.lambda_handler.handler.

Lambda imports this file in the init phase, which may take 10 seconds, and importing torch alone may take longer there.
So this file imports nothing heavy: a thread brings torch, the ready answers and the model, and the prologue is read
without any of them. Between invocations Lambda freezes the process, threads and all, and loading stands still. An
invocation that needs the model therefore stays until it is loaded, and tells its client of the progress; one that asks
for the prologue stays as well, since loading is to be hidden in the time that a visitor reads.

One process serves one invocation at a time. While it does, Lambda starts another for whatever else comes.

WebSocket messages are answered by posting frames (`serving/websocket.py`). API Gateway waits 29 seconds for an
invocation. The template has messages delivered asynchronously, so that nobody waits, and marks them
(`"invocation": "Event"`); unmarked ones are ended in time. Function URL and HTTP API events go through the HTTP
application itself, whose answer Lambda takes as a whole: streams arrive in one piece there.
"""

import base64
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from snapshot_restore_py import register_after_restore, register_before_snapshot

from model.errors import InputError
from serving.errors import error_body
from serving.keys import key_bytes, key_name, presented_key
from serving.prologue import badge, model_id, read_prologue
from serving.settings import Settings
from serving.websocket import GATEWAY_SECONDS, Frames, GoneError, Poster, UnsentError, allowance, named

if TYPE_CHECKING:
    from serving.service import Service

LOG = logging.getLogger("emerald.requests")
LOADING_SECONDS = 20.0
"""How long an HTTP request stays while the model loads, before it is told to come again."""
BEAT_SECONDS = 1.0
PROTOCOL, KEY_PREFIX = "emerald", "emerald.key."
"""Browsers cannot set headers on a WebSocket: they offer these two as its subprotocols, the key behind the prefix."""
BROKEN = "something went wrong on the server; its log says what"
UNKNOWN = "this is no event of a WebSocket API, an HTTP API or a function URL"
LATE = "the server is still starting; try again in a moment"
Answer = dict[str, Any]


class Context(Protocol):
    """What Lambda says of an invocation."""

    def get_remaining_time_in_millis(self) -> int:
        """Until Lambda ends the process."""


class EventError(ValueError):
    """An event of no kind that is served here."""


class Environment:
    """What lives as long as Lambda keeps this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._digests = settings.key_digests
        self._begun: Future[Service] = Future()
        self._poster = Poster()
        self._applications: dict[Settings, Callable[[Any, Any], Answer]] = {}
        threading.Thread(target=self._begin, name="begin", daemon=True).start()

    def handle(self, event: Any, context: Context) -> Answer:
        """Answers one event; whatever it holds, with an answer."""
        try:
            around = event.get("requestContext") if isinstance(event, dict) else None
            if not isinstance(around, dict):
                raise EventError(UNKNOWN)
            if "connectionId" in around:
                return self._websocket(event, around, context)
            return self._http(event, around, context)
        except EventError as fault:
            LOG.warning("refused an event: %s", fault)
            return _refused(400, str(fault))
        except TimeoutError:
            return _refused(503, LATE, {"retry-after": "1"})
        except Exception:
            LOG.exception("an event failed")
            return _refused(500, BROKEN)

    def settle(self) -> None:
        """Waits until the model is loaded: init that becomes a snapshot, or is paid for in advance, ends with it."""
        service = self._begun.result()
        while not service.wait(BEAT_SECONDS):
            pass
        service.engine()

    def reseed(self) -> None:
        """After a snapshot was restored: many processes go on from one state, and must not draw the same numbers.

        Ids and the seeds of replies come from the operating system, which Lambda seeds anew itself; these two do not.
        """
        import torch

        random.seed()
        torch.seed()
        self._poster.forget()

    def _begin(self) -> None:
        try:
            import serving.quick_torch  # noqa: F401
            from serving.service import Service

            service = Service(self.settings)
            service.start()
            from serving import app, conversation  # noqa: F401  # torch and FastAPI, before the first event needs them

            self._begun.set_result(service)
        except BaseException as fault:
            LOG.exception("the server cannot begin")
            self._begun.set_exception(fault)

    def _websocket(self, event: Answer, around: Answer, context: Context) -> Answer:
        match around.get("eventType") or around.get("routeKey"):
            case "CONNECT" | "$connect":
                return self._connect(event)
            case "DISCONNECT" | "$disconnect":
                return {"statusCode": 200}  # a reply that it concerns is not in this process, which is free
        missing = [name for name in ("apiId", "connectionId", "requestId", "stage") if not named(around.get(name))]
        if missing:
            raise EventError(f"this WebSocket event has no {missing[0]} as API Gateway writes it")
        client = f"connection {around['connectionId'][:16]}"
        message = _message(event)
        own = message.get("id") if isinstance(message, dict) else ""
        frames = Frames(self._poster.to(around), str(own) if named(own) else around["requestId"])
        try:
            awaited = event.get("invocation") != "Event"
            seconds = allowance(self.settings.reply_seconds, context.get_remaining_time_in_millis(), awaited=awaited)
            self._converse(message, frames, client, time.monotonic() + seconds)
        except GoneError:
            LOG.info("%s: the client has left", client)
            return {"statusCode": 410}
        except UnsentError as fault:
            LOG.error("%s: given up, since a frame cannot be sent: %s", client, fault)
            return {"statusCode": 502}
        return {"statusCode": 200}

    def _connect(self, event: Answer) -> Answer:
        """Lets a client in. API Gateway passes messages on of those alone whom this let in."""
        headers = _headers(event)
        offered = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
        chosen = {"headers": {"Sec-WebSocket-Protocol": PROTOCOL}} if PROTOCOL in offered else {}
        keys = [name.removeprefix(KEY_PREFIX) for name in offered if name.startswith(KEY_PREFIX)]
        presented = key_bytes(keys[0]) if keys else presented_key(headers.get("authorization", ""))
        if self._digests and key_name(presented, self._digests) is None:
            return {"statusCode": 401}
        return {"statusCode": 200, **chosen}

    def _converse(self, message: object, frames: Frames, client: str, until: float) -> None:
        if message in ({"action": "prologue"}, {"action": "prologue", "id": frames.request}):
            self._show_prologue(frames)
        while not wait([self._begun], BEAT_SECONDS).done and time.monotonic() < until:
            frames.send("loading", progress=0.0)
        if not self._begun.done():
            frames.send("error", status=503, **error_body(503, LATE), retry_after=1)
        elif self._begun.exception():  # which the log has
            frames.send("error", status=500, **error_body(500, BROKEN))
        else:
            from serving.conversation import Conversation

            Conversation(self._begun.result(), frames, client, until).take(message)

    def _show_prologue(self, frames: Frames) -> None:
        """One frame for what surrounds the scenes and one for each, as each has to fit a frame."""
        build = Path(self.settings.build)
        try:
            shown, model, words = read_prologue(build), model_id(build), badge(build)
        except InputError:  # which is why the service will not load, and it says so
            return
        title, scenes = shown["prologue"]["title"], shown["prologue"]["scenes"]
        frames.send("prologue", persona=shown["persona"], title=title, scenes=len(scenes), model=model, badge=words)
        for scene in scenes:
            frames.send("scene", scene=scene)

    def _http(self, event: Answer, around: Answer, context: Context) -> Answer:
        _check_http(event, around)
        until = time.monotonic() + allowance(GATEWAY_SECONDS, context.get_remaining_time_in_millis(), awaited=True)

        def left() -> float:
            return max(0.0, until - time.monotonic())

        def answer() -> Answer:
            return _called(self._application(_settings(self.settings, around, left())), event, context)

        service = self._begun.result(min(LOADING_SECONDS, left()))
        given = answer()
        if given["statusCode"] == 503 and service.wait(min(LOADING_SECONDS, left())) and service.failure is None:
            given = answer()
        return given

    def _application(self, settings: Settings) -> Callable[[Any, Any], Answer]:
        if settings not in self._applications:
            from mangum import Mangum

            from serving.app import create_app

            self._applications[settings] = Mangum(create_app(settings, self._begun.result()), lifespan="off")
        return self._applications[settings]


def _settings(settings: Settings, around: Answer, left: float) -> Settings:
    """As HTTP events want them: AWS has checked who signed one with IAM, and API Gateway waits so long only.

    In whole seconds, since there is an application for every setting.
    """
    authorizer = around.get("authorizer")
    if isinstance(authorizer, dict) and authorizer.get("iam"):
        settings = replace(settings, api_keys="", api_keys_file="")
    if ".lambda-url." not in str(around.get("domainName")):
        settings = replace(settings, reply_seconds=min(settings.reply_seconds, max(1.0, math.floor(left))))
    return settings


def _check_http(event: Answer, around: Answer) -> None:
    """EventError unless an event has, as text, what the application takes for text that a server has read."""
    request = around.get("http", {"method": event.get("httpMethod"), "path": event.get("path")})
    headers = event.get("headers") or {}
    if not isinstance(request, dict) or not isinstance(headers, dict):
        raise EventError(UNKNOWN)
    texts = [request.get("method"), request.get("path"), *headers.values()]
    if not all(isinstance(text, str) and text.encode(errors="ignore").decode() == text for text in texts):
        raise EventError(UNKNOWN)


def _called(application: Callable[[Any, Any], Answer], event: Answer, context: Context) -> Answer:
    """The application's answer; EventError if the event cannot be read. A stream is marked as come in one piece."""
    try:
        answer = application(event, context)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as fault:  # the application's are answers
        raise EventError(f"this HTTP event cannot be read ({type(fault).__name__})") from fault
    if answer["headers"].get("content-type", "").startswith("text/event-stream"):
        answer["headers"]["x-emerald-stream"] = "in one piece"
    return answer


def _headers(event: Answer) -> dict[str, str]:
    """Names in lower case; a header that came several times is one list."""
    single, several = event.get("headers"), event.get("multiValueHeaders")
    found = {str(name).lower(): str(value) for name, value in single.items()} if isinstance(single, dict) else {}
    for name, values in several.items() if isinstance(several, dict) else ():
        if isinstance(values, list):
            found[str(name).lower()] = ", ".join(map(str, values))
    return found


def _message(event: Answer) -> object:
    """The JSON of a WebSocket message; None for what is none."""
    body = event.get("body")
    try:
        return json.loads(base64.b64decode(str(body), validate=True) if event.get("isBase64Encoded") else str(body))
    except (ValueError, RecursionError):
        return None


def _refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    headers = {"content-type": "application/json", **(headers or {})}
    return {"statusCode": status, "headers": headers, "body": json.dumps(error_body(status, message))}


LOG.setLevel(logging.INFO)
ENVIRONMENT = Environment(Settings.from_environment())
register_before_snapshot(ENVIRONMENT.settle)
register_after_restore(ENVIRONMENT.reseed)
if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "provisioned-concurrency":
    ENVIRONMENT.settle()


def handler(event: Any, context: Context) -> Answer:
    """What Lambda calls with every event."""
    return ENVIRONMENT.handle(event, context)
