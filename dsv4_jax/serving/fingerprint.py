"""What must agree before the cached rows of one engine may be used by another."""

import hashlib
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from dsv4_jax.inference.drafters import Draft
from dsv4_jax.language_model import LanguageModel


def model_fingerprint(lm: LanguageModel, draft: Draft | None, *, with_weights: bool) -> bytes:
    """A digest of the architecture, the numerics and formats, this package's version, and the weights.

    Args:
        lm: the model.
        draft: whose rows are kept too.
        with_weights: read all weights once, on their devices. Without, the digest is good within one process
            that holds one set of weights.
    """
    digest = hashlib.blake2b(repr((lm.config, lm.policy, draft)).encode())
    digest.update(importlib.metadata.version("dsv4_jax").encode())
    if with_weights:
        paths = jax.tree_util.tree_leaves_with_path(lm.parameters)
        for (path, leaf), number in zip(paths, jax.device_get(_checksums(lm.parameters)), strict=True):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {int(number)}".encode())
    return digest.digest()


@jax.jit
def _checksums(parameters: object) -> list[UInt32[Array, ""]]:
    """One number a leaf, which changes with any of its bits but for a chance of 2^-32."""

    def checksum(leaf: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        factor = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            # An odd factor for every place, by multiplying indices with odd constants (Knuth's).
            step = np.uint32(2654435761 + 2 * axis)
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            factor = factor * np.uint32(size | 1) + index * step
        return jnp.sum(bits * (2 * factor + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in jax.tree.leaves(parameters)]
