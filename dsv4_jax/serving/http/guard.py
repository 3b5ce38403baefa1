"""In front of every route: keys, the number of open requests, an id for each, and faults that stay inside."""

import logging
import secrets
from typing import Any

from dsv4_jax.serving.http import errors
from dsv4_jax.serving.http.bodies import ClientGone, Receive
from dsv4_jax.serving.http.connections import CUT
from dsv4_jax.serving.http.responses import CONTEXT, Context, Send, send_problem
from dsv4_jax.serving.http.service import Service

LOGGER = logging.getLogger(__name__)

ANTHROPIC_PATHS = "/v1/messages"


class Guard:
    """Wraps an ASGI application. Paths are those of the scope: a Host header decides about nothing."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._service
        request_id = f"req_{secrets.token_hex(12)}"
        context = Context(request_id, b"", scope["path"].startswith(ANTHROPIC_PATHS))
        scope[CONTEXT] = context
        started = complete = False

        async def send_with_id(message: Any) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = True
                names = (b"x-request-id", b"request-id") if context.anthropic else (b"x-request-id",)
                ids = ((name, request_id.encode()) for name in names)
                message["headers"] = [*message["headers"], *ids]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        service.num_requests += 1
        try:
            context.tenant = service.keys.tenant(scope["path"], scope["headers"])
            if service.num_requests > service.limits.requests:
                raise errors.unready("too many requests are open", "requests")
            await self._app(scope, receive, send_with_id)
        except ClientGone:
            service.metrics.disconnects.inc()
        except Exception as error:
            if not started:
                problem = errors.problem_of(error, request_id)
                await send_problem(service, scope, send_with_id, problem)
            elif not complete and (cut := scope.get(CUT)):
                cut()
        finally:
            service.num_requests -= 1
            service.bodies.give_back(context.body_bytes)
