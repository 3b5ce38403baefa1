"""What the engine's slots draw with, and how requests come to slots and leave them.

All shapes are fixed when the engine starts: nothing is compiled after that, whatever the requests ask for.
Slots that serve nobody draw and append nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from dsv4_jax.inference.logit_rules import LogitRules
from dsv4_jax.model import cache_rows
from dsv4_jax.model.cache import Cache
from dsv4_jax.serving.constraints import Guide
from dsv4_jax.serving.requests import MOST_BIASES, MOST_STOP_TOKENS, Sampling

NO_STOP = -1
"""Fills up lists of stop tokens; no token has this id."""

NO_GATE = -1
"""Of a slot whose grammar is not waiting for a token that opens it."""


class Slots(NamedTuple):
    """What every slot draws with, S rows."""

    logits: Float32[Array, "S V"]  # of the next token
    requests: Key[Array, "S"]
    temperature: Float32[Array, "S"]
    top_p: Float32[Array, "S"]
    rules: LogitRules
    stops: Int32[Array, "S stops"]  # filled up with NO_STOP
    stop_from: Int32[Array, "S"]  # position of the first token that may be a stop token
    last: Int32[Array, "S"]  # position of the last token to draw
    history: Int32[Array, "S length"]  # all tokens by position, for drafts of lookup; length 0: not kept
    gate: Int32[Array, "S"]  # the token after which a row is held, or NO_GATE
    held: Bool[Array, "S"]  # a grammar is open: the row draws only in a step that brings its mask
    running: Bool[Array, "S"]


class NewSlot(NamedTuple):
    """What a request brings to its slot, from the host."""

    seed: UInt32[Array, "2"]  # high and low word
    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]
    presence: Float32[Array, ""]
    frequency: Float32[Array, ""]
    repetition: Float32[Array, ""]
    bias_ids: Int32[Array, " biases"]  # filled up with V
    bias: Float32[Array, " biases"]
    prompt: Int32[Array, " length"]  # filled up with V
    output: Int32[Array, " length"]  # what it drew before it was interrupted, filled up with V
    top_k: Int32[Array, ""]
    min_p: Float32[Array, ""]
    stops: Int32[Array, " stops"]
    stop_from: Int32[Array, ""]
    last: Int32[Array, ""]
    gate: Int32[Array, ""]
    held: Bool[Array, ""]


def empty_slots(num_slots: int, vocab_size: int, history: int) -> Slots:
    """Slots that serve nobody; `history`: tokens of each that are kept for drafts, or 0."""
    rows = functools.partial(jnp.zeros, (num_slots,))
    words = jnp.zeros((num_slots, 2), jnp.uint32)
    return Slots(
        logits=jnp.zeros((num_slots, vocab_size), jnp.float32),
        requests=jax.random.wrap_key_data(words, impl="threefry2x32"),
        temperature=rows(jnp.float32),
        top_p=jnp.ones((num_slots,), jnp.float32),
        rules=LogitRules.neutral(num_slots, vocab_size),
        stops=jnp.full((num_slots, MOST_STOP_TOKENS), NO_STOP, jnp.int32),
        stop_from=rows(jnp.int32),
        last=rows(jnp.int32),
        history=jnp.zeros((num_slots, history), jnp.int32),
        gate=jnp.full((num_slots,), NO_GATE, jnp.int32),
        held=rows(bool),
        running=rows(bool),
    )


@functools.partial(jax.jit, donate_argnums=0)
def stop_slots(slots: Slots, stopped: Bool[Array, "S"]) -> Slots:
    """The same slots, of which some no longer run."""
    return slots._replace(running=slots.running & ~stopped)


@functools.partial(jax.jit, donate_argnums=1)
def interrupt(
    cache: Cache, slots: Slots, slot: Int32[Array, ""]
) -> tuple[Cache, Float32[Array, "1 V"], Slots]:
    """A copy of a slot's row and of its next logits, to be placed again later; the slot runs no longer.

    The slots are consumed, the cache is not.
    """
    stopped = jnp.arange(len(slots.running), dtype=jnp.int32) == slot
    logits = jax.lax.dynamic_slice_in_dim(slots.logits, slot, 1, 0)
    return cache_rows.take(cache, slot[None]), logits, slots._replace(running=slots.running & ~stopped)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def place(
    cache: Cache,
    slots: Slots,
    other: Cache,
    logits: Float32[Array, "P V"],
    row: Int32[Array, ""],
    slot: Int32[Array, ""],
    new: NewSlot,
) -> tuple[Cache, Slots]:
    """Copies a row of another cache, whose prompt is complete, into a slot, which then runs.

    Cache and slots are consumed; the other cache and its logits are not.
    """
    moved = cache_rows.take(other, row[None])
    cache = cache_rows.put(cache, slot[None], moved)
    vocab_size = slots.logits.shape[1]
    bias = jnp.zeros((vocab_size,), jnp.float32).at[new.bias_ids].add(new.bias, mode="drop")
    seen = jnp.zeros((vocab_size,), bool).at[new.prompt].set(True, mode="drop")
    counts = jnp.zeros((vocab_size,), jnp.int32).at[new.output].add(1, mode="drop")
    size = slots.history.shape[1]
    place = jnp.arange(len(new.prompt), dtype=jnp.int32)
    prompt_length = jnp.sum(new.prompt < vocab_size, dtype=jnp.int32)
    # Ids that fill up are beyond the vocabulary: no draft is made of them before they are overwritten.
    history = jnp.full((size,), vocab_size, jnp.int32).at[place].set(new.prompt, mode="drop")
    history = history.at[prompt_length + place].set(new.output, mode="drop")
    values = Slots(
        logits[row],
        # As `sampling.request_keys` does for the first request of a seed.
        jax.random.fold_in(jax.random.wrap_key_data(new.seed, impl="threefry2x32"), jnp.int32(0)),
        new.temperature,
        new.top_p,
        LogitRules(new.presence, new.frequency, new.repetition, bias, counts, seen, new.top_k, new.min_p),
        new.stops,
        new.stop_from,
        new.last,
        history,
        new.gate,
        new.held,
        jnp.bool_(True),
    )
    return cache, jax.tree.map(lambda every, one: every.at[slot].set(one), slots, values)


def new_slot(
    prompt: tuple[int, ...],
    output: list[int],
    sampling: Sampling,
    stops: frozenset[int],
    max_length: int,
    vocab_size: int,
    guide: Guide | None = None,
) -> NewSlot:
    """What a request brings to its slot, arrays of the host.

    Args:
        prompt: its tokens. output: those it has drawn already, if it was interrupted.
        sampling: how to draw. stops: token ids that end it.
        max_length: of a sequence. vocab_size: V.
        guide: through its grammar, if it has one.
    """
    gate = None if guide is None else guide.gate

    def padded(values: Any, size: int, fill: int, dtype: Any = np.int32) -> np.ndarray:
        array = np.full(size, fill, dtype)
        array[: len(values)] = values
        return array

    return NewSlot(
        seed=np.array([sampling.seed >> 32, sampling.seed & 0xFFFFFFFF], np.uint32),
        temperature=np.float32(sampling.temperature),
        top_p=np.float32(sampling.top_p),
        presence=np.float32(sampling.presence_penalty),
        frequency=np.float32(sampling.frequency_penalty),
        repetition=np.float32(sampling.repetition_penalty),
        bias_ids=padded(list(sampling.logit_bias), MOST_BIASES, vocab_size),
        bias=padded(list(sampling.logit_bias.values()), MOST_BIASES, 0, np.float32),
        prompt=padded(prompt, max_length, vocab_size),
        output=padded(output, max_length, vocab_size),
        top_k=np.int32(min(sampling.top_k, vocab_size)),
        min_p=np.float32(sampling.min_p),
        stops=padded(sorted(stops), MOST_STOP_TOKENS, NO_STOP),
        stop_from=np.int32(len(prompt) + min(sampling.min_tokens, max_length)),
        last=np.int32(len(prompt) + sampling.max_tokens - 1),
        gate=np.int32(NO_GATE if gate is None else gate),
        held=np.bool_(guide is not None and guide.is_open),
    )
