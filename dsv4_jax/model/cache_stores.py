"""The arrays of a cache by what they hold, for measurements that fill or weigh a cache themselves."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax

from dsv4_jax.config import AttentionKind
from dsv4_jax.model.cache import Cache, LayerCache
from dsv4_jax.numerics.cache_formats import Stored


class Store(NamedTuple):
    """One array of a layer's cache, or the arrays that keep one thing in a quantised format."""

    kind: AttentionKind  # of the layer
    holds: Literal["window", "rows", "entries", "keys"]  # "rows": a ring of one compressor
    stored: Stored  # [R, B, slots, ...]


def stores(cache: Cache) -> list[Store]:
    """Everything that the layers of a cache hold, layer by layer; without the slot of the MTP block."""
    return [store for stack in cache.layers for layer in stack for store in _of_layer(layer)]


def with_stores(cache: Cache, stored: Sequence[Stored]) -> Cache:
    """The cache with these in place of what `stores` lists, in its order.

    Raises:
        ValueError: for another number of them.
    """
    held = {id(store.stored) for store in stores(cache)}
    leaves, structure = jax.tree.flatten(cache.layers, is_leaf=lambda node: id(node) in held)
    if len(stored) != len(leaves):
        raise ValueError(f"{len(stored)} stores were given for a cache of {len(leaves)}")
    return dataclasses.replace(cache, layers=jax.tree.unflatten(structure, stored))


def _of_layer(layer: LayerCache) -> list[Store]:
    kind: AttentionKind = "csa" if layer.indexer else "hca" if layer.compressor else "window"
    found = [Store(kind, "window", layer.window)]
    for part, holds in ((layer.compressor, "entries"), (layer.indexer, "keys")):
        if part is not None:
            rows = [Store(kind, "rows", ring) for ring in (part.kv, part.gate)]
            found += [*rows, Store(kind, holds, part.entries)]
    return found
