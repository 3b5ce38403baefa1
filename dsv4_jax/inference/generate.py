"""Prompt in, tokens out: chunked prefill, then one compiled step a token."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.inference.sampling import check_sampling
from dsv4_jax.model.cache import Cache

PREFILL_CHUNKS = (2048, 512, 128, 32)
"""Compiled chunk lengths, longest first; the rest of a prompt is padded up to the shortest that holds it."""


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
        running: jax.Array,
        stops: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
        """Draws a token a row, appends it, and returns (token, next logits, still running, cache)."""
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

    A row that drew a stop token keeps yielding its first stop token: its output is padded with it.
    The draw of step i depends on (seed, i, row) alone.

    Raises:
        ValueError: for sampling values outside their range.
    """
    check_sampling(temperature, top_p)
    if max_new_tokens <= 0:
        return
    logits, cache = prefill(steps, cache, prompts, vocab_size)
    key = jax.random.key(seed)
    stops = jnp.asarray(list(stop_token_ids) or [-1], jnp.int32)
    running = jnp.ones((len(prompts),), bool)
    heat, nucleus = jnp.float32(temperature), jnp.float32(top_p)
    for index in range(max_new_tokens):
        token, logits, running, cache = steps.decode(
            cache, logits, key, jnp.int32(index), heat, nucleus, running, stops
        )
        yield np.asarray(token)
        if stop_token_ids and not bool(running.any()):
            return
