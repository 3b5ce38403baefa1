"""Connections over h11: half a request head is waited for only so long, and a stream can be cut off."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv4_jax.serving.http.limits import Limits

CUT = "dsv4.cut"
"""Key of a scope: a function that ends its connection at once, without sending what is buffered."""


def timed_protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol class with the time limit for heads of requests.

    A client that sends its head byte by byte has no more time than one that sends nothing.
    """

    class TimedProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.access_log = False  # lines of it would hold what clients write into paths
            self._head_timer: asyncio.TimerHandle | None = None
            inner = self.app

            async def app(scope: Any, receive: Any, send: Any) -> None:
                scope[CUT] = self.transport.abort
                await inner(scope, receive, send)

            self.app = app

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and self.conn.trailing_data[0]:
                self._watch_head()  # the head of the next request began while this one was answered

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(limits.header_seconds, self._too_late)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_late(self) -> None:
            self._head_timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return TimedProtocol
