"""What a sequence leaves behind: rings of recent rows, and the compressed entries emitted so far.

The length is the only state that moves. Recent rows live in rings addressed by position (slot = position
mod slots) with `max_rewind` spare slots, so taking back up to that many tokens is a change of length:
whatever lies past the length is invisible and will be overwritten by the same positions.

Every array carries a leading axis R of repeats of its layer (see `config.layer_stacks`), and readers and
writers take the repeat index: inside the scan over layers nothing slices a whole layer out of the stack.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from dsv4_jax.config import AttentionKind, ModelConfig, layer_stacks
from dsv4_jax.config.quantities import INT32_MAX, integer_array, integer_problem, outside
from dsv4_jax.model.geometry import compressor_geometry, window_geometry
from dsv4_jax.numerics import cache_formats, cache_storage
from dsv4_jax.numerics.cache_formats import CacheFormat, Stored
from dsv4_jax.numerics.cache_storage import num_slots, write_slots


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kv", "gate", "entries"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CompressorCache:
    """State of one compressor: raw rows of unfinished blocks and finished entries (inference, section 1)."""

    kv: Stored  # [R, B, M, w, Dc] projected values (or their bits), ring of M = w m + max_rewind rows
    gate: Stored  # [R, B, M, w, Dc] gate logits without the positional bias, same ring
    entries: Stored  # [R, B, S, Dc] in the cache's format; entry s covers tokens m s .. m s + m - 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["window", "compressor", "indexer"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer (or of R repeats of it)."""

    window: Stored  # [R, B, slots, Dh] in the cache's format
    compressor: CompressorCache | None  # CSA and HCA
    indexer: CompressorCache | None  # CSA


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["length", "written", "layers"],
    meta_fields=["max_length", "max_rewind"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a batch of sequences, each with its own length.

    `length` counts the tokens each row holds; `written` is its high-water mark, kept only to check rewinds.
    """

    length: Int32[Array, "B"]
    written: Int32[Array, "B"]
    layers: tuple[tuple[LayerCache, ...], ...]  # [stack][unit position]
    max_length: int
    max_rewind: int

    def rewind(self, num_tokens: int | Int32[Array, "B"]) -> "Cache":
        """Takes back the last tokens of each row; bit-exact, as if they had never been appended.

        Args:
            num_tokens: one count for all rows, or i32[B].

        Raises:
            ValueError: if a row would go below zero or further back than its ring still holds (under a jit
                the caller answers for it), for counts that are no integers or not one a row, or for a
                cache that an earlier call consumed.
        """
        check_not_consumed(self)
        batch = len(self.length)
        counts = _checked_rewind(num_tokens, batch)
        length = self.length - counts.astype(jnp.int32)
        if not any(isinstance(x, jax.core.Tracer) for x in (counts, self.length, self.written)):
            taken, held = np.broadcast_to(counts, (batch,)), np.asarray(self.length)
            left = held - taken.astype(np.int64)
            oldest = np.maximum(np.asarray(self.written) - self.max_rewind, 0)
            problems = [
                f"row {b}: rewinding {taken[b]} of {held[b]} tokens; the cache allows going "
                f"back to length {oldest[b]} (max_rewind={self.max_rewind})"
                for b in range(batch)
                if left[b] < oldest[b]
            ]
            if problems:
                raise ValueError("; ".join(problems))
        return dataclasses.replace(self, length=length)


def check_not_consumed(cache: Cache) -> None:
    """Raises ValueError if an earlier call took over this cache's arrays (donation), or those of a copy."""
    if not isinstance(cache, Cache):
        raise ValueError(f"a cache comes from new_cache or extend; this is a {type(cache).__name__}")
    for leaf in jax.tree.leaves(cache):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted():
            raise ValueError(
                "this cache was consumed by an earlier call, which returned the one to go on with "
                "(rewound copies share their arrays and go with it)"
            )


def check_room(cache: Cache, num_new: Int32[Array, "B"]) -> None:
    """Raises ValueError if a row would exceed `max_length`; traced lengths and counts are not known."""
    if any(isinstance(x, jax.core.Tracer) for x in (cache.length, num_new)):
        return
    after = np.asarray(cache.length, np.int64) + np.asarray(num_new)
    if (after > cache.max_length).any():
        row = int(after.argmax())
        raise ValueError(
            f"row {row} would hold {after[row]} tokens; the cache was made for max_length={cache.max_length}"
        )


def check_sizes(config: ModelConfig, batch: int, max_length: int, max_rewind: int) -> None:
    """Raises ValueError for sizes that are no integers or out of range, all at once."""
    most = config.max_position_embeddings
    length = integer_problem("max_length", max_length, 1, most)
    problems = [
        integer_problem("batch", batch, 1, INT32_MAX),
        length and f"{length} (max_position_embeddings)",
        integer_problem("max_rewind", max_rewind, 0, INT32_MAX),
    ]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))


def _checked_rewind(num_tokens: object, batch: int) -> np.ndarray | jax.Array:
    """Integers without axes, or [batch]."""
    if isinstance(num_tokens, jax.core.Tracer):
        counts, problem = num_tokens, None
        if not jnp.issubdtype(num_tokens.dtype, jnp.integer):
            problem = f"num_tokens of dtype {num_tokens.dtype} must be integers"
    else:
        counts, problem = integer_array("num_tokens", num_tokens)
        if counts is not None and (bad := outside(counts, 0, INT32_MAX)):
            problem = f"num_tokens {bad} must be in 0..{INT32_MAX}"
    if problem is None and counts.shape not in ((), (batch,)):
        problem = f"num_tokens of shape {counts.shape} must be one count, or {batch}, one a row"
    if problem:
        raise ValueError(problem)
    return counts


def new_cache(
    config: ModelConfig,
    batch: int,
    max_length: int,
    dtype: np.dtype,
    max_rewind: int = 8,
    row_dtype: np.dtype | None = None,
    format: CacheFormat = "plain",
    as_bits: bool = True,
) -> Cache:
    """An empty cache.

    Args:
        config: the model's.
        batch: B rows.
        max_length: tokens a row can hold; entries are allocated for floor(max_length / m), rounded up to
            a multiple of ROWS.
        dtype: of plain window rows, entries and keys.
        max_rewind: tokens that can be taken back at any time (drafts), >= 0.
        row_dtype: of the compressors' raw rows; None means `dtype`.
        format: how window rows, entries and keys are kept.
        as_bits: FP8 and bfloat16 numbers as unsigned integers, for XLA (`numerics.cache_formats`); kernels
            take the numbers themselves, and CSA entries in FP8, if there can be many, as rows of words.

    Raises:
        ValueError: for sizes below 1, beyond `max_position_embeddings`, or not integers.
    """
    check_sizes(config, batch, max_length, max_rewind)

    def empty(shape: tuple[int, ...], store: Callable[[jax.Array], Stored], dtype=dtype) -> Stored:
        return cache_storage.empty(shape, store, dtype, as_bits)

    def store_entries(x: jax.Array) -> Stored:
        return cache_formats.store_entries(x, format, config.qk_rope_head_dim)

    def store_keys(x: jax.Array) -> Stored:
        return cache_formats.store_keys(x, format)

    def chosen_entries(shape: tuple[int, int, int, int]) -> Stored:
        """Of CSA, of which a query looks at some."""
        return cache_storage.empty_entries(
            shape,
            dtype,
            format,
            as_bits,
            num_rotary=config.qk_rope_head_dim,
            num_heads=config.num_attention_heads,
            num_chosen=config.index_topk,
        )

    def compressor(repeats: int, kind: AttentionKind, width: int, make) -> CompressorCache:
        geometry = compressor_geometry(config, kind, max_rewind)
        rows = (repeats, batch, geometry.slots, geometry.branches, width)
        return CompressorCache(
            empty(rows, lambda x: x, row_dtype or dtype),
            empty(rows, lambda x: x, row_dtype or dtype),
            make((repeats, batch, geometry.num_entries(max_length), width)),
        )

    def layer(kind: AttentionKind, repeats: int) -> LayerCache:
        slots = window_geometry(config, max_rewind).slots
        window = empty((repeats, batch, slots, config.head_dim), store_entries)
        if kind == "window":
            return LayerCache(window, None, None)
        if kind == "hca":
            every = functools.partial(empty, store=store_entries)
            return LayerCache(window, compressor(repeats, kind, config.head_dim, every), None)
        main = compressor(repeats, kind, config.head_dim, chosen_entries)
        keys = functools.partial(empty, store=store_keys)
        keys = compressor(repeats, kind, config.index_head_dim, keys)
        return LayerCache(window, main, keys)

    # A length and a mark of its own: a donated cache must not hold one buffer twice.
    return Cache(
        length=jnp.zeros((batch,), jnp.int32),
        written=jnp.zeros((batch,), jnp.int32),
        layers=tuple(
            tuple(layer(attention, stack.repeats) for attention, _ in stack.kinds)
            for stack in layer_stacks(config)
        ),
        max_length=max_length,
        max_rewind=max_rewind,
    )


def write_ring(
    ring: Stored,
    repeat: Int32[Array, ""],
    new: Stored,
    start: Int32[Array, "B"],
    num_valid: Int32[Array, "B"],
) -> Stored:
    """Writes the valid rows of `new` [B, T, ...] at positions start + t; of more than M the last M stay."""
    batch, num_new = jax.tree.leaves(new)[0].shape[:2]
    slots = num_slots(ring)
    # The last min(T, M) valid rows of each row: no slot is then written twice.
    kept = min(num_new, slots)
    first = jnp.maximum(num_valid - kept, 0)
    token = first[:, None] + jnp.arange(kept, dtype=jnp.int32)
    slot = jnp.where(token < num_valid[:, None], (start[:, None] + token) % slots, slots)
    if kept < num_new:
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        new = jax.tree.map(lambda leaf: leaf.at[rows, token].get(mode="clip"), new)
    return write_slots(ring, repeat, slot, new)
