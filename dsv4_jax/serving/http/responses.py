"""ASGI responses that watch their client: a whole JSON answer, or a stream of server-sent events."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import Response

from dsv4_jax.serving.http.bodies import ClientGone, Receive
from dsv4_jax.serving.http.errors import HttpProblem, json_bytes, problem_of
from dsv4_jax.serving.http.service import Service

LOGGER = logging.getLogger(__name__)

Send = Callable[[Any], Awaitable[None]]
Headers = list[tuple[str, str]]

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
CONTEXT = "dsv4.context"
"""Key of a scope: the `Context` of its request."""


class Context:
    """What is known about one request before its body.

    Args:
        request_id: in every answer and log line. tenant: who asks. anthropic: in whose form errors are told.
    """

    def __init__(self, request_id: str, tenant: bytes, anthropic: bool) -> None:
        self.request_id, self.tenant, self.anthropic = request_id, tenant, anthropic
        self.body_bytes = 0
        self.has_read_body = False


def event(value: Any, name: str | None = None) -> bytes:
    """One server-sent event of a JSON value."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json_bytes(value) + b"\n\n"


def context_of(scope: Any) -> Context:
    """The context that the guard put into a scope."""
    return scope[CONTEXT]


async def send_json(send: Send, status: int, value: Any, headers: Headers) -> None:
    """Sends a whole response."""
    data = value if isinstance(value, bytes) else json_bytes(value)
    found = [("content-type", "application/json"), ("content-length", str(len(data))), *headers]
    await send({"type": "http.response.start", "status": status, "headers": _encoded(found)})
    await send({"type": "http.response.body", "body": data})


async def send_problem(service: Service, scope: Any, send: Send, problem: HttpProblem) -> None:
    """Sends an error, and counts it."""
    service.metrics.rejected.labels(problem.reason).inc()
    context = context_of(scope)
    if not context.has_read_body and _has_body(scope):
        problem.close = True  # the rest of the body is not waited for
    headers = problem.all_headers()
    await send_json(send, problem.status, problem.body(context.anthropic, context.request_id), headers)


class Refusal(Response):
    """The response to a request that an exception ended before its answer began."""

    background = None

    def __init__(self, service: Service, error: Exception) -> None:
        self._service, self._error = service, error

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if isinstance(self._error, ClientGone):
            self._service.metrics.disconnects.inc()
            return
        problem = problem_of(self._error, context_of(scope).request_id)
        await send_problem(self._service, scope, send, problem)


class Whole(Response):
    """A response whose JSON is computed while the client waits.

    Args:
        service: of the server. work: gives the JSON value; cancelled if the client leaves.
        headers: more of them.
    """

    background = None

    def __init__(self, service: Service, work: Coroutine[Any, Any, Any], headers: Headers) -> None:
        self._service, self._work, self._headers = service, work, headers

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            value = await _until_gone(receive, self._work)
        except ClientGone:
            self._service.metrics.disconnects.inc()
        except Exception as error:
            problem = problem_of(error, context_of(scope).request_id)
            await send_problem(self._service, scope, send, problem)
        else:
            await send_json(send, 200, value, [("cache-control", "no-store"), *self._headers])


class Stream(Response):
    """A response of server-sent events.

    It begins with the first event, so that a refusal still gets a status of its own; a client that waits long
    for it gets comments. An error later is an event, and the last one.

    Args:
        service: of the server. events: encoded ones. headers: more of them.
    """

    background = None

    def __init__(self, service: Service, events: AsyncGenerator[bytes, None], headers: Headers) -> None:
        self._service, self._events = service, events
        self._headers = [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-store"),
            ("x-accel-buffering", "no"),
            *headers,
        ]
        self._started = self._over = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await _until_gone(receive, self._send_all(scope, send), lambda: self._over)
        except ClientGone:
            self._service.metrics.disconnects.inc()

    async def _send_all(self, scope: Any, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events):
                await self._send_events(send)
        except ClientGone:
            raise
        except Exception as error:
            context = context_of(scope)
            problem = problem_of(error, context.request_id)
            self._over = True
            if not self._started:
                await send_problem(self._service, scope, send, problem)
                return
            self._service.metrics.rejected.labels(problem.reason).inc()
            name = "error" if context.anthropic else None
            await self._put(send, event(problem.body(context.anthropic, context.request_id), name))
        self._over = True
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send) -> None:
        seconds = self._service.limits.event_seconds
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({following}, timeout=seconds)
                if not done:
                    await self._put(send, KEEP_ALIVE)
                    continue
                try:
                    piece = following.result()
                except StopAsyncIteration:
                    return
                finally:
                    following = None
                await self._put(send, piece)
        finally:
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _put(self, send: Send, data: bytes) -> None:
        if not self._started:
            self._started = True
            headers = _encoded(self._headers)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _until_gone(
    receive: Receive, work: Coroutine[Any, Any, Any], is_over: Callable[[], bool] = lambda: False
) -> Any:
    """The result of `work`, unless the client leaves first. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and not is_over():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise ClientGone
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _has_body(scope: Any) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("ascii", "replace")) for name, value in headers]
