"""The HTTP interface: OpenAI's completions over the cache and the model, the page, and what operators look at.

Every error has OpenAI's shape; `serving/errors.py` has the table of their statuses.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware
from swagger_ui_bundle import swagger_ui_path

from serving.answer import Origin
from serving.calls import EXPOSED, Calls
from serving.completion import Completion, TextCompletion
from serving.errors import ERROR_TYPES, error_body
from serving.faults import FORESEEN, described
from serving.metrics import Metrics
from serving.prologue import badge
from serving.protocol import (
    ChatRequest,
    DetokenizeRequest,
    ErrorBody,
    TextRequest,
    TokenizeRequest,
    refusal,
)
from serving.scheduler import Ticket
from serving.security import SECURITY_HEADERS, Door
from serving.service import OWN_NAME, Service
from serving.settings import Settings

WEB = Path(__file__).parent / "web"
SCHEMAS = "#/components/schemas/"
ERRORS = {
    str(status): {
        "description": kind.replace("_", " "),
        "content": {"application/json": {"schema": {"$ref": f"{SCHEMAS}ErrorBody"}}},
    }
    for status, kind in ERROR_TYPES.items()
}
"""What every operation may answer, as OpenAPI has it."""
EVENT = {
    "type": "object",
    "description": "One of the stream's events: a chunk of the completion as JSON; the last one is [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


def create_app(settings: Settings, service: Service) -> FastAPI:
    """The application. A server starts the service with it and closes it at its end; the routes answer meanwhile.

    Where there is no server (Lambda), the caller starts the service.
    """
    metrics = Metrics(service)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = Application(
        title="Emerald",
        description="A storyteller with ready answers, certified, and an int4 Llama.",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    _add_health(app, service, metrics)
    _add_completions(app, settings, service, metrics)
    _add_page(app, service)
    _add_handlers(app, metrics)
    app.add_middleware(Door, settings=settings, digests=settings.key_digests)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Cache-Control", "Content-Type"],
            expose_headers=["Retry-After", *EXPOSED],
        )
    return app


class Application(FastAPI):
    """FastAPI, with one description of errors for all operations, and made when it is asked for: it takes a while."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        schema = super().openapi()  # which FastAPI keeps
        error = ErrorBody.model_json_schema(ref_template=f"{SCHEMAS}{{model}}")
        schema["components"]["schemas"] |= {**error.pop("$defs"), "ErrorBody": error}
        for operation in (operation for route in schema["paths"].values() for operation in route.values()):
            operation["responses"].pop("422", None)  # FastAPI's own, which never leaves this server
            operation["responses"] |= ERRORS
        return schema


class PageFiles(StaticFiles):
    """The page's files, which browsers keep but ask about: after an update, old and new ones would not fit together."""

    def file_response(self, *args: Any, **named: Any) -> Response:
        response = super().file_response(*args, **named)
        response.headers["Cache-Control"] = "no-cache"
        return response


def _add_health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 when the model is loaded; 503 before, with the progress of loading from 0 to 1."""
        progress = round(service.progress, 3)
        if service.scheduler is None:
            return JSONResponse({"status": service.failure or "loading", "progress": progress}, 503)
        proof = service.opened().certificate
        cache = "exact matches only" if proof is None else f"certified {proof.identity}"
        return JSONResponse({"status": "ready", "progress": progress, "cache": cache})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Prometheus's text format."""
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_completions(app: FastAPI, settings: Settings, service: Service, metrics: Metrics) -> None:
    calls = Calls(settings, service, metrics)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """That model, by its name."""
        service.check_model(name)
        return _model(service)

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """A chat completion, whole or streamed; `Cache-Control: no-cache` asks the model in any case."""
        turns = request.conversation(settings)
        bypass = "no-cache" in http.headers.get("cache-control", "").lower()
        calls.log_prompt(http, turns[-1]["content"])

        def begin(ticket: Ticket) -> "Future[Origin]":
            use_cache = request.takes_ready_answers and not bypass
            return service.answer(ticket, turns, use_cache=use_cache, choices=request.emerald.choices)

        return await calls.complete(http, request, Completion, begin)

    @app.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(request: TextRequest, http: Request) -> Response:
        """Goes on with plain text, without persona or cache."""
        calls.log_prompt(http, str(request.prompt))
        return await calls.complete(
            http, request, TextCompletion, lambda ticket: service.continue_text(ticket, request.prompt)
        )

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """Tokens of a text, or of a conversation as the model would read it (vLLM's route)."""
        tokens = await asyncio.wrap_future(service.tokenize(request.wanted(settings)))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine().context}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        """Text of tokens, special ones left out."""
        return {"prompt": await asyncio.wrap_future(service.detokenize(request.tokens))}


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.opened().model_id, "object": "model", "created": 0, "owned_by": OWN_NAME}


def _add_page(app: FastAPI, service: Service) -> None:
    @app.get("/prologue")
    async def prologue() -> dict[str, Any]:
        """What a visitor sees while the model loads."""
        shown = service.opened().prologue()
        return {**shown, "model": service.opened().model_id, "badge": badge(Path(service.settings.build))}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(WEB / "docs.html")

    app.mount("/web", PageFiles(directory=WEB))
    app.mount("/swagger", StaticFiles(directory=swagger_ui_path))


def _add_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(status: int, message: str, headers: dict[str, str], param: str | None = None) -> JSONResponse:
        metrics.refused(status)
        return JSONResponse(error_body(status, message, param), status, headers)

    async def invalid(_http: Request, fault: Exception) -> JSONResponse:
        assert isinstance(fault, RequestValidationError)
        message, param = refusal(list(fault.errors()))
        return answer(400, message, {}, param)

    async def foreseen(_http: Request, fault: Exception) -> JSONResponse:
        return answer(*described(fault))

    async def unforeseen(_http: Request, fault: Exception) -> JSONResponse:
        status, message, headers = described(fault)
        return answer(status, message, {**headers, **SECURITY_HEADERS})  # this is sent past the door

    app.add_exception_handler(RequestValidationError, invalid)
    for kind in FORESEEN:
        app.add_exception_handler(kind, foreseen)
    app.add_exception_handler(Exception, unforeseen)
