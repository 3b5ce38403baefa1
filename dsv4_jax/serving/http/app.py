"""The routes, and how each request is answered."""

import asyncio
import importlib.metadata
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from dsv4_jax.serving.http.bodies import check_headers, parsed, read_body
from dsv4_jax.serving.http.chat_completions import ChatAnswer, read_chat
from dsv4_jax.serving.http.completions import CompletionAnswer, read_completion
from dsv4_jax.serving.http.connections import CUT
from dsv4_jax.serving.http.errors import HttpProblem, json_bytes
from dsv4_jax.serving.http.guard import Guard
from dsv4_jax.serving.http.messages import MessageAnswer, count_tokens, read_message
from dsv4_jax.serving.http.page import page
from dsv4_jax.serving.http.responses import Refusal, Stream, Whole, context_of
from dsv4_jax.serving.http.service import Service

WARNING = "x-dsv4-warning"
NO_STORE = {"cache-control": "no-store"}
MAX_WARNING_CHARS = 1000


def build_app(service: Service) -> Guard:
    """The ASGI application of a server."""
    app = FastAPI(title="dsv4", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    _add_state(app, service)
    _add_answers(app, service)

    async def refused(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        message = {404: "there is no such path here", 405: "this path has other methods"}
        return Refusal(
            service,
            HttpProblem(
                error.status_code,
                message.get(error.status_code, "the request cannot be answered"),
                code=code,
                headers=[(name.lower(), value) for name, value in (error.headers or {}).items()],
                reason="route",
            ),
        )

    async def broken(request: Request, error: Exception) -> Response:
        return Refusal(service, error)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(Exception, broken)
    return Guard(app, service)


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_bytes(value), status, NO_STORE, "application/json")


def _add_state(app: FastAPI, service: Service) -> None:
    """Routes that tell about the server itself."""

    found, headers = page()

    @app.get("/", response_model=None)
    async def front() -> Response:
        return Response(found, 200, headers, "text/html; charset=utf-8")

    @app.get("/health", response_model=None)
    async def health() -> Response:
        failed = service.is_failed
        return _json({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        if service.is_failed:
            return _json({"status": "failed"}, 503)
        is_ready = service.state == "ready"
        found = {"status": service.state} | ({} if is_ready else {"doing": service.doing})
        return _json(found, 200 if is_ready else 503)

    @app.get("/version", response_model=None)
    async def version() -> Response:
        return _json({"version": importlib.metadata.version("dsv4_jax")})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), 200, NO_STORE, "text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return _refusing(service, lambda: _json({"object": "list", "data": [_described(service)]}))

    @app.get("/v1/models/{name}", response_model=None)
    async def one_model(name: str) -> Response:
        def described() -> Response:
            service.check_name(name)
            return _json(_described(service))

        return _refusing(service, described)


def _refusing(service: Service, answer: Callable[[], Response]) -> Response:
    try:
        return answer()
    except HttpProblem as problem:
        return Refusal(service, problem)


def _described(service: Service) -> dict[str, Any]:
    model = service.model()
    return {
        "id": service.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dsv4_jax",
        "max_model_len": model.engine.settings.max_length,
    }


def _add_answers(app: FastAPI, service: Service) -> None:
    """Routes that ask the model."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Any:
        return await _answered(service, request, read_chat, ChatAnswer)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Any:
        return await _answered(service, request, read_completion, CompletionAnswer)

    @app.post("/v1/messages", response_model=None)
    async def messages(request: Request) -> Any:
        return await _answered(service, request, read_message, MessageAnswer)

    @app.post("/v1/messages/count_tokens", response_model=None)
    async def count(request: Request) -> Any:
        body = await body_of(service, request)
        return _json(await asyncio.to_thread(count_tokens, service, service.model(), body))


async def body_of(service: Service, request: Request) -> dict[str, Any]:
    """The JSON object that a request brings. Raises HttpProblem, ClientGone."""
    context = context_of(request.scope)
    check_headers(request.scope["headers"], service.limits)
    data = await read_body(request.receive, service.limits, service.bodies)
    context.body_bytes, context.has_read_body = len(data), True
    return await parsed(data)


async def _answered(
    service: Service,
    request: Request,
    read: Callable[..., Any],
    answer_type: type[ChatAnswer | CompletionAnswer | MessageAnswer],
) -> Any:
    # First the body: a connection that is closed with bytes unread is reset, and its answer may be lost.
    body = await body_of(service, request)
    model = service.model()
    checked = await asyncio.to_thread(read, service, model, body)
    salt = service.salt(context_of(request.scope).tenant, checked.fields.cache_salt)
    answer = answer_type(service, model, checked, salt, request.scope.get(CUT))
    headers = []
    if warnings := getattr(checked, "warnings", ()):
        headers.append((WARNING, "; ".join(warnings)[:MAX_WARNING_CHARS]))
    if checked.fields.stream:
        return Stream(service, answer.stream(), headers)
    return Whole(service, answer.whole(), headers)
