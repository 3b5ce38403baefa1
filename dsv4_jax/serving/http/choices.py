"""The answers to one HTTP request, as they come from the engine: several at once, bounded, with deadlines."""

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Self

from dsv4_jax.serving.http.bodies import ClientGone
from dsv4_jax.serving.http.errors import HttpProblem, unready
from dsv4_jax.serving.http.service import Model, Service
from dsv4_jax.serving.requests import Output, Sampling

Asked = tuple[Sequence[int], Sampling]


class Choices:
    """Answers to several prompts, served together; a context manager that leaves nothing behind.

    Args:
        service: of the server. model: its model. asked: (ids, sampling) of each choice.
        salt: of the prefix cache.
        cut: ends the connection, for a reader that falls too far behind.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        asked: Sequence[Asked],
        salt: bytes,
        cut: Callable[[], None] | None = None,
    ) -> None:
        self._service, self._model, self._asked = service, model, asked
        self._salt, self._cut = salt, cut
        self._start = time.monotonic()
        self._ready: collections.deque[tuple[int, Output]] = collections.deque()
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open = set(range(len(asked)))
        self._waiting = {index: len(ids) for index, (ids, _) in enumerate(asked)}
        self._last = dict.fromkeys(self._open, self._start)
        self._first: dict[int, float] = {}  # when the first output came
        self.counts = [0] * len(asked)
        self.cached = [0] * len(asked)

    async def __aenter__(self) -> Self:
        self._service.take_waiting(sum(self._waiting.values()))
        self._tasks = [asyncio.create_task(self._run(index)) for index in self._open]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for index in list(self._waiting):
            self._no_longer_waits(index)

    async def more(self) -> list[tuple[int, Output]]:
        """What came since the last call, (choice, output) in order; [] when all answers are complete.

        Raises:
            HttpProblem: for an answer that failed, or a deadline. EngineBusy, ProblemsError: as the engine.
            ClientGone: the reader was cut off.
        """
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._news.clear()
            try:
                async with asyncio.timeout(self._seconds_left()):
                    await self._news.wait()
            except TimeoutError:
                raise self._too_late() from None
        found = [(index, output) for index, output in self._ready if index in self._open]
        self._ready.clear()
        for index, output in found:
            if output.finish_reason is not None:
                self._end(index, output.finish_reason)
        return found or await self.more()

    def stop(self, index: int, reason: str = "stop") -> None:
        """Nothing more is wanted of a choice: its slot becomes free."""
        if index in self._open:
            self._tasks[index].cancel()
            self._end(index, reason)

    def _end(self, index: int, reason: str) -> None:
        self._open.discard(index)
        metrics = self._service.metrics
        metrics.successes.labels(reason).inc()
        now = time.monotonic()
        metrics.whole.observe(now - self._start)
        if index in self._first:
            metrics.decoding.observe(now - self._first[index])
        metrics.prompt_sizes.observe(len(self._asked[index][0]))
        metrics.answer_sizes.observe(self.counts[index])

    async def _run(self, index: int) -> None:
        ids, sampling = self._asked[index]
        outputs = self._model.engine.generate(tuple(ids), sampling, salt=self._salt)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._take(index, output)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)

    def _take(self, index: int, output: Output) -> None:
        if output.finish_reason in ("error", "aborted"):
            raise self._broken(output)
        now, metrics = time.monotonic(), self._service.metrics
        if index in self._waiting:
            self._no_longer_waits(index)
            self._first[index] = now
            metrics.first_token.observe(now - self._start)
            if output.queue_seconds is not None and output.prefill_seconds is not None:
                metrics.queueing.observe(output.queue_seconds)
                metrics.prefilling.observe(output.prefill_seconds)
        else:
            metrics.between_tokens.observe(now - self._last[index])
        self._last[index] = now
        self.counts[index] += len(output.token_ids)
        self.cached[index] = max(self.cached[index], output.cached_tokens)
        if len(self._ready) >= self._service.limits.backlog:
            metrics.slow_readers.inc()
            if self._cut is not None:
                self._cut()
            raise ClientGone
        self._ready.append((index, output))
        self._news.set()

    def _broken(self, output: Output) -> HttpProblem:
        if output.finish_reason == "aborted" or self._service.state == "draining":
            return unready("the server is stopping", "draining")
        if output.is_stuck:
            message = "the answer came to a place where its grammar allows no token"
            return HttpProblem(500, message, kind="server_error", code="grammar_error", reason="grammar")
        self._service.metrics.corrupted.inc()
        message = "the model could not continue: its numbers are not finite, or the engine failed"
        return HttpProblem(500, message, kind="server_error", code="engine_error", reason="engine")

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._news.set()

    def _no_longer_waits(self, index: int) -> None:
        self._service.waiting_tokens -= self._waiting.pop(index)

    def _seconds_left(self) -> float | None:
        limits, ends = self._service.limits, []
        if self._waiting:
            ends.append(self._start + limits.queue_seconds)
        if limits.request_seconds is not None:
            ends.append(self._start + limits.request_seconds)
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _too_late(self) -> HttpProblem:
        wall = self._service.limits.request_seconds
        if wall is not None and time.monotonic() - self._start >= wall:
            message = f"the request took longer than {wall:g} s"
            return HttpProblem(504, message, kind="server_error", code="timeout", reason="request_timeout")
        return unready("the request waited too long for its first token", "queue_timeout")
