"""Request bodies: counted while they arrive, and parsed strictly."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dsv4_jax.reading.strict_json import JsonError, parse_json
from dsv4_jax.serving.chat.wire import json_problem
from dsv4_jax.serving.http.errors import HttpProblem, invalid, unready
from dsv4_jax.serving.http.limits import MAX_JSON_DEPTH, MAX_JSON_ITEMS, Limits

Receive = Callable[[], Awaitable[Any]]
Headers = Sequence[tuple[bytes, bytes]]

LARGE = 1 << 18
"""Bytes from which a body is parsed in another thread, so that others do not wait for it."""


class ClientGone(Exception):
    """Nobody listens any more."""


class BodyRoom:
    """Bytes of all bodies that are held at once.

    Args:
        most: of them.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, size: int) -> None:
        """Counts more bytes. Raises HttpProblem (503) if there is no room."""
        if self.used + size > self.most:
            problem = unready("the requests that are being read are too large together", "bodies")
            problem.close = True
            raise problem
        self.used += size

    def give_back(self, size: int) -> None:
        """The bytes are no longer held."""
        self.used -= size


def _header(headers: Headers, name: bytes) -> str:
    return b",".join(value for key, value in headers if key == name).decode("latin-1").strip().lower()


def check_headers(headers: Headers, limits: Limits) -> None:
    """Refuses what cannot be JSON, or says itself that it is too long.

    Raises:
        HttpProblem: 413, 415.
    """
    length = _header(headers, b"content-length")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large(limits)
    if _header(headers, b"content-encoding") not in ("", "identity"):
        raise HttpProblem(415, "content-encoding: compressed bodies are not read", close=True)
    kind, *parameters = (part.strip() for part in _header(headers, b"content-type").split(";"))
    charset = [each.partition("=")[2].strip('"') for each in parameters if each.startswith("charset=")]
    if kind != "application/json" or any(each not in ("utf-8", "utf8") for each in charset):
        raise HttpProblem(415, "content-type: must be application/json in UTF-8", close=True)


def too_large(limits: Limits) -> HttpProblem:
    """413, which ends the connection."""
    message = f"the body is larger than {limits.body_bytes} bytes"
    return HttpProblem(413, message, code="too_large", close=True, reason="body_too_large")


async def read_body(receive: Receive, limits: Limits, room: BodyRoom) -> bytes:
    """The whole body. The caller gives its bytes back to `room`; after an error nothing is held.

    Raises:
        HttpProblem: 413, 408. ClientGone: if the client left.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece = message.get("body", b"")
                if size + len(piece) > limits.body_bytes:
                    raise too_large(limits)
                room.take(len(piece))
                size += len(piece)
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except BaseException as error:
        room.give_back(size)
        if isinstance(error, TimeoutError):
            message = f"the body took longer than {limits.body_seconds:g} s"
            raise HttpProblem(408, message, code="timeout", close=True, reason="slow_body") from None
        raise


async def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Of equal keys the last counts.

    Raises:
        HttpProblem: 400 for anything that is not one JSON object of whole characters and finite numbers.
    """
    return await asyncio.to_thread(_parsed, data) if len(data) >= LARGE else _parsed(data)


def _parsed(data: bytes) -> dict[str, Any]:
    if not data:
        raise invalid(["the body is empty: a JSON object is needed"])
    try:
        value = parse_json(data, max_depth=MAX_JSON_DEPTH, max_items=MAX_JSON_ITEMS)
    except JsonError as error:
        # What is not JSON may be anything, such as a key in the wrong place: no piece of it is shown.
        reason = str(error)
        if reason.startswith("holds "):
            reason = "holds a number that is not finite"
        elif not reason.startswith(("has ", "is not UTF-8")):
            reason = "is no valid JSON"
        raise invalid([f"the body {reason}"]) from None
    if not isinstance(value, dict):
        raise invalid(["the body must be a JSON object"])
    if problem := json_problem(value):
        raise invalid([f"the body {problem}"])
    return value
