"""The engine's loop body: a step admits, computes a chunk of every prompt, and draws a token a slot.

Everything happens in the caller's thread. `engine` runs it in one of its own for asynchronous callers.
"""

import collections
import dataclasses
import hashlib
import time
from typing import Any

import jax
import numpy as np

from dsv4_jax.errors import ProblemsError
from dsv4_jax.inference import steps
from dsv4_jax.inference.sampling import NO_TOKEN
from dsv4_jax.inference.text import TextStream
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model import cache_blocks, cache_rows
from dsv4_jax.serving import device_steps
from dsv4_jax.serving.device_steps import NO_STOP, NewSlot
from dsv4_jax.serving.prefix_cache import PrefixCache
from dsv4_jax.serving.requests import (
    MOST_BIASES,
    MOST_STOP_TOKENS,
    FinishReason,
    Output,
    Sampling,
    TokenLogprob,
    checked_request,
)
from dsv4_jax.serving.scheduler import Scheduler, Sequence
from dsv4_jax.serving.stop_texts import StopTexts

NOTHING = Output()

LOADED_AT_ONCE = 8
"""Pages that one call copies into a row."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Sizes of an engine, fixed when it starts.

    Memory: `num_slots + num_lanes` rows of `max_length` tokens, `num_pages` blocks and `num_states` states.
    """

    max_length: int = 4096  # tokens of a prompt and its answer
    num_slots: int = 8  # answers at once
    num_lanes: int = 2  # prompts computed at once
    chunk: int | None = None  # prompt tokens of a lane a step, and the granularity of prefix hits; None: 128
    num_pages: int = 256  # blocks of prefixes that are kept; 0: no prefix cache
    num_states: int = 32
    state_interval: int = 4096  # tokens between the states kept along a long prompt

    def problems(self, smallest: int) -> list[str]:
        """Broken rules; `smallest` is the model's smallest block."""
        found = [
            f"{name}={getattr(self, name)!r} must be at least {least}"
            for name, least in (
                ("max_length", 2), ("num_slots", 1), ("num_lanes", 1), ("num_pages", 0), ("num_states", 0),
                ("state_interval", 1),
            )
            if getattr(self, name) < least
        ]  # fmt: skip
        if self.chunk is not None and (self.chunk < 1 or self.chunk % smallest):
            found.append(f"chunk={self.chunk} must be a multiple of {smallest} tokens for this model")
        return found


@dataclasses.dataclass
class _Pending:
    """A step whose tokens are still on the device, and who was in which slot."""

    drawn: device_steps.Drawn
    served: list[Sequence | None]


class EngineCore:
    """Continuous batching over one model. Not thread safe.

    A request's tokens are the same alone, in any batch, in any slot, after a prefix hit and after it was
    interrupted: prompts are always cut at the same places, programs have fixed shapes, and a draw depends on
    the request's seed and position alone.

    Args:
        lm: the model. settings: sizes.

    Raises:
        ProblemsError: for sizes that cannot work.
    """

    def __init__(self, lm: LanguageModel, settings: EngineSettings | None = None) -> None:
        settings = settings or EngineSettings()
        smallest = cache_blocks.block_length(lm.config)
        if problems := settings.problems(smallest):
            raise ProblemsError("the engine cannot start", problems)
        self.lm, self.settings = lm, settings
        self.block = settings.chunk or -(-128 // smallest) * smallest
        self.scheduler = Scheduler(settings.num_slots, settings.num_lanes, self.block)
        self.steps = 0
        self._cache = lm.new_cache(settings.num_slots, settings.max_length)
        self._lanes = lm.new_cache(settings.num_lanes, settings.max_length)
        self._lane_logits = lm.network.put(
            np.zeros((settings.num_lanes, lm.config.vocab_size), np.float32), "B V"
        )
        self._slots = device_steps.empty_slots(settings.num_slots, lm.config.vocab_size)
        self.prefixes: PrefixCache[cache_blocks.State] | None = None
        if settings.num_pages:
            self._pool = cache_blocks.new_pool(self._lanes, lm.config, settings.num_pages, self.block)
            fingerprint = hashlib.blake2b(repr((lm.config, lm.policy)).encode()).digest()
            self.prefixes = PrefixCache(settings.num_pages, settings.num_states, self.block, fingerprint)
        self._sequences: dict[int, Sequence] = {}
        self._pending: _Pending | None = None
        self._outputs: collections.deque[tuple[int, Output]] = collections.deque()

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
        checked_request(prompt, sampling, lm.config.vocab_size, self.settings.max_length)
        own = () if sampling.ignore_eos else lm.stop_token_ids
        stops = frozenset(own if sampling.stop_token_ids is None else sampling.stop_token_ids)
        if len(stops) > MOST_STOP_TOKENS:
            raise ProblemsError(
                "this request cannot be served",
                [f"{len(stops)} stop tokens, at most {MOST_STOP_TOKENS} are allowed"],
            )
        if sampling.stop and lm.tokenizer is None:
            raise ProblemsError("this request cannot be served", ["stop texts need a tokenizer.json"])
        sequence = Sequence(
            self.scheduler.next_id(), tuple(prompt), sampling, stops, salt=salt, priority=priority
        )
        if lm.tokenizer is not None:
            sequence.text = (TextStream(lm.tokenizer), StopTexts(sampling.stop))
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)
        return sequence.id

    def abort(self, number: int) -> None:
        """Ends a request; its slot is free from the next step on. Unknown and finished ones stay as they are."""
        if sequence := self._sequences.get(number):
            self._finish(sequence, "aborted")

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to give back."""
        return bool(self._sequences or self._pending or self._outputs)

    # ---- a step ----------------------------------------------------------------------------------

    def step(self) -> list[tuple[int, Output]]:
        """Starts one step on the device and returns what earlier ones gave: (request, output) in order."""
        self._interrupt_for_more_important_ones()
        for sequence in self.scheduler.admit():
            if sequence.kept is None:
                self._begin(sequence)
            else:
                kept_cache, kept_logits = sequence.kept
                sequence.kept = None
                self._place(sequence, kept_cache, kept_logits, 0)
        self._prefill()
        previous, self._pending = self._pending, None
        served = [each if each and each.stage == "running" else None for each in self.scheduler.slots]
        if any(served):
            drawn, self._cache, self._slots = device_steps.decode(
                self.lm.network, self.lm.parameters, self._cache, self._slots
            )
            self._pending = _Pending(drawn, served)
            self.steps += 1
        if previous is not None:
            self._read(previous)
        outputs = list(self._outputs)
        self._outputs.clear()
        return outputs

    def drain(self) -> None:
        """Reads the step that is still on the device; its outputs come with the next `step`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def preempt(self, number: int) -> bool:
        """Takes a running request's slot and queues it again, with its row kept; it goes on bit for bit.

        Returns:
            Whether there was such a request in a slot.
        """
        self.drain()
        sequence = self._sequences.get(number)
        if sequence is None or sequence.stage != "running":
            return False
        cache, logits, self._slots = device_steps.interrupt(self._cache, self._slots, np.int32(sequence.slot))
        sequence.kept = (cache, logits)
        self.scheduler.preempt(sequence)
        return True

    def _interrupt_for_more_important_ones(self) -> None:
        while (victim := self.scheduler.victim()) is not None:
            self.preempt(victim.id)

    def _begin(self, sequence: Sequence) -> None:
        """Empties the sequence's lane, or fills it with what is known of its prompt."""
        self._lanes = cache_rows.reset(self._lanes, [sequence.lane])
        if self.prefixes is None:
            return
        keys = self.prefixes.keys(sequence.prompt, sequence.salt)
        # At least one token is computed: there must be logits.
        usable = keys[: (len(sequence.prompt) - 1) // self.block]
        hit = self.prefixes.longest(usable, len(sequence.prompt))
        shared = self.prefixes.known(usable)
        every = max(self.settings.state_interval // self.block, 1)
        wanted = {shared, len(usable), *range(every, len(keys) + 1, every)}
        sequence.keys, sequence.states_at = keys, frozenset(wanted - {0})
        if hit is None:
            return
        lane = np.int32(sequence.lane)
        config = self.lm.config
        for first in range(0, hit.num_blocks, LOADED_AT_ONCE):
            pages = np.full(LOADED_AT_ONCE, -1, np.int32)
            some = hit.pages[first : first + LOADED_AT_ONCE]
            pages[: len(some)] = some
            self._lanes = cache_blocks.load_blocks(
                config, self.block, self._lanes, lane, np.int32(first), self._pool, pages
            )
        self._lanes = cache_blocks.put_state(self._lanes, lane, hit.state)
        sequence.done = sequence.cached = hit.num_blocks * self.block

    def _prefill(self) -> None:
        chunks = self.scheduler.chunks()
        if not chunks:
            return
        shape = (self.settings.num_lanes, self.block)
        tokens, num_valid = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
        for chunk in chunks:
            lane = chunk.sequence.lane
            tokens[lane, : chunk.count] = chunk.sequence.prompt[chunk.start : chunk.start + chunk.count]
            num_valid[lane] = chunk.count
        put = self.lm.network.put
        self._lane_logits, self._lanes = steps.prefill(
            self.lm.network,
            self.lm.parameters,
            self._lanes,
            put(tokens, "B"),
            put(num_valid, "B"),
            self._lane_logits,
        )
        for chunk in chunks:
            chunk.sequence.done += chunk.count
        self._keep([chunk.sequence for chunk in chunks if chunk.sequence.done % self.block == 0])
        for chunk in chunks:
            if chunk.is_last:
                lane = chunk.sequence.lane
                self.scheduler.complete(chunk.sequence)
                self._place(chunk.sequence, self._lanes, self._lane_logits, lane)

    def _keep(self, sequences: list[Sequence]) -> None:
        """Makes the blocks that just became complete known, and their states where they are wanted."""
        if self.prefixes is None or not sequences:
            return
        number = np.zeros(self.settings.num_lanes, np.int32)
        pages = np.full(self.settings.num_lanes, self.settings.num_pages, np.int32)
        for sequence in sequences:
            block = sequence.done // self.block - 1
            page = self.prefixes.insert(sequence.keys, block)
            if page is not None:
                number[sequence.lane], pages[sequence.lane] = block, page
        if (pages < self.settings.num_pages).any():
            self._pool = cache_blocks.save_blocks(
                self.lm.config, self.block, self._pool, self._lanes, number, pages
            )
        for sequence in sequences:
            block = sequence.done // self.block
            key = sequence.keys[block - 1]
            if block in sequence.states_at and self.prefixes.wants_state(key):
                state = cache_blocks.take_state(self._lanes, np.int32(sequence.lane))
                self.prefixes.attach(key, state)

    def _place(self, sequence: Sequence, cache: Any, logits: jax.Array, row: int) -> None:
        self._cache, self._slots = device_steps.place(
            self._cache,
            self._slots,
            cache,
            logits,
            np.int32(row),
            np.int32(sequence.slot),
            self._new_slot(sequence),
        )

    def _new_slot(self, sequence: Sequence) -> NewSlot:
        sampling, vocab_size = sequence.sampling, self.lm.config.vocab_size

        def padded(values: Any, size: int, fill: int, dtype: Any = np.int32) -> np.ndarray:
            array = np.full(size, fill, dtype)
            array[: len(values)] = values
            return array

        size, start = self.settings.max_length, len(sequence.prompt)
        return NewSlot(
            seed=np.array([sampling.seed >> 32, sampling.seed & 0xFFFFFFFF], np.uint32),
            temperature=np.float32(sampling.temperature),
            top_p=np.float32(sampling.top_p),
            presence=np.float32(sampling.presence_penalty),
            frequency=np.float32(sampling.frequency_penalty),
            repetition=np.float32(sampling.repetition_penalty),
            bias_ids=padded(list(sampling.logit_bias), MOST_BIASES, vocab_size),
            bias=padded(list(sampling.logit_bias.values()), MOST_BIASES, 0, np.float32),
            prompt=padded(sequence.prompt, size, vocab_size),
            output=padded(sequence.output, size, vocab_size),
            top_k=np.int32(min(sampling.top_k, vocab_size)),
            min_p=np.float32(sampling.min_p),
            stops=padded(sorted(sequence.stops), MOST_STOP_TOKENS, NO_STOP),
            stop_from=np.int32(start + min(sampling.min_tokens, size)),
            last=np.int32(start + sampling.max_tokens - 1),
        )

    # ---- what came back --------------------------------------------------------------------------

    def _read(self, pending: _Pending) -> None:
        drawn = jax.device_get(pending.drawn)
        stopped = np.zeros(self.settings.num_slots, bool)
        for slot, sequence in enumerate(pending.served):
            if sequence is None or sequence.stage != "running" or not drawn.running[slot]:
                continue
            token = int(drawn.token[slot])
            if token == NO_TOKEN:
                where = f"position {len(sequence.prompt) + len(sequence.output)}"
                self._finish(sequence, "error", error=f"the logits at {where} are not finite numbers")
                continue
            stopped[slot] = self._take(sequence, token, _logprob(drawn, slot, sequence.sampling.logprobs))
        if stopped.any():
            self._slots = device_steps.stop_slots(self._slots, stopped)

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> bool:
        """Adds a token to an answer. Returns whether the device has to be told that the answer has ended."""
        first = not sequence.output
        sequence.output.append(token)
        text, ended_by_text = "", False
        is_stop = token in sequence.stops
        if sequence.text is not None:
            stream, stops = sequence.text
            if not is_stop:
                text, ended_by_text = stops.add(stream.add(token))
        if is_stop or ended_by_text:
            reason: FinishReason | None = "stop"
        else:
            reason = "length" if len(sequence.output) >= sequence.sampling.max_tokens else None
        if reason is not None and sequence.text is not None and not ended_by_text:
            more, found = sequence.text[1].add(sequence.text[0].finish())
            text += more
            if not found:
                text += sequence.text[1].finish()
        output = Output(
            (token,),
            text,
            () if logprob is None else (logprob,),
            cached_tokens=sequence.cached if first else 0,
        )
        if reason is None:
            self._outputs.append((sequence.id, output))
            return False
        self._finish(sequence, reason, output)
        return ended_by_text

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
            self._slots = device_steps.stop_slots(self._slots, stopped)
        self.scheduler.finish(sequence)
        del self._sequences[sequence.id]
        self._outputs.append((sequence.id, dataclasses.replace(output, finish_reason=reason, error=error)))

    # ---- starting --------------------------------------------------------------------------------

    def warm_up(self) -> float:
        """Compiles everything that any request can need, and returns the seconds it took.

        A request is served for each program, twice, so that the second finds the first one's prefix; then
        the prefix cache is emptied again.

        Raises:
            RuntimeError: if requests are being served.
        """
        if self.has_work:
            raise RuntimeError("warm_up must come before the first request")
        start = time.monotonic()
        length = min(self.block + 2, self.settings.max_length - 2)
        prompt = tuple(np.zeros(length, np.int32).tolist())
        sampling = Sampling(max_tokens=2, temperature=0.5, seed=0, ignore_eos=True, stop_token_ids=())
        for _ in range(2):
            number = self.add(prompt, sampling)
            interrupted = False
            while self.has_work:
                if not interrupted:
                    interrupted = self.preempt(number)
                self.step()
        self._slots = device_steps.stop_slots(self._slots, np.zeros(self.settings.num_slots, bool))
        if self.prefixes is not None:
            self.prefixes.clear()
            self.prefixes.queries = self.prefixes.hits = self.prefixes.evictions = 0
        self.steps = self.scheduler.num_preemptions = 0
        jax.block_until_ready(self._slots)
        return time.monotonic() - start


def _logprob(drawn: Any, slot: int, wanted: int | None) -> TokenLogprob | None:
    if wanted is None:
        return None
    ids, logprobs = (row[slot][:wanted].tolist() for row in (drawn.likeliest, drawn.likeliest_logprobs))
    pairs = tuple(zip(ids, logprobs, strict=True))
    return TokenLogprob(int(drawn.token[slot]), float(drawn.logprob[slot]), pairs)
