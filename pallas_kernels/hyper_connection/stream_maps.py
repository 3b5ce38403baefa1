"""What the streams of a token are weighed with around a sublayer: one type, whoever computes it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32


class StreamMaps(NamedTuple):
    """The maps of one sublayer (report, section 2.2), N streams; tokens are the last axes.

    A 4 x 4 matrix on the minor axes would leave every vector unit nearly empty.
    """

    pre: Float32[Array, "N *tokens"]  # stream j -> sublayer input
    post: Float32[Array, "N *tokens"]  # sublayer output -> stream k
    comb: Float32[Array, "N N *tokens"]  # comb[j, k]: from input stream j to output stream k


def columns(maps: StreamMaps) -> Float32[Array, "*tokens rows"]:
    """As kernels keep them: rows = 2 N + N^2 numbers a token, pre, post and comb row-major in [j, k]."""
    comb = maps.comb.reshape(-1, *maps.comb.shape[2:])
    return jnp.moveaxis(jnp.concatenate([maps.pre, maps.post, comb]), 0, -1)


def of_columns(kept: Float32[Array, "*tokens rows"], num_streams: int) -> StreamMaps:
    """The maps in such lines. A compiler sees that `columns` of them is `kept`, and its gradient too."""
    n = num_streams
    pre, post, comb = jnp.split(jnp.moveaxis(kept, -1, 0), [n, 2 * n])
    return StreamMaps(pre, post, comb.reshape(n, n, *comb.shape[1:]))
