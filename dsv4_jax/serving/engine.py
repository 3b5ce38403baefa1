"""The engine as programs use it: requests from any thread or event loop, answers as they are drawn.

One thread of its own runs the steps (`core`). A request whose caller stops listening is aborted within one
step. If a step fails, every request that is being served gets the error, and no later one is accepted.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference.text import prompt_ids
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import FinishReason, Output, Sampling, TokenLogprob
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.serving.step_tokens import StepTokens

LOGGER = logging.getLogger(__name__)

DEFAULT = Sampling()

IDLE_SECONDS = 0.5
"""How long the engine's thread sleeps at most when there is nothing to do."""


class EngineBusy(RuntimeError):
    """Too many requests wait already: try again later."""


class EngineStopped(RuntimeError):
    """The engine was closed, or a step of it failed."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """All outputs of one request together."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    error: str | None = None

    @staticmethod
    def of(outputs: Sequence[Output]) -> "Answer":
        """Joins the outputs of one request; the last one has a finish reason."""
        last = outputs[-1]
        assert last.finish_reason is not None
        return Answer(
            tuple(token for output in outputs for token in output.token_ids),
            "".join(output.text for output in outputs),
            last.finish_reason,
            tuple(logprob for output in outputs for logprob in output.logprobs),
            max(output.cached_tokens for output in outputs),
            last.error,
        )


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """Numbers of one moment, for metrics."""

    num_running: int
    num_waiting: int
    num_finished: int
    prompt_tokens: int
    generated_tokens: int
    prefix_tokens_asked: int
    prefix_tokens_found: int
    num_preemptions: int
    steps: int
    drafts: tuple[tuple[int, int], ...] = ()  # (kept, tried) at each place behind a token
    guesses: int = 0  # of drafts, whether or not one before them was wrong
    draft_steps: tuple[tuple[int, int], ...] = ()  # (drafts that a step verified, such steps)
    tokens_held: int = 0  # in the rows of slots
    prefix_pages: int = 0  # that hold something
    steps_by_tokens: tuple[int, ...] = ()  # by `step_tokens.BOUNDS`
    step_tokens: int = 0  # of all steps


Listener = Callable[[Output], None]


class Engine:
    """Serves requests in a thread of its own. Use it as a context manager, or call `close`.

        with Engine(dsv4_jax.load(folder)) as engine:
            answer = engine.complete("def ", Sampling(max_tokens=20))

    Args:
        lm: the model. settings: sizes of the engine.
        most_waiting: requests that may wait for a slot; more are refused with `EngineBusy`.
        warm_up: compile everything before the first request is accepted.

    Raises:
        ProblemsError: for settings that cannot work.
    """

    def __init__(
        self,
        lm: LanguageModel,
        settings: EngineSettings | None = None,
        *,
        most_waiting: int = 512,
        warm_up: bool = True,
    ) -> None:
        self.lm, self.settings = lm, settings or EngineSettings()
        self._core = EngineCore(lm, self.settings)
        self.warm_up_seconds = self._core.warm_up() if warm_up else 0.0
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._listeners: dict[int, Listener] = {}
        self._adding: set[concurrent.futures.Future[int]] = set()  # asked for, not yet seen by the core
        self._closing = False
        self._failure: BaseException | None = None
        self._num_open = 0  # accepted and not finished
        self._finished = self._prompt_tokens = self._generated = 0
        self._step_tokens = StepTokens()
        self._thread = threading.Thread(target=self._run, name="dsv4-engine", daemon=True)
        self._thread.start()

    # ---- for callers -----------------------------------------------------------------------------

    def ids_of(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The token ids of a prompt; of text as `inference.text.prompt_ids` makes them.

        Raises:
            ProblemsError: for text if the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.lm.tokenizer is None:
            raise ProblemsError("this request cannot be served", ["text needs a tokenizer.json"])
        return tuple(prompt_ids(self.lm.tokenizer, prompt, self.lm.config.bos_token_id))

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = DEFAULT,
        *,
        salt: bytes = b"",
        priority: int = 0,
    ) -> AsyncIterator[Output]:
        """Yields what each step adds, the last with a finish reason. Leaving the loop aborts the request.

        Raises:
            ProblemsError: for a request that cannot be served.
            EngineBusy: if too many wait. EngineStopped: if the engine is closed or has failed.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Output] = asyncio.Queue()

        def deliver(output: Output) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, output)
            except RuntimeError:  # the caller's loop was closed: nobody listens
                pass

        added = self._submit(self.ids_of(prompt), sampling, salt, priority, deliver)
        try:
            number = await asyncio.wrap_future(added)
        except asyncio.CancelledError:
            added.add_done_callback(self._abort_if_added)
            raise
        try:
            while True:
                output = await queue.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._abort(number)

    def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = DEFAULT,
        *,
        salt: bytes = b"",
        priority: int = 0,
    ) -> Answer:
        """The whole answer to one prompt; waits for it. Errors as `generate`."""
        return self.complete_all([prompt], [sampling], salt=salt, priority=priority)[0]

    def complete_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        samplings: Sequence[Sampling] | Sampling = DEFAULT,
        *,
        salt: bytes = b"",
        priority: int = 0,
    ) -> list[Answer]:
        """The answers to several prompts, served together, in their order. Errors as `generate`."""
        if isinstance(samplings, Sampling):
            samplings = [samplings] * len(prompts)
        waiting: list[tuple[concurrent.futures.Future[list[Output]], int]] = []
        try:
            for prompt, sampling in zip(prompts, samplings, strict=True):
                done: concurrent.futures.Future[list[Output]] = concurrent.futures.Future()
                deliver = _collecting(done)
                added = self._submit(self.ids_of(prompt), sampling, salt, priority, deliver)
                waiting.append((done, added.result()))
            return [Answer.of(done.result()) for done, _ in waiting]
        except BaseException:
            for _, number in waiting:
                self._abort(number)
            raise

    def status(self) -> EngineStatus:
        """Numbers of this moment."""
        core, prefixes = self._core, self._core.prefixes
        with self._changed:
            return EngineStatus(
                num_running=core.scheduler.num_running,
                num_waiting=self._num_open - core.scheduler.num_running,
                num_finished=self._finished,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated,
                prefix_tokens_asked=prefixes.queries if prefixes else 0,
                prefix_tokens_found=prefixes.hits if prefixes else 0,
                num_preemptions=core.scheduler.num_preemptions,
                steps=core.steps,
                drafts=core.acceptance.by_place(),
                guesses=core.acceptance.guesses,
                draft_steps=tuple(sorted(core.widths.steps.copy().items())),
                tokens_held=core.scheduler.tokens_held,
                prefix_pages=len(prefixes) if prefixes else 0,
                steps_by_tokens=tuple(self._step_tokens.counts),
                step_tokens=self._step_tokens.total,
            )

    @property
    def failed(self) -> bool:
        """Whether a step failed: nothing is served any more."""
        return self._failure is not None

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets running ones go on for so long, aborts the rest, and ends the thread."""
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._num_open and self._thread.is_alive() and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            for number in list(self._listeners):
                self._commands.append(lambda number=number: self._core.abort(number))
            self._commands.append(self._end)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- between threads -------------------------------------------------------------------------

    def _submit(
        self, ids: tuple[int, ...], sampling: Sampling, salt: bytes, priority: int, deliver: Listener
    ) -> concurrent.futures.Future[int]:
        added: concurrent.futures.Future[int] = concurrent.futures.Future()

        def add() -> None:
            with self._changed:
                self._adding.discard(added)
                if not added.set_running_or_notify_cancel():  # its caller has gone already
                    self._num_open -= 1
                    return
            try:
                number = self._core.add(ids, sampling, salt=salt, priority=priority)
            except BaseException as refused:
                with self._changed:
                    self._num_open -= 1
                added.set_exception(refused)
                return
            with self._changed:
                self._prompt_tokens += len(ids)
                self._listeners[number] = deliver
            added.set_result(number)

        with self._changed:
            self._check_open()
            if self._num_open >= self._most_waiting + self.settings.num_slots:
                raise EngineBusy(f"{self._num_open} requests are served or wait already")
            self._num_open += 1
            self._adding.add(added)
            self._commands.append(add)
            self._changed.notify_all()
        return added

    def _abort(self, number: int) -> None:
        with self._changed:
            self._commands.append(lambda: self._core.abort(number))
            self._changed.notify_all()

    def _abort_if_added(self, added: concurrent.futures.Future[int]) -> None:
        if not added.cancelled() and added.exception() is None:
            self._abort(added.result())

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineStopped("a step of the engine failed") from self._failure
        if self._closing:
            raise EngineStopped("the engine is closed")

    def _end(self) -> None:
        raise _Ended

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._commands and not self._core.has_work:
                        self._changed.wait(IDLE_SECONDS)
                    commands = list(self._commands)
                    self._commands.clear()
                ended = False
                for command in commands:
                    try:
                        command()
                    except _Ended:
                        ended = True
                before = self._core.prefilled
                outputs = self._core.step() if self._core.has_work else []
                drawn = sum(len(output.token_ids) for _, output in outputs)
                self._step_tokens.add(self._core.prefilled - before + drawn)
                self._deliver(outputs)
                if ended:
                    return
        except BaseException as failure:
            LOGGER.exception("a step of the engine failed")
            with self._changed:
                self._failure = failure
        finally:
            self._abandon()
            self._core.close()

    def _deliver(self, outputs: Sequence[tuple[int, Output]]) -> None:
        for number, output in outputs:
            listener = self._listeners.get(number)
            with self._changed:
                self._generated += len(output.token_ids)
                if output.finish_reason is not None:
                    self._listeners.pop(number, None)
                    self._finished += 1
                    self._num_open -= 1
                    self._changed.notify_all()
            if listener is not None:
                listener(output)

    def _abandon(self) -> None:
        """Tells everybody who still listens that nothing more comes."""
        with self._changed:
            why = "the engine was closed" if self._failure is None else f"a step failed: {self._failure}"
            listeners, self._listeners = list(self._listeners.values()), {}
            adding, self._adding = self._adding, set()
            self._closing = True
            self._num_open = 0
            self._changed.notify_all()
        for listener in listeners:
            listener(Output(finish_reason="error", error=why))
        for added in adding:
            if added.set_running_or_notify_cancel():
                added.set_exception(EngineStopped(why))


class _Ended(Exception):
    """The thread's order to end."""


def _collecting(done: concurrent.futures.Future[list[Output]]) -> Listener:
    outputs: list[Output] = []

    def deliver(output: Output) -> None:
        outputs.append(output)
        if output.finish_reason is not None:
            done.set_result(outputs)

    return deliver
