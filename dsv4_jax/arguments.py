"""Arguments of the public methods, checked before anything runs: errors name the value and the rule.

Traced values (of `jax.jit`, `jax.grad`, `jax.lax.scan` and the like) have a shape and a dtype, and those are
checked; their values are not known, and the caller answers for them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import INT32_MAX, integer_array, outside
from dsv4_jax.config.quantities import checked_integer as checked_integer
from dsv4_jax.config.quantities import checked_seed as checked_seed
from dsv4_jax.config.quantities import integer_problem as integer_problem
from dsv4_jax.config.quantities import seed_problem as seed_problem
from dsv4_jax.config.rules import shown

SHOWN_IDS = 8

SHORTEST_CACHE = 256
"""Tokens that the cache of a generation has room for at least."""


def is_traced(*values: Any) -> bool:
    """Whether any leaf of these pytrees is a value that JAX is tracing."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def refuse_traced(what: str, instead: str, *values: Any) -> None:
    """Raises TypeError, one sentence, if any of the values is traced.

    Args:
        what: what cannot be traced, and why.
        instead: what to do.
    """
    if is_traced(*values):
        raise TypeError(f"{what} and cannot be traced by jax.jit, jax.grad or jax.vmap: {instead}")


def checked_tokens(tokens: Any, vocab_size: int) -> Int32[Array, "B T"]:
    """i32[B, T]; raises ValueError for a wrong shape or dtype, or ids outside the vocabulary, all at once."""
    return _on_device(_checked_ids(tokens, vocab_size))


def _checked_ids(tokens: Any, vocab_size: int) -> Any:
    """As `checked_tokens`, still on the host unless traced."""
    ids, problems = _integers("tokens", tokens)
    if ids is not None:
        if ids.ndim != 2 or 0 in ids.shape:
            problems.append(f"tokens of shape {ids.shape} must be [B, T] with B, T >= 1{_as_rows(ids)}")
        problems += _range_problems("token ids", ids, vocab_size)
    if problems:
        raise ValueError("; ".join(problems))
    return ids


def checked_prompts(tokens: Any, vocab_size: int) -> list[list[int]]:
    """One id list a row, of any lengths, none empty. Raises ValueError as `checked_tokens` does."""
    if not isinstance(tokens, (list, tuple)) or not all(map(_is_row, tokens)):
        return _checked_ids(tokens, vocab_size).tolist()
    if not tokens or not all(map(len, tokens)):
        raise ValueError("generation needs at least one prompt, and at least one token in each")
    prompts = []
    for number, row in enumerate(tokens):
        try:
            prompts.append(_checked_ids([row], vocab_size)[0].tolist())
        except ValueError as refused:
            raise ValueError(f"prompt {number}: {refused}") from refused
    return prompts


def checked_counts(num_valid: Any, shape: tuple[int, ...]) -> np.ndarray | Int32[Array, "B"]:
    """i32[B] counts in 0..T for tokens of `shape` [B, T], on the host unless traced; all T by default.

    Raises:
        ValueError: for other counts.
    """
    if num_valid is None:
        return np.full(shape[:1], shape[1], np.int32)
    counts, problems = _integers("num_valid", num_valid)
    if counts is not None:
        bad = _known(counts) and outside(counts, 0, shape[1])
        if counts.shape != shape[:1] or bad:
            given = shown(counts.tolist()) if _known(counts) else f"of shape {counts.shape}"
            problems.append(f"num_valid={given} must hold {shape[0]} counts in 0..{shape[1]}")
    if problems:
        raise ValueError("; ".join(problems))
    return counts.astype(np.int32)


def checked_segments(segment_ids: Any, shape: tuple[int, ...]) -> Int32[Array, "B T"]:
    """i32[B, T] segment ids of packed rows, 0 for padding. Raises ValueError."""
    ids, problems = _integers("segment_ids", segment_ids)
    if ids is not None:
        if ids.shape != shape:
            problems.append(f"segment_ids of shape {ids.shape} must match tokens {shape}")
        if _known(ids) and (bad := outside(ids, 0, INT32_MAX)):
            problems.append(f"segment ids {bad} must be in 0..{INT32_MAX}")
    if problems:
        raise ValueError("; ".join(problems))
    return _on_device(ids)


def checked_stops(stop_token_ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Stop ids, none or more. Raises ValueError for anything but a list of ids of the vocabulary."""
    if isinstance(stop_token_ids, (set, frozenset)):
        stop_token_ids = list(stop_token_ids)
    if isinstance(stop_token_ids, Sequence) and not stop_token_ids:
        return ()
    ids, problems = _integers("stop_token_ids", stop_token_ids)
    if ids is not None:
        if ids.ndim != 1:
            hint = f": write [{shown(ids.tolist())}]" if ids.ndim == 0 else ""
            problems.append(f"stop_token_ids of shape {ids.shape} must be a list of ids{hint}")
        problems += _range_problems("stop_token_ids", ids, vocab_size)
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(int(i) for i in ids)


def capacity(tokens: int, config: ModelConfig) -> int:
    """Length of the cache of a generation: at least SHORTEST_CACHE, so that all short ones share their
    compiled steps. (`new_cache` allocates for the next power of two, so longer ones share theirs.)

    Raises:
        ValueError: for more tokens than the model holds.
    """
    if tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompt and new tokens make {tokens}; the model holds at most "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    return min(max(tokens, SHORTEST_CACHE), config.max_position_embeddings)


def _integers(name: str, values: Any) -> tuple[Any, list[str]]:
    """An array of integers, known or traced, or None with what is wrong."""
    if is_traced(values):
        array = jnp.asarray(values)
        if jnp.issubdtype(array.dtype, jnp.integer):
            return array, []
        return None, [f"{name} of dtype {array.dtype} must be integers"]
    array, problem = integer_array(name, values)
    return array, [problem] if problem else []


def _on_device(array: Any) -> jax.Array:
    """As int32. On the host first: a cast on the device would be a program for every shape."""
    return array.astype(jnp.int32) if is_traced(array) else jnp.asarray(array.astype(np.int32))


def _known(array: Any) -> bool:
    return not is_traced(array)


def _range_problems(what: str, ids: Any, vocab_size: int) -> list[str]:
    bad = outside(ids, 0, vocab_size - 1) if _known(ids) else []
    return [f"{what} {bad} are outside the vocabulary 0..{vocab_size - 1}"] if bad else []


def _as_rows(ids: Any) -> str:
    """What a flat list of ids should have been."""
    if ids.ndim != 1 or not ids.size or not _known(ids):
        return ""
    written = ", ".join(str(i) for i in ids[:SHOWN_IDS]) + (", ..." if ids.size > SHOWN_IDS else "")
    return f": one sequence is written [[{written}]]"


def _is_row(row: Any) -> bool:
    """Whether an item of a list of prompts is itself a list, or an array with an axis."""
    return isinstance(row, (list, tuple)) or getattr(row, "ndim", 0) > 0
