"""From the first byte on the port to exit 0: HTTP at once, the model in a thread, a graceful end."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from dsv4_jax.serving.http.app import build_app
from dsv4_jax.serving.http.connections import timed_protocol
from dsv4_jax.serving.http.limits import MAX_HEADER_BYTES
from dsv4_jax.serving.http.service import Model, Service

LOGGER = logging.getLogger(__name__)

POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 5.0
"""For answers to leave after their requests were aborted."""


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end the process by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    service: Service,
    load: Callable[[Service], Model],
    *,
    host: str,
    port: int,
    drain_seconds: float,
    announce: Callable[[str], None],
) -> None:
    """Serves until a signal or a failure. Call it in the main thread.

    SIGTERM or SIGINT: nothing new is accepted, what runs has `drain_seconds`, the rest is aborted with an
    error. A second signal ends the process at once.

    Args:
        service: of the server. load: makes the model; runs in a thread.
        host, port: to listen on; port 0 takes a free one. announce: tells the operator.

    Raises:
        BaseException: what `load` raised. RuntimeError: if the engine failed. OSError: if the port is taken.
    """
    server = _Server(configured(service, host, port))
    asyncio.run(_serve(service, load, server, drain_seconds, announce))
    if service.is_failed:
        raise RuntimeError("the engine failed; its log is above")


def configured(service: Service, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Config:
    """uvicorn's settings for a service; address as of `run`."""
    return uvicorn.Config(
        build_app(service),
        host=host,
        port=port,
        http=timed_protocol(service.limits),
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=max(1, round(service.limits.keep_alive_seconds)),
        timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
        backlog=2048,
    )


async def _serve(
    service: Service,
    load: Callable[[Service], Model],
    server: _Server,
    drain_seconds: float,
    announce: Callable[[str], None],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            announce("second signal: ending at once")
            sys.stderr.flush()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    sockets = [server.config.bind_socket()]
    sockets[0].listen(server.config.backlog)  # what is announced takes connections, if not answers yet
    host, port = sockets[0].getsockname()[:2]
    announce(f"listening on http://{host}:{port} (not ready yet)")
    serving = asyncio.create_task(server.serve(sockets))
    loading = _in_thread(lambda: load(service))
    try:
        failure = await _until_stopped(service, loading, stop, serving, announce)
        await _drained(service, drain_seconds, announce)
    finally:
        server.should_exit = True
        await serving
    if service.loaded is not None:
        service.loaded.engine.close()
    if failure is not None:
        raise failure
    if not loading.done():
        # A compiler cannot be interrupted, and the interpreter would wait for its threads.
        announce("stopped while loading")
        sys.stderr.flush()
        os._exit(0)
    announce("stopped")


def _in_thread(work: Callable[[], Model]) -> asyncio.Future[Model]:
    """The result of a call in a daemon thread, which never keeps the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Model] = loop.create_future()

    def settle(set_result: Callable[..., None], value: object) -> None:
        if not future.done():
            set_result(value)

    def target() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, result)

    threading.Thread(target=target, name="dsv4-load", daemon=True).start()
    return future


async def _until_stopped(
    service: Service,
    loading: asyncio.Future[Model],
    stop: asyncio.Event,
    serving: asyncio.Task[None],
    announce: Callable[[str], None],
) -> BaseException | None:
    """Waits for a reason to end; returns the failure, if it was one."""
    while not stop.is_set():
        if service.state == "loading" and loading.done():
            if (error := loading.exception()) is not None:
                service.state = "failed"
                return error
            service.become_ready(loading.result())
            announce(f"ready: {service.name} at /v1, {'with' if service.keys else 'without'} keys")
        if service.is_failed:
            service.state = "failed"
            announce("the engine failed: ending")
            await asyncio.sleep(1.0)  # those who wait get their errors
            return None
        if serving.done():
            return serving.exception()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), POLL_SECONDS)
    return None


async def _drained(service: Service, seconds: float, announce: Callable[[str], None]) -> None:
    if service.state == "failed":
        return
    service.state, service.doing = "draining", "stopping"
    if service.num_requests:
        announce(f"stopping: {service.num_requests} requests have {seconds:g} s")
    until = time.monotonic() + seconds
    while service.num_requests and time.monotonic() < until:
        await asyncio.sleep(POLL_SECONDS)
    if service.num_requests and service.loaded is not None:
        announce(f"aborting {service.num_requests} requests")
        await asyncio.to_thread(service.loaded.engine.close)
    until = time.monotonic() + LAST_WORDS_SECONDS
    while service.num_requests and time.monotonic() < until:
        await asyncio.sleep(POLL_SECONDS)
