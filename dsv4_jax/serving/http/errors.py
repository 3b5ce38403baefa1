"""Refusals, and how they look to a client of OpenAI's or Anthropic's interface.

A message names the field and the rule. It never repeats what the client sent, a path or a stack.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.engine import EngineBusy, EngineStopped

LOGGER = logging.getLogger(__name__)

SHOWN = 20
RETRY_BUSY, RETRY_UNREADY = 1, 5
"""Seconds after which a client should ask again."""

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class HttpProblem(Exception):
    """A request that gets an error.

    Args:
        status: of HTTP. message: for the client. param: the field. code: a word for programs.
        kind: OpenAI's `type`. retry_after: seconds. close: the connection cannot be used again.
        reason: a label for the metric of rejected requests.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
        close: bool = False,
        reason: str = "invalid",
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind, self.retry_after, self.close, self.reason = kind, retry_after, close, reason
        self.headers = tuple(headers)

    def body(self, anthropic: bool, request_id: str) -> dict[str, Any]:
        """The JSON object of the error."""
        if anthropic:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            error = {"type": kind, "message": self.message}
            return {"type": "error", "error": error, "request_id": request_id}
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def all_headers(self) -> list[tuple[str, str]]:
        """Headers of the response beside its type and length."""
        found = [("cache-control", "no-store"), *self.headers]
        if self.retry_after is not None:
            found.append(("retry-after", str(self.retry_after)))
        if self.close:
            found.append(("connection", "close"))
        return found


def invalid(problems: Sequence[str]) -> HttpProblem:
    """400 for broken rules, each written as `field: rule` or as a sentence."""
    first, colon, _ = problems[0].partition(": ")
    param = first if colon and " " not in first and len(first) < 200 else None
    shown = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        shown.append(f"and {len(problems) - SHOWN} more")
    return HttpProblem(400, "; ".join(shown), param=param, code="invalid_value")


def busy(message: str) -> HttpProblem:
    """429: ask again later."""
    return HttpProblem(
        429, message, kind="rate_limit_error", code="busy", retry_after=RETRY_BUSY, reason="busy"
    )


def unready(message: str, reason: str) -> HttpProblem:
    """503: loading, draining or broken."""
    return HttpProblem(
        503, message, kind="server_error", code=reason, retry_after=RETRY_UNREADY, reason=reason
    )


def fault(request_id: str) -> HttpProblem:
    """500 that tells nothing but the id under which the log tells more."""
    message = f"the server had a fault; its log tells about request {request_id}"
    return HttpProblem(500, message, kind="server_error", code="internal_error", reason="fault")


def problem_of(error: BaseException, request_id: str) -> HttpProblem:
    """What a client is told about an exception; faults are logged with their stack."""
    match error:
        case HttpProblem():
            return error
        case ProblemsError():
            return invalid(error.problems or (error.what,))
        case EngineBusy():
            return busy("too many requests wait already")
        case EngineStopped():
            return unready("the server is stopping", "stopping")
    LOGGER.error("request %s failed", request_id, exc_info=error)
    return fault(request_id)


def json_bytes(value: Any) -> bytes:
    """Compact JSON of whole characters and finite numbers.

    Raises:
        ValueError: for a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")
