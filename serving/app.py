"""The HTTP interface: OpenAI's chat completions over the cache and the model.

One reply is generated at a time; a bounded number of requests waits, and more are refused with 429. Every error has
OpenAI's shape, and its status is in one table.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import chain
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from model.engine import Piece, Timing
from model.errors import InputError
from model.sampling import LogitsError, Sampling
from serving.answer import Reply, Storyteller
from serving.settings import Settings

ERROR_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
}
"""OpenAI's error type by HTTP status; any other is a server_error."""


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["user", "assistant"]
    content: Annotated[str, Field(max_length=100_000)]


class StreamOptions(BaseModel):
    """OpenAI's options of a streamed reply."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The supported part of OpenAI's request; anything else is refused by name, never ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None


class Turnstile:
    """Lets one reply at a time use the model and a bounded number wait."""

    def __init__(self, waiting_max: int) -> None:
        self._places = threading.BoundedSemaphore(waiting_max + 1)
        self._model = threading.Lock()

    def pass_through(self, reply: Reply) -> Generator[tuple[Piece, Timing], None, None]:
        """The reply's pieces, in turn; a ready answer needs no turn. Refuses with 429 when too many wait."""
        if reply.cached is not None:
            yield from reply.pieces
            return
        if not self._places.acquire(blocking=False):
            raise HTTPException(429, "too many requests are waiting; try again later", {"Retry-After": "2"})
        try:
            with self._model:
                yield from reply.pieces
        finally:
            self._places.release()


class Service:
    """The storyteller behind the routes, loaded in the background."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.turnstile = Turnstile(settings.waiting_max)
        self.failure: str | None = None
        self._storyteller: Storyteller | None = None
        threading.Thread(target=self._load, name="load", daemon=True).start()

    @property
    def ready(self) -> bool:
        return self._storyteller is not None

    @property
    def storyteller(self) -> Storyteller:
        if self._storyteller is None:
            raise HTTPException(
                503, self.failure or "the model is still loading; try again in a moment", {"Retry-After": "1"}
            )
        return self._storyteller

    def _load(self) -> None:
        try:
            storyteller = Storyteller(self.settings)
            storyteller.warm_up()
            self._storyteller = storyteller
        except InputError as fault:
            self.failure = f"the model cannot be loaded: {fault}"


def create_app(settings: Settings) -> FastAPI:
    """The application; loading starts at once and the routes answer meanwhile."""
    app = FastAPI(title="Emerald", description="A storyteller with ready answers and an int4 Llama.", version="0.1.0")
    service = Service(settings)

    @app.get("/health/live")
    def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/health/ready")
    def ready() -> JSONResponse:
        """200 when the model is loaded, 503 before."""
        if not service.ready:
            return JSONResponse({"status": service.failure or "loading"}, 503)
        proof = service.storyteller.certificate
        cache = "exact matches only" if proof is None else f"certified {proof.identity}"
        return JSONResponse({"status": "ready", "cache": cache})

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The one model that is served."""
        model_id = service.storyteller.engine.model_id
        return {"object": "list", "data": [{"id": model_id, "object": "model", "owned_by": "emerald"}]}

    @app.post("/v1/chat/completions", response_model=None)
    def chat_completions(request: ChatRequest, http: Request) -> Response:
        """A chat completion, whole or streamed; `Cache-Control: no-cache` asks the model in any case."""
        storyteller = service.storyteller
        use_cache = "no-cache" not in http.headers.get("cache-control", "").lower()
        messages = [message.model_dump() for message in request.messages]
        reply = storyteller.reply(messages, _sampling(request, settings), use_cache=use_cache)
        completion = Completion(model=request.model or storyteller.engine.model_id, reply=reply)
        pieces = service.turnstile.pass_through(reply)
        first = next(pieces)  # the queue and the prompt are passed before the status line is sent
        headers = _origin_headers(reply)
        if request.stream:
            with_usage = request.stream_options is not None and request.stream_options.include_usage
            events = completion.events(chain([first], pieces), with_usage=with_usage)
            return EventStream(events, pieces.close, headers)
        return JSONResponse(completion.whole(chain([first], pieces)), headers=headers)

    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(LogitsError, _damaged)
    app.add_exception_handler(HTTPException, _http_error)
    return app


class EventStream(StreamingResponse):
    """Server-sent events that give their turn back when the client has gone, not when Python next collects garbage."""

    def __init__(self, events: Iterator[str], close: Callable[[], None], headers: Mapping[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class Completion:
    """One reply in OpenAI's shapes."""

    def __init__(self, model: str, reply: Reply) -> None:
        self._reply = reply
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Iterable[tuple[Piece, Timing]]) -> dict[str, Any]:
        """A `chat.completion` object."""
        spoken = [piece for piece, _ in pieces]
        message = {"role": "assistant", "content": "".join(piece.text for piece in spoken)}
        choice = {"index": 0, "message": message, "finish_reason": spoken[-1].finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage(spoken[-1])}

    def events(self, pieces: Iterable[tuple[Piece, Timing]], *, with_usage: bool) -> Iterator[str]:
        """Server-sent events of `chat.completion.chunk` objects, closed by [DONE]."""
        yield self._event({"role": "assistant", "content": ""}, None)
        for piece, _ in pieces:
            if piece.text:
                yield self._event({"content": piece.text}, None)
            if piece.finish_reason:
                yield self._event({}, piece.finish_reason)
                if with_usage:
                    yield self._data({"choices": [], "usage": self._usage(piece)})
        yield "data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], finish_reason: str | None) -> str:
        return self._data({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]})

    def _data(self, content: dict[str, Any]) -> str:
        chunk = {**self._head, "object": "chat.completion.chunk", **content}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _usage(self, last: Piece) -> dict[str, int]:
        prompt, made = self._reply.prompt_tokens, last.tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _sampling(request: ChatRequest, settings: Settings) -> Sampling:
    longest = request.max_completion_tokens or request.max_tokens or settings.reply_tokens_max
    if longest > settings.reply_tokens_max:
        raise InputError(f"max_tokens = {longest}: this server generates at most {settings.reply_tokens_max} tokens")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    names = [field.name for field in fields(Sampling) if field.name not in ("max_tokens", "stop")]
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    return Sampling(**given, max_tokens=longest, stop=tuple(stop))


def _origin_headers(reply: Reply) -> dict[str, str]:
    """Where the answer came from; for a semantic match, by which certificate, and how often it is wrong at most."""
    if reply.cached is not None:
        origin = {
            "X-Emerald-Source": "cache",
            "X-Emerald-Entry": reply.cached.entry,
            "X-Emerald-Tier": reply.cached.tier,
        }
        if reply.certificate is not None:
            origin["X-Emerald-Certificate"] = reply.certificate.identity
            origin["X-Emerald-False-Hit-Bound"] = f"{reply.certificate.bound:.4f}"
        return origin
    return {"X-Emerald-Source": "model", "X-Emerald-Dropped-Turns": str(reply.dropped_turns)}


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    kind = ERROR_TYPES.get(status, "server_error")
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers=dict(headers or {}))


def _invalid(_request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, RequestValidationError)
    first = fault.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return _error(400, f"{place}: {first['msg']}")


def _damaged(_request: Request, fault: Exception) -> JSONResponse:
    return _error(500, str(fault))


def _refused(_request: Request, fault: Exception) -> JSONResponse:
    return _error(400, str(fault))


def _http_error(_request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, HTTPException)
    return _error(fault.status_code, str(fault.detail), fault.headers)
