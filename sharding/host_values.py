"""Values of the host on devices of several processes, and back.

Every process has the same value (a batch, a prompt), and keeps of it what its own devices hold; nothing is
sent. What comes out of a step may lie on devices of other processes: NumPy then sees a part of it only, and
JAX refuses to convert it. A step that hands numbers to the host therefore returns them whole on every device;
for everything else there is `fetched`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def put(x: jax.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
    """An array of the host, or on the default device, on the devices of a mesh.

    Args:
        x: the same in every process. (`jax.device_put` would compare them, with a collective at each call.)
        sharding: where it goes; of several processes or of this one.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda box: host[box])


def fetched(tree: Any) -> Any:
    """Every array of a tree as a NumPy array, wherever its parts are.

    Where parts are on devices of other processes this is a collective: every process must call it, in the
    same order as everything else. Each then has the whole in the memory of its host.
    """
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    mesh = x.sharding.mesh
    return np.asarray(_whole(NamedSharding(mesh, PartitionSpec()))(x))


@functools.lru_cache(maxsize=8)
def _whole(sharding: NamedSharding) -> Any:
    """One jit for each mesh, so that an array of a known shape compiles nothing."""
    return jax.jit(lambda x: x, out_shardings=sharding)
