"""Prompt in, tokens out: chunked prefill, then one compiled step a token."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.inference.sampling import checked_sampling, key_of
from dsv4_jax.model.cache import Cache

PREFILL_CHUNKS = (2048, 512, 128, 32)
"""Compiled chunk lengths, longest first; the rest of a prompt is padded up to the shortest that holds it."""

RUNNING = -1
"""In place of a stop token: this row goes on. No token has this id."""

STOPS_GROUP = 8
"""Stop ids are padded to a multiple of it, so that runs with other lists share their compiled step."""


class Steps(Protocol):
    """The compiled steps that generation needs (`LanguageModel` provides them)."""

    def prefill(
        self, cache: Cache, tokens: jax.Array, num_valid: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Appends a chunk; `last` f32[B, V] is updated for rows whose prompt has tokens in it."""
        ...

    def decode(
        self,
        cache: Cache,
        logits: jax.Array,
        key: jax.Array,
        index: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
        stopped: jax.Array,
        stops: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
        """Draws a token a row, appends it, and returns (token, next logits, stopped, cache).

        `stopped` i32[B] is the stop token that a row drew, RUNNING while it drew none.
        """
        ...


def chunks(length: int) -> list[int]:
    """Chunk lengths that cover a prompt of `length` tokens with at most one padded chunk."""
    plan = []
    while length > 0:
        fitting = [size for size in PREFILL_CHUNKS if size <= length]
        size = fitting[0] if fitting else PREFILL_CHUNKS[-1]
        plan.append(size)
        length -= size
    return plan


def prefill(
    steps: Steps, cache: Cache, prompts: Sequence[Sequence[int]], vocab_size: int
) -> tuple[jax.Array, Cache]:
    """Appends ragged prompts to an empty or running cache.

    Returns:
        f32[B, V], the logits after each row's last prompt token, and the cache.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    logits = jnp.zeros((len(prompts), vocab_size), jnp.float32)
    start = 0
    for size in chunks(int(lengths.max())):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)] = piece
        num_valid = np.clip(lengths - start, 0, size).astype(np.int32)
        logits, cache = steps.prefill(cache, jnp.asarray(tokens), jnp.asarray(num_valid), logits)
        start += size
    return logits, cache


def stream(
    steps: Steps,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    vocab_size: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_token_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """Yields i32[B] a step, until every row has stopped or the budget is spent.

    A row that drew a stop token keeps yielding that token: its output is padded with it.
    The draw of step i depends on (seed, i, row) alone.

    Raises:
        ValueError: for a seed or sampling values outside their range.
    """
    heat, nucleus = checked_sampling(temperature, top_p)
    key = key_of(seed)
    if max_new_tokens == 0:
        return
    logits, cache = prefill(steps, cache, prompts, vocab_size)
    stops = padded_stops(stop_token_ids)
    stopped = jnp.full((len(prompts),), RUNNING, jnp.int32)
    heat, nucleus = jnp.asarray(heat), jnp.asarray(nucleus)
    for index in range(max_new_tokens):
        token, logits, stopped, cache = steps.decode(
            cache, logits, key, jnp.int32(index), heat, nucleus, stopped, stops
        )
        yield np.asarray(token)
        if stop_token_ids and (np.asarray(stopped) != RUNNING).all():
            return


def padded_stops(stop_token_ids: Sequence[int]) -> jax.Array:
    """i32[n], n a positive multiple of STOPS_GROUP, filled up with what no row can draw."""
    padding = STOPS_GROUP - len(stop_token_ids) % STOPS_GROUP
    return jnp.asarray([*stop_token_ids, *[RUNNING] * padding], jnp.int32)
