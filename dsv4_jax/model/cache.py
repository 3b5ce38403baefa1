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

from dsv4_jax.config import DSPARK_STAGES, AttentionKind, ModelConfig, layer_stacks
from dsv4_jax.config.quantities import INT32_MAX, integer_array, integer_problem, outside
from dsv4_jax.model.cache_counts import Counts
from dsv4_jax.model.geometry import compressor_geometry, context_slots, stream_slots, window_geometry
from dsv4_jax.numerics import cache_formats, cache_storage
from dsv4_jax.numerics.cache_formats import CacheFormat, Stored
from dsv4_jax.numerics.cache_storage import num_slots, write_slots
from pallas_kernels.arithmetic import remainder
from sharding.host_values import fetched


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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["streams", "layer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class MtpCache:
    """State of the MTP block. Its row t joins the streams of token t with token t + 1 (report, section 2.1).

    In a row of n tokens the last one waits for its successor: the block's window ends at position n - 2.
    """

    streams: Stored  # [1, B, M, N, D] backbone streams (or their bits) by position, M = max_rewind + 1
    layer: LayerCache  # of its block, R = 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["length", "written", "max_length", "layers", "mtp", "dspark"],
    meta_fields=["max_rewind"],
    drop_fields=["known"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a batch of sequences, each with its own length.

    `length` counts the tokens each row holds; `written` is its high-water mark, kept only to check rewinds,
    and `max_length` what it may hold, kept only to refuse more. The arrays may have room for more tokens
    than that: caches of other `max_length` whose arrays are of the same size share their compiled programs.
    The three are known on the host too (`counts`), as long as only calls of this package change the cache.
    Whatever maps over its arrays, such as a `jax.jit` of the user's, returns a cache without that knowledge.
    """

    length: Int32[Array, "B"]
    written: Int32[Array, "B"]
    max_length: Int32[Array, "B"]
    layers: tuple[tuple[LayerCache, ...], ...]  # [stack][unit position]
    mtp: MtpCache | None  # only if the cache was made with it; every call then keeps it up to date
    dspark: LayerCache | None  # windows of a DSpark head's stages, R = 3; likewise
    max_rewind: int
    known: tuple[tuple[Array, ...], Counts] | None = None  # the arrays that were counted, and their numbers

    def counts(self) -> Counts | None:
        """`length`, `written` and `max_length` on the host; None while they are traced.

        If they are not known, the device is asked, which waits for it, once for this cache.
        """
        if self._is_traced():
            return None
        if self.counts_if_known() is None:
            object.__setattr__(self, "known", (self._counted(), Counts.of(*fetched(self._counted()))))
        return self.counts_if_known()

    def counts_if_known(self) -> Counts | None:
        """The same, or None if they are not known: the device is not asked."""
        if self.known is None or self._is_traced():
            return None
        # Numbers of other arrays are not this cache's: someone replaced a field.
        arrays, counts = self.known
        return counts if all(a is b for a, b in zip(arrays, self._counted(), strict=True)) else None

    def knowing(self, counts: Counts | None) -> "Cache":
        """The same cache, whose counts are these numbers on the host; None: they are not known."""
        known = None if counts is None or self._is_traced() else (self._counted(), counts)
        return dataclasses.replace(self, known=known)

    def _counted(self) -> tuple[Array, ...]:
        return self.length, self.written, self.max_length

    def _is_traced(self) -> bool:
        return any(isinstance(array, jax.core.Tracer) for array in self._counted())

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
        rewound = dataclasses.replace(self, length=self.length - counts.astype(jnp.int32))
        if isinstance(counts, jax.core.Tracer) or self._is_traced():
            return rewound
        held = self.counts()
        after = held.rewound(np.broadcast_to(counts, (batch,)).astype(np.int64))
        oldest = np.maximum(held.written - self.max_rewind, 0)
        problems = [
            f"row {b}: rewinding {held.length[b] - after.length[b]} of {held.length[b]} tokens; the cache "
            f"allows going back to length {oldest[b]} (max_rewind={self.max_rewind})"
            for b in range(batch)
            if after.length[b] < oldest[b]
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return rewound.knowing(after)


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


def counts_after(cache: Cache, num_new: np.ndarray | Int32[Array, "B"]) -> Counts | None:
    """What the cache counts after appending num_new[b] tokens to row b; None if either is traced.

    Waits for the device only if the cache's counts are not known (`Cache.counts`).

    Raises:
        ValueError: if a row would exceed `max_length`; it names every such row.
    """
    counts = None if isinstance(num_new, jax.core.Tracer) else cache.counts()
    if counts is None:
        return None
    after = counts.appended(np.asarray(num_new))
    problems = [
        f"row {row} would hold {length} tokens; the cache was made for max_length={most}"
        for row, (length, most) in enumerate(zip(after.length, after.max_length, strict=True))
        if length > most
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return after


def check_sizes(
    config: ModelConfig, batch: int, max_length: int, max_rewind: int, name: str = "max_length"
) -> None:
    """Raises ValueError for sizes that are no integers or out of range, all at once."""
    most = config.max_position_embeddings
    length = integer_problem(name, max_length, 1, most)
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
    capacity: int,
    dtype: np.dtype,
    max_rewind: int = 8,
    row_dtype: np.dtype | None = None,
    format: CacheFormat = "plain",
    as_bits: bool = True,
    max_length: int | Int32[Array, ""] | None = None,
    stream_dtype: np.dtype | None = None,
    dspark: bool = False,
) -> Cache:
    """An empty cache.

    Args:
        config: the model's.
        batch: B rows.
        capacity: tokens that the arrays of a row have room for: floor(capacity / m) entries are allocated,
            rounded up to a multiple of ROWS. `allocated_length` says what to give for a `max_length`.
        dtype: of plain window rows, entries and keys.
        max_rewind: tokens that can be taken back at any time (drafts), >= 0.
        row_dtype: of the compressors' raw rows; None means `dtype`.
        format: how window rows, entries and keys are kept.
        as_bits: FP8 and bfloat16 numbers as unsigned integers, for XLA (`numerics.cache_formats`); kernels
            take the numbers themselves, and CSA entries in FP8, if there can be many, as rows of words.
        max_length: tokens that a row may hold, at most `capacity`, which the caller answers for; None means
            that many. It may be traced: it decides no shape.
        stream_dtype: of residual streams, for a cache with a slot for the MTP block; None: without. A row's
            slot holds (max_rewind + 1) N D numbers of this dtype, and a window as every layer's.
        dspark: with a slot for the DSpark head: windows of its three stages.

    Raises:
        ValueError: for sizes below 1, beyond `max_position_embeddings`, or not integers; or for the slot of
            a block that the model does not have.
    """
    if stream_dtype is not None and not config.num_nextn_predict_layers:
        raise ValueError("this model has no MTP block (num_nextn_predict_layers = 0): its cache has no slot")
    if dspark and config.dspark is None:
        raise ValueError("this model has no DSpark draft head: its cache has no slot")
    check_sizes(config, batch, capacity, max_rewind, name="capacity")

    def empty(shape: tuple[int, ...], store: Callable[[jax.Array], Stored], dtype=dtype) -> Stored:
        return cache_storage.empty(shape, store, dtype, as_bits)

    def stack(shape: tuple[int, int, int, int], store: Callable[[jax.Array], Stored]) -> Stored:
        return cache_storage.empty_stack(shape, store, dtype, as_bits)

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
            make((repeats, batch, geometry.num_entries(capacity), width)),
        )

    def layer(kind: AttentionKind, repeats: int) -> LayerCache:
        slots = window_geometry(config, max_rewind).slots
        window = empty((repeats, batch, slots, config.head_dim), store_entries)
        if kind == "window":
            return LayerCache(window, None, None)
        if kind == "hca":
            every = functools.partial(stack, store=store_entries)
            return LayerCache(window, compressor(repeats, kind, config.head_dim, every), None)
        main = compressor(repeats, kind, config.head_dim, chosen_entries)
        keys = functools.partial(stack, store=store_keys)
        keys = compressor(repeats, kind, config.index_head_dim, keys)
        return LayerCache(window, main, keys)

    def mtp() -> MtpCache:
        shape = (1, batch, stream_slots(max_rewind), config.hc_mult, config.hidden_size)
        return MtpCache(empty(shape, lambda x: x, stream_dtype), layer("window", 1))

    def context() -> LayerCache:
        shape = (DSPARK_STAGES, batch, context_slots(config, max_rewind), config.head_dim)
        return LayerCache(empty(shape, store_entries), None, None)

    # Arrays of their own: a donated cache must not hold one buffer twice.
    return Cache(
        length=jnp.zeros((batch,), jnp.int32),
        written=jnp.zeros((batch,), jnp.int32),
        max_length=jnp.full((batch,), capacity if max_length is None else max_length, jnp.int32),
        layers=tuple(
            tuple(layer(attention, stack.repeats) for attention, _ in stack.kinds)
            for stack in layer_stacks(config)
        ),
        mtp=None if stream_dtype is None else mtp(),
        dspark=context() if dspark else None,
        max_rewind=max_rewind,
    )


def pinned_cache(cache: Cache, pinned: Callable[[jax.Array, str], jax.Array]) -> Cache:
    """The same cache, its rows split over a mesh.

    Args:
        cache: of a batch.
        pinned: takes an array and the letters of its first dims (`Operations.pinned`).
    """
    rows = {name: pinned(getattr(cache, name), "B") for name in ("length", "written", "max_length")}
    stacks = {name: getattr(cache, name) for name in ("layers", "mtp", "dspark")}
    return dataclasses.replace(cache, **rows, **jax.tree.map(lambda leaf: pinned(leaf, "R B"), stacks))


def write_ring(
    ring: Stored,
    repeat: Int32[Array, ""],
    new: Stored,
    start: Int32[Array, "B"],
    num_valid: Int32[Array, "B"],
    *,
    choose_narrow: bool = False,
) -> Stored:
    """Writes the valid rows of `new` [B, T, ...] at positions start + t; of more than M the last M stay.

    `choose_narrow`: as `cache_storage.write_slots`.
    """
    batch, num_new = jax.tree.leaves(new)[0].shape[:2]
    slots = num_slots(ring)
    # The last min(T, M) valid rows of each row: no slot is then written twice.
    kept = min(num_new, slots)
    first = jnp.maximum(num_valid - kept, 0)
    token = first[:, None] + jnp.arange(kept, dtype=jnp.int32)
    slot = jnp.where(token < num_valid[:, None], remainder(start[:, None] + token, slots), slots)
    if kept < num_new:
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        new = jax.tree.map(lambda leaf: leaf.at[rows, token].get(mode="clip"), new)
    return write_slots(ring, repeat, slot, new, choose_narrow=choose_narrow)
