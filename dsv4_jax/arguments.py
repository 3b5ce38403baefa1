"""Arguments of the public methods, checked before anything runs: errors name the value and the rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from dsv4_jax.config import ModelConfig


def checked_tokens(tokens: Any, vocab_size: int) -> Int32[Array, "B T"]:
    """i32[B, T]; raises ValueError for a wrong shape or dtype, or ids outside the vocabulary, all at once."""
    if isinstance(tokens, jax.core.Tracer):
        return tokens.astype(jnp.int32)
    ids = np.asarray(tokens)
    problems = []
    if ids.ndim != 2 or 0 in ids.shape:
        problems.append(f"tokens of shape {ids.shape} must be [B, T] with B, T >= 1")
    if not np.issubdtype(ids.dtype, np.integer):
        problems.append(f"tokens of dtype {ids.dtype} must be integers")
    elif ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        bad = sorted({int(i) for i in ids[(ids < 0) | (ids >= vocab_size)].flat})[:5]
        problems.append(f"token ids {bad} are outside the vocabulary 0..{vocab_size - 1}")
    if problems:
        raise ValueError("; ".join(problems))
    return jnp.asarray(ids, jnp.int32)


def checked_counts(num_valid: Any, shape: tuple[int, ...]) -> Int32[Array, "B"]:
    """i32[B] counts in 0..T for tokens of `shape` [B, T]; all T by default. Raises ValueError."""
    if num_valid is None:
        return jnp.full(shape[:1], shape[1], jnp.int32)
    counts = np.asarray(num_valid)
    if counts.shape != shape[:1] or counts.min() < 0 or counts.max() > shape[1]:
        raise ValueError(f"num_valid={counts.tolist()} must hold {shape[0]} counts in 0..{shape[1]}")
    return jnp.asarray(counts, jnp.int32)


def checked_prompts(tokens: Any, vocab_size: int) -> list[list[int]]:
    """One id list a row, none empty. Raises ValueError."""
    prompts = [np.asarray(row).reshape(-1) for row in tokens]
    if not prompts or any(row.size == 0 for row in prompts):
        raise ValueError("generation needs at least one prompt, and at least one token in each")
    return [checked_tokens(row[None], vocab_size)[0].tolist() for row in prompts]


def capacity(tokens: int, config: ModelConfig) -> int:
    """Rounded up to a power of two, so that runs of similar length share their compiled steps."""
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens make {tokens}; the model holds at most "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    return min(max(1 << (tokens - 1).bit_length(), 256), config.max_position_embeddings)
