"""The engine's loop body: a step admits, computes a chunk of every prompt, and draws a token a slot.

Everything happens in the caller's thread. `engine` runs it in one of its own for asynchronous callers.
"""

import collections
import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference.sampling import NO_TOKEN
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache_blocks
from dsv4_jax.serving.acceptance import DraftAcceptance
from dsv4_jax.serving.answers import AnswerText, logprob
from dsv4_jax.serving.constraints import Guide, Masks
from dsv4_jax.serving.decode import Drawn, decode
from dsv4_jax.serving.lanes import Lanes, rows_for
from dsv4_jax.serving.prefix_cache import PrefixCache
from dsv4_jax.serving.requests import FinishReason, Output, Sampling, checked_request
from dsv4_jax.serving.scheduler import Scheduler, Sequence
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.serving.slots import Slots, empty_slots, interrupt, new_slot, place, stop_slots
from dsv4_jax.serving.widths import DraftWidths

NOTHING = Output()

MEASURED_STEPS = 5
"""Steps of every width that are timed when the engine starts; the shortest counts."""

NO_WAY = "the grammar of this answer has come to a place where it allows no token"


@dataclasses.dataclass
class _Pending:
    """A step whose tokens are still on the device, and who was in which slot."""

    drawn: Drawn
    width: int  # drafts that it verified at most
    served: list[Sequence | None]
    holds: bool  # some of them drew under a grammar: their next masks depend on what they drew


def _of_first(sequence: Sequence) -> dict[str, Any]:
    """What the first output of an answer tells beside its token."""
    assert sequence.admitted is not None
    return {
        "cached_tokens": sequence.cached,
        "queue_seconds": sequence.admitted - sequence.came,
        "prefill_seconds": time.monotonic() - sequence.admitted,
    }


class EngineCore:
    """Continuous batching over one model. Not thread safe.

    A request's tokens are the same alone, in any batch, in any slot, after a prefix hit and after it was
    interrupted: prompts are always cut at the same places, programs have fixed shapes, and a draw depends on
    the request's seed and position alone. In bfloat16 this needs steps of one width, if there are drafts
    (`EngineSettings`).

    Args:
        lm: the model. settings: sizes.

    Raises:
        ProblemsError: for sizes that cannot work.
    """

    def __init__(self, lm: LanguageModel, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        smallest = cache_blocks.block_length(lm.config)
        if problems := settings.problems(smallest, lm.config):
            raise ProblemsError("the engine cannot start", problems)
        self.lm, self.settings = lm, settings
        self.block = settings.chunk or -(-128 // smallest) * smallest
        self.scheduler = Scheduler(settings.num_slots, settings.num_lanes, self.block)
        self.steps = self.prefilled = 0
        self._lanes = Lanes(lm, settings, self.block)
        self._cache = rows_for(lm, settings, settings.num_slots)
        self._slots = self._empty_slots()
        self.acceptance = DraftAcceptance(settings.draft)
        self.widths = DraftWidths(settings.widths(lm.config))
        put = functools.partial(lm.network.put, dims="B")
        self._masks = Masks(put, settings.num_slots, lm.config.vocab_size)
        self._sequences: dict[int, Sequence] = {}
        self._pending: _Pending | None = None
        self._outputs: collections.deque[tuple[int, Output]] = collections.deque()

    @property
    def prefixes(self) -> PrefixCache[cache_blocks.State] | None:
        """Prefixes that are known; None: the engine keeps none."""
        return self._lanes.prefixes

    # ---- requests --------------------------------------------------------------------------------

    def add(
        self, prompt: tuple[int, ...], sampling: Sampling, *, salt: bytes = b"", priority: int = 0
    ) -> int:
        """Queues a request and gives it a number.

        Args:
            prompt: token ids. sampling: how to draw.
            salt: prefixes are shared among requests of equal salt alone (a tenant's).
            priority: smaller ones come first, and may interrupt others.

        Raises:
            ProblemsError: for what cannot be served.
        """
        lm = self.lm
        stops = checked_request(
            prompt,
            sampling,
            lm.stop_token_ids,
            lm.tokenizer is not None,
            lm.config.vocab_size,
            self.settings.max_length,
        )
        sequence = Sequence(
            self.scheduler.next_id(), tuple(prompt), sampling, stops, salt=salt, priority=priority
        )
        sequence.text = AnswerText(lm.tokenizer, sampling, stops)
        if sampling.grammar is not None:
            sequence.guide = Guide(sampling.grammar, stops)
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    def abort(self, number: int) -> None:
        """Ends a request; its slot is free from the next step on. Others stay as they are."""
        if sequence := self._sequences.get(number):
            self._finish(sequence, "aborted")

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give back."""
        return bool(self._sequences or self._pending or self._outputs)

    # ---- a step ----------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, Output]]:
        """Starts one step on the device and returns what earlier ones gave: (request, output) in order.

        The step before is read after this one is started, unless it drew under a grammar (`constraints`).
        """
        if self._pending is not None and self._pending.holds:
            previous, self._pending = self._pending, None
            self._read(previous)
        while (victim := self.scheduler.victim()) is not None:
            self.preempt(victim.id)
        for sequence in self.scheduler.admit():
            if sequence.kept is None:
                sequence.admitted = time.monotonic()
                self._lanes.begin(sequence)
            else:
                (cache, logits), sequence.kept = sequence.kept, None
                self._place(sequence, cache, logits, 0)
        if chunks := self.scheduler.chunks():
            self._lanes.append(chunks)
            self.prefilled += sum(chunk.count for chunk in chunks)
            for chunk in chunks:
                if chunk.is_last:
                    lane = chunk.sequence.lane
                    self.scheduler.complete(chunk.sequence)
                    self._place(chunk.sequence, self._lanes.cache, self._lanes.logits, lane)
        previous, self._pending = self._pending, None
        served = self._served()
        masks, given, stuck = self._masks.of([each and each.guide for each in served])
        if stuck:
            for slot in stuck:
                self._finish(served[slot], "error", Output(is_stuck=True), error=NO_WAY)
            served = self._served()
        if any(served):
            width = self.widths.next()
            drawn = self._decode(width, masks, given)
            holds = any(each and each.guide and each.guide.is_open for each in served)
            self._pending = _Pending(drawn, width, served, holds)
            self.steps += 1
        if previous is not None:
            self._read(previous)
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def preempt(self, number: int) -> bool:
        """Takes a running request's slot and queues it again, with its row kept; it goes on bit for bit.

        Returns:
            Whether there was such a request in a slot.
        """
        # What is still on the device may have ended it.
        pending, self._pending = self._pending, None
        if pending is not None:
            self._read(pending)
        sequence = self._sequences.get(number)
        if sequence is None or sequence.stage != "running":
            return False
        cache, logits, self._slots = interrupt(self._cache, self._slots, np.int32(sequence.slot))
        sequence.kept = (cache, logits)
        self.scheduler.preempt(sequence)
        return True

    def _decode(self, width: int, masks: jax.Array, given: jax.Array) -> Drawn:
        lm = self.lm
        drawn, self._cache, self._slots = decode(
            lm.network, self.settings.draft, width, lm.parameters, self._cache, self._slots, masks, given
        )
        return drawn

    def _empty_slots(self) -> Slots:
        settings, put = self.settings, self.lm.network.put
        history = settings.max_length if settings.draft == "lookup" else 0
        empty = empty_slots(settings.num_slots, self.lm.config.vocab_size, history)
        return jax.tree.map(lambda leaf: put(leaf, "B"), empty)

    def _served(self) -> list[Sequence | None]:
        return [each if each and each.stage == "running" else None for each in self.scheduler.slots]

    def _place(self, sequence: Sequence, cache: Any, logits: jax.Array, row: int) -> None:
        sizes = (self.settings.max_length, self.lm.config.vocab_size)
        drawn = sequence.prompt, sequence.output
        new = new_slot(*drawn, sequence.sampling, sequence.stops, *sizes, sequence.guide)
        where = np.int32(row), np.int32(sequence.slot)
        self._cache, self._slots = place(self._cache, self._slots, cache, logits, *where, new)

    # ---- what came back --------------------------------------------------------------------------

    def _read(self, pending: _Pending) -> None:
        drawn = jax.device_get(pending.drawn)
        stopped = np.zeros(self.settings.num_slots, bool)
        kept: list[int] = []
        for slot, sequence in enumerate(pending.served):
            if sequence is None or sequence.stage != "running":
                continue
            count = int(drawn.count[slot])
            if count:
                kept.append(count - 1)
                self.acceptance.add(int(drawn.drafted[slot]), count - 1)
            for place_in_row in range(count):
                token = int(drawn.token[slot, place_in_row])
                if token == NO_TOKEN:
                    where = f"position {len(sequence.prompt) + len(sequence.output)}"
                    self._finish(sequence, "error", error=f"the logits at {where} are not finite numbers")
                    break
                if sequence.guide is not None and not sequence.guide.take(token):
                    self._finish(sequence, "error", Output(is_stuck=True), error=NO_WAY)
                    break
                shown = sequence.text.add(token)
                output = dataclasses.replace(
                    shown.output,
                    logprobs=logprob(drawn, slot, place_in_row, sequence.sampling.logprobs),
                    **({} if sequence.output else _of_first(sequence)),
                )
                sequence.output.append(token)
                if output.finish_reason is not None:
                    stopped[slot] = shown.by_text
                    self._finish(sequence, output.finish_reason, output)
                    break
                self._outputs.append((sequence.id, output))
        self.widths.add(pending.width, kept)
        if stopped.any():
            self._slots = stop_slots(self._slots, stopped)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        output: Output = NOTHING,
        error: str | None = None,
    ) -> None:
        if reason in ("aborted", "error") and sequence.slot is not None:
            stopped = np.zeros(self.settings.num_slots, bool)
            stopped[sequence.slot] = True
            self._slots = stop_slots(self._slots, stopped)
        self.scheduler.finish(sequence)
        del self._sequences[sequence.id]
        last = dataclasses.replace(output, finish_reason=reason, error=error)
        self._outputs.append((sequence.id, last))

    def close(self) -> None:
        """Waits until all prefixes that should be on disk are there."""
        self._lanes.close()

    # ---- starting --------------------------------------------------------------------------------

    def warm_up(self) -> float:
        """Compiles everything that any request can need, and returns the seconds it took.

        A request goes through every program twice, so that the second finds the first one's prefix; with a
        disk once more, to read it from there; then the prefix cache is emptied again. With drafts, so for
        every width, and the time of a step of each width is measured.

        Raises:
            RuntimeError: if requests are being served.
        """
        if self.has_work:
            raise RuntimeError("warm_up must come before the first request")
        start = time.monotonic()
        self._measure_widths()
        # Longer than one step can draw with all its guesses right: there must be something to interrupt.
        count = self.widths.widths[-1] + 2
        prompt = (0,) * max(1, min(self.block + 2, self.settings.max_length - count))
        count = min(count, self.settings.max_length - len(prompt))
        sampling = Sampling(max_tokens=count, temperature=0.5, ignore_eos=True)
        turns = 2 if self.settings.disk is None else 3
        for turn, width in itertools.product(range(turns), self.widths.widths):
            self.widths.forced = width
            if turn == 2:
                self._lanes.forget()
            number = self.add(prompt, sampling)
            interrupted = False
            while self.has_work:
                interrupted = interrupted or self.preempt(number)
                self.step()
        nobody = np.zeros(self.settings.num_slots, bool)
        self._slots = stop_slots(self._slots, nobody)
        self._lanes.forget()
        if self.prefixes is not None:
            self.prefixes.queries = self.prefixes.hits = self.prefixes.evictions = 0
        self.steps = self.prefilled = self.scheduler.num_preemptions = 0
        self.acceptance = DraftAcceptance(self.settings.draft)
        measured, self.widths = self.widths.seconds, DraftWidths(self.widths.widths)
        self.widths.seconds = measured
        jax.block_until_ready(self._slots)
        return time.monotonic() - start

    def _measure_widths(self) -> None:
        """Times a step of every width, with all slots drawing; nothing of it stays.

        Several processes must run the same programs, and their times differ: the widest is used there.
        """
        widths = self.widths.widths
        if len(widths) == 1 or jax.process_count() > 1:
            return
        masks, given, _ = self._masks.of([None] * self.settings.num_slots)
        slots = self._empty_slots()
        put = functools.partial(self.lm.network.put, dims="B")
        last = self.settings.max_length - 1
        self._slots = slots._replace(
            running=put(np.ones(self.settings.num_slots, bool)),
            temperature=put(np.full(self.settings.num_slots, 0.5, np.float32)),
            last=put(np.full(self.settings.num_slots, last, np.int32)),
        )
        # Every width after every other, so that no pair of programs meets for the first time later.
        for width in (*widths, *reversed(widths), *widths):
            jax.block_until_ready(self._decode(width, masks, given))
            timed = []
            for _ in range(MEASURED_STEPS):
                begun = time.perf_counter()
                jax.block_until_ready((self._decode(width, masks, given), self._cache, self._slots))
                timed.append(time.perf_counter() - begun)
            self.widths.seconds[width] = min(timed + [self.widths.seconds.get(width, timed[0])])
        self._slots = self._empty_slots()
        self._cache = rows_for(self.lm, self.settings, self.settings.num_slots)
