"""Rows of a cache by number: the way in for whoever serves several sequences from one cache.

Every array of a cache has the batch on a known axis: `VECTORS` on axis 0, and all arrays of `STACKS`,
whatever their format, on axis 1, behind the repeats of the layer. A row is everything that a sequence left
behind, so rows move between slots and between caches of other batch sizes bit for bit.

All functions work under `jax.jit`, with caches and row numbers traced: then the caller answers for the
numbers. Each is compiled once for a number of rows, whichever rows they are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from dsv4_jax.config.quantities import INT32_MAX, integer_array, integer_problem, outside
from dsv4_jax.model.cache import Cache, check_not_consumed
from dsv4_jax.model.cache_counts import Counts

VECTORS = ("length", "written", "max_length")
"""Fields of a cache that are arrays [B]."""

STACKS = ("layers", "mtp", "dspark")
"""Fields of a cache whose arrays are [R, B, ...]; R = 1 for the MTP block's, 3 for the DSpark head's."""

SHOWN_DIFFERENCES = 4


def take(cache: Cache, rows: Any) -> Cache:
    """A cache of these rows, in this order; its arrays are copies, and the given cache is untouched.

    Args:
        cache: of B rows.
        rows: integers [n] in 0..B-1, n >= 1; a row may be taken more than once.

    Raises:
        ValueError: for row numbers that are not such integers, or a consumed cache.
    """
    check_not_consumed(cache)
    rows = _checked_rows(rows, len(cache.length), unique=False)
    counts = cache.counts_if_known()
    return _take(cache, rows).knowing(counts.take(rows) if counts and not _traced(rows) else None)


def snapshot(cache: Cache, row: Any) -> Cache:
    """One row as a cache of batch 1: `put` brings it back, whatever happened to the cache since.

    Raises:
        ValueError: for a row that is no integer in 0..B-1, or a consumed cache.
    """
    check_not_consumed(cache)
    if not _traced(row) and (problem := integer_problem("row", row, 0, len(cache.length) - 1)):
        raise ValueError(problem)
    return take(cache, jnp.reshape(row, (1,)) if _traced(row) else [int(row)])


def put(cache: Cache, rows: Any, other: Cache) -> Cache:
    """The cache with its rows `rows[i]` replaced by rows i of `other`. The cache is consumed, `other` is not.

    Args:
        cache: of B rows.
        rows: integers [n] in 0..B-1, no two equal.
        other: of n rows, of the same model, cache format, allocated capacity and `max_rewind`. A row brings
            its own `max_length`.

    Raises:
        ValueError: for other row numbers, caches that do not fit together, or consumed ones; all problems
            at once.
    """
    check_not_consumed(cache)
    check_not_consumed(other)
    problems = _differences(cache, other)
    try:
        rows = _checked_rows(rows, len(cache.length), unique=True)
        if len(rows) != len(other.length):
            problems.append(f"{len(rows)} rows cannot hold the {len(other.length)} of the other cache")
    except ValueError as refused:
        problems.append(str(refused))
    if problems:
        raise ValueError("; ".join(problems))
    counts, theirs = cache.counts_if_known(), other.counts_if_known()
    known = counts and theirs and not _traced(rows)
    return _put(cache, rows, other).knowing(counts.put(rows, theirs) if known else None)


def reset(cache: Cache, rows: Any) -> Cache:
    """The cache with these rows empty, as in a fresh one, bit for bit; what a row may hold (`max_length`)
    stays. The given cache is consumed.

    A length of zero alone would hide the old rows; zeros also make sure that nothing of one request, such
    as a number that is not finite, can reach the next one in its slot.

    Raises:
        ValueError: as `take`.
    """
    check_not_consumed(cache)
    rows = _checked_rows(rows, len(cache.length), unique=False)
    counts = cache.counts_if_known()
    return _reset(cache, rows).knowing(counts.reset(rows) if counts and not _traced(rows) else None)


def at_length(cache: Cache, length: Any) -> Cache:
    """The same arrays, read as if each row held so many tokens: for measurements at a chosen context.

    What lies in the arrays below that length is the caller's answer; `rewind` is the checked way back.

    Args:
        cache: of B rows, which shares its arrays with the result.
        length: integers [B] in 0..max_length of the row, or one for all rows.

    Raises:
        ValueError: for other lengths, or a consumed cache.
    """
    check_not_consumed(cache)
    batch = len(cache.length)
    lengths, problem = integer_array("length", length)
    if problem is None and lengths.shape not in ((), (batch,)):
        problem = f"length of shape {lengths.shape} must be one number, or {batch}, one a row"
    if problem:
        raise ValueError(problem)
    lengths = np.broadcast_to(lengths, (batch,))
    counts = cache.counts()
    most = np.full(batch, INT32_MAX) if counts is None else counts.max_length  # None: traced, not known
    problems = [
        f"row {row}: length {length} must be in 0..{most[row]}"
        for row, length in enumerate(lengths.tolist())
        if not 0 <= length <= most[row]
    ]
    if problems:
        raise ValueError("; ".join(problems))
    lengths = lengths.astype(np.int32)
    # Two arrays: a donated cache must not hold one buffer twice.
    placed = dataclasses.replace(cache, length=jnp.array(lengths), written=jnp.array(lengths))
    return placed.knowing(counts and Counts.of(lengths, lengths, most))


def _over_rows(change: Callable[..., jax.Array], *caches: Cache) -> Cache:
    """`change(batch axis, *arrays)` for every array of caches of one structure."""

    def changed(axis: int, name: str) -> Any:
        parts = [getattr(cache, name) for cache in caches]
        return jax.tree.map(functools.partial(change, axis), *parts)

    fields = {name: changed(0, name) for name in VECTORS} | {name: changed(1, name) for name in STACKS}
    return dataclasses.replace(caches[0], **fields)


def _at(axis: int, rows: jax.Array) -> tuple[Any, ...]:
    return (slice(None),) * axis + (rows,)


@jax.jit
def _take(cache: Cache, rows: Int32[Array, " n"]) -> Cache:
    return _over_rows(lambda axis, leaf: leaf.at[_at(axis, rows)].get(mode="clip"), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache: Cache, rows: Int32[Array, " n"], other: Cache) -> Cache:
    return _over_rows(lambda axis, leaf, new: leaf.at[_at(axis, rows)].set(new, mode="drop"), cache, other)


@functools.partial(jax.jit, donate_argnums=0)
def _reset(cache: Cache, rows: Int32[Array, " n"]) -> Cache:
    zero = lambda leaf: jnp.zeros((), leaf.dtype)  # noqa: E731
    empty = _over_rows(lambda axis, leaf: leaf.at[_at(axis, rows)].set(zero(leaf), mode="drop"), cache)
    return dataclasses.replace(empty, max_length=cache.max_length)


def _traced(rows: np.ndarray | jax.Array) -> bool:
    return isinstance(rows, jax.core.Tracer)


def _checked_rows(rows: Any, batch: int, *, unique: bool) -> np.ndarray | Int32[Array, " n"]:
    """Row numbers [n] as int32, on the host. Traced ones have their shape and dtype checked."""
    if _traced(rows):
        if rows.ndim != 1 or not len(rows) or not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(f"rows, {rows.dtype} of shape {rows.shape}, must be integers [n], n >= 1")
        return rows.astype(jnp.int32)
    if isinstance(rows, list | tuple) and not rows:  # numpy makes floats of it
        rows = np.zeros(0, np.int32)
    numbers, problem = integer_array("rows", rows)
    problems = [problem] if problem else []
    if problem is None:
        if numbers.ndim != 1 or not numbers.size:
            problems.append(f"rows of shape {numbers.shape} must be a list of at least one row number")
        if bad := outside(numbers, 0, batch - 1):
            problems.append(f"rows {bad} must be in 0..{batch - 1}")
        values, counts = np.unique(numbers, return_counts=True)
        if unique and (counts > 1).any():
            problems.append(f"rows {values[counts > 1].tolist()} are given more than once")
    if problems:
        raise ValueError("; ".join(problems))
    return numbers.astype(np.int32)


def _differences(cache: Cache, other: Cache) -> list[str]:
    """Why rows of the second cannot stand in the first."""
    if cache.max_rewind != other.max_rewind:
        return [f"the caches differ: max_rewind={cache.max_rewind} and {other.max_rewind}"]

    def arrays(one: Cache) -> dict[str, str]:
        """Path of an array -> its dtype and shape, without the number of rows."""
        found = {}
        for name in STACKS:
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(one, name))[0]:
                sizes = ", ".join(map(str, (leaf.shape[0], "B", *leaf.shape[2:])))
                found[name + jax.tree_util.keystr(path)] = f"{leaf.dtype}[{sizes}]"
        return found

    ours, theirs = arrays(cache), arrays(other)
    differing = [
        f"{path} is {ours.get(path, 'absent')} and {theirs.get(path, 'absent')}"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    ]
    if not differing:
        return []
    more = len(differing) - SHOWN_DIFFERENCES
    shown = ", ".join(differing[:SHOWN_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")
    return [f"the caches differ in model, format or capacity: {shown}"]
