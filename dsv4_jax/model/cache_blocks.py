"""A row of a cache as blocks of tokens and a state: what a prefix of a sequence leaves behind, in two parts.

What grows with the context (compressed entries and indexer keys) is the same for every sequence that begins
with the same tokens, and comes in blocks: all entries and keys of `block` tokens, of all layers. The rest is
a *state* of fixed size: window rings, the compressors' recent rows and slots of draft heads. A prefix whose
length is a multiple of the block is its blocks and the state at its end (report, section 3.5).

A pool keeps blocks of many prefixes by page number. Everything here is compiled once, whichever rows, pages
and blocks are asked for, and moves stored bytes: nothing is decoded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.cache_stores import Store, stores, with_stores
from dsv4_jax.numerics.cache_storage import num_slots, slot_axes

GROWING = ("entries", "keys")
"""What `cache_stores` says of stores that grow with the context."""

Pool = tuple[jax.Array, ...]
"""[pages, R, entries a block, ...] for every growing array of a cache, in the order of `stores`."""


class State(NamedTuple):
    """What is not blocks, of one row: arrays [R, 1, ...] of rings that later tokens may read.

    HCA's recent rows are left out: at the end of a block nothing of them is read again.
    """

    length: Int32[Array, ""]
    rings: tuple[Any, ...]
    heads: Any  # slots of the MTP block and of the DSpark head


def block_length(config: ModelConfig) -> int:
    """Tokens of the smallest block: those of a whole number of entries of every compressor, 128 for V4."""
    return math.lcm(config.csa_ratio, config.hca_ratio)


class _Leaf(NamedTuple):
    """One growing array: where its entries are and how many a block has."""

    axis: int  # of the entries, behind R and B
    count: int  # entries (or rows of them) of a block


def _leaves(cache: Cache, config: ModelConfig, block: int) -> list[_Leaf]:
    found = []
    for store in stores(cache):
        if store.holds not in GROWING:
            continue
        entries, size = block // config.ratio(store.kind), num_slots(store.stored)
        for leaf, axis in zip(jax.tree.leaves(store.stored), slot_axes(store.stored), strict=True):
            count, rest = divmod(leaf.shape[axis] * entries, size)
            if rest:
                raise ValueError(f"a block of {block} tokens is no whole number of rows of {leaf.shape}")
            found.append(_Leaf(axis, count))
    return found


def _growing(cache: Cache) -> list[jax.Array]:
    return jax.tree.leaves([store.stored for store in stores(cache) if store.holds in GROWING])


def _with_growing(cache: Cache, leaves: list[jax.Array]) -> Cache:
    """The cache with these in place of `_growing(cache)`."""
    rest, every = iter(leaves), []
    for store in stores(cache):
        if store.holds in GROWING:
            flat, tree = jax.tree.flatten(store.stored)
            every.append(jax.tree.unflatten(tree, [next(rest) for _ in flat]))
        else:
            every.append(store.stored)
    return with_stores(cache, every)


def _is_state(store: Store) -> bool:
    return store.holds not in GROWING and (store.kind, store.holds) != ("hca", "rows")


def new_pool(
    cache: Cache,
    config: ModelConfig,
    num_pages: int,
    block: int,
    put: Callable[[jax.Array], jax.Array] = jnp.asarray,
) -> Pool:
    """Room for so many blocks of rows of such a cache.

    Args:
        cache: whose format and layers count; arrays or shapes.
        config: of the model.
        num_pages: at least 1.
        block: tokens, a multiple of `block_length`.
        put: brings an array to the devices where it shall lie.

    Raises:
        ValueError: for a block that splits an entry.
    """
    smallest = block_length(config)
    if block < 1 or block % smallest:
        raise ValueError(f"block={block} must be a multiple of {smallest}, the lcm of the compression ratios")

    def pages(leaf: jax.Array, how: _Leaf) -> jax.Array:
        shape = list(leaf.shape)
        shape[how.axis] = how.count
        del shape[1]
        return put(jnp.zeros((num_pages, *shape), leaf.dtype))

    return tuple(map(pages, _growing(cache), _leaves(cache, config, block)))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def save_blocks(
    config: ModelConfig,
    block: int,
    pool: Pool,
    cache: Cache,
    number: Int32[Array, "B"],
    pages: Int32[Array, "B"],
) -> Pool:
    """Copies block `number[b]` of every row b to page `pages[b]`; a page that does not exist: not at all.

    The pool is consumed. Of rows without a page any number will do.
    """
    every = jnp.arange(len(number), dtype=jnp.int32)

    def save(kept: jax.Array, leaf: jax.Array, how: _Leaf) -> jax.Array:
        def cut(row: jax.Array, block: jax.Array) -> jax.Array:
            one = jax.lax.dynamic_index_in_dim(leaf, row, 1, keepdims=False)
            return jax.lax.dynamic_slice_in_dim(one, block * how.count, how.count, how.axis - 1)

        return kept.at[pages].set(jax.vmap(cut)(every, number), mode="drop")

    return tuple(map(save, pool, _growing(cache), _leaves(cache, config, block)))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def load_blocks(
    config: ModelConfig,
    block: int,
    cache: Cache,
    row: Int32[Array, ""],
    first: Int32[Array, ""],
    pool: Pool,
    pages: Int32[Array, " n"],
) -> Cache:
    """Copies pages to blocks first, first + 1, ... of a row; pages that do not exist are left out.

    The cache is consumed; its lengths stay: `put_state` sets that of the row.
    """

    def load(leaf: jax.Array, kept: jax.Array, how: _Leaf) -> jax.Array:
        new = kept.at[pages].get(mode="clip")  # [n, R, ...]
        # [n, R, ..., count, ...] -> [R, ..., n count, ...]
        new = jnp.moveaxis(new, 0, how.axis - 1)
        new = new.reshape(*new.shape[: how.axis - 1], -1, *new.shape[how.axis + 1 :])
        slot = (first + jnp.arange(len(pages), dtype=jnp.int32)) * how.count
        slot = jnp.where((pages >= 0) & (pages < len(kept)), slot, leaf.shape[how.axis])
        slot = (slot[:, None] + jnp.arange(how.count, dtype=jnp.int32)).reshape(-1)
        one = jax.lax.dynamic_index_in_dim(leaf, row, 1, keepdims=False)
        at = (slice(None),) * (how.axis - 1) + (slot,)
        one = one.at[at].set(new, mode="drop")
        return jax.lax.dynamic_update_index_in_dim(leaf, one, row, 1)

    return _with_growing(cache, list(map(load, _growing(cache), pool, _leaves(cache, config, block))))


@jax.jit
def read_page(pool: Pool, page: Int32[Array, ""]) -> tuple[jax.Array, ...]:
    """A copy of one page: an array [R, ...] for every array of the pool."""
    return tuple(jax.lax.dynamic_index_in_dim(kept, page, 0, keepdims=False) for kept in pool)


@functools.partial(jax.jit, donate_argnums=0)
def write_page(pool: Pool, page: Int32[Array, ""], arrays: tuple[jax.Array, ...]) -> Pool:
    """The pool, which is consumed, with one page as `read_page` gave it."""
    pairs = zip(pool, arrays, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(kept, new, page, 0) for kept, new in pairs)


@jax.jit
def take_state(cache: Cache, row: Int32[Array, ""]) -> State:
    """A copy of a row's state; the row's length should be a multiple of the block."""

    def cut(leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(leaf, row, 1, 1)

    rings = tuple(jax.tree.map(cut, store.stored) for store in stores(cache) if _is_state(store))
    length = jax.lax.dynamic_index_in_dim(cache.length, row, 0, keepdims=False)
    return State(length, rings, jax.tree.map(cut, (cache.mtp, cache.dspark)))


@functools.partial(jax.jit, donate_argnums=0)
def put_state(cache: Cache, row: Int32[Array, ""], state: State) -> Cache:
    """The cache with this state in a row, whose length becomes the state's. The cache is consumed."""

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, row, 1)

    rings = iter(state.rings)
    every = [
        jax.tree.map(put, store.stored, next(rings)) if _is_state(store) else store.stored
        for store in stores(cache)
    ]
    mtp, dspark = jax.tree.map(put, (cache.mtp, cache.dspark), state.heads)
    return dataclasses.replace(
        with_stores(cache, every),
        mtp=mtp,
        dspark=dspark,
        length=cache.length.at[row].set(state.length),
        written=cache.written.at[row].set(state.length),
    )
