"""What the hyper-connection operations mean, in plain jax.numpy. Nothing in this file is fast.

All arithmetic is float32; what is stored in the dtype of the streams is rounded where the model rounds it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.hyper_connection.stream_maps import StreamMaps, of_columns
from pallas_kernels.precision import einsum_float32


def scores_reference(
    streams: Float[Array, "*tokens N D"], fn: Float32[Array, "rows N D"], norm_eps: float
) -> Float32[Array, "*tokens rows"]:
    """z = (v fn^T) / rms(v), v the streams of a token behind one another."""
    v = streams.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(v), axis=(-2, -1)) + norm_eps)
    z = einsum_float32("...nd,rnd->...r", v, fn)
    return z * inverse_rms[..., None]


def sinkhorn_reference(
    logits: Float32[Array, "*tokens N N"], num_iters: int, hc_eps: float
) -> Float32[Array, "*tokens N N"]:
    """Row softmax, columns, then `num_iters` - 1 times rows and columns (last axis: k, before it: j)."""
    mix = jax.nn.softmax(logits, axis=-1) + hc_eps
    mix = mix / (mix.sum(axis=-2, keepdims=True) + hc_eps)
    for _ in range(num_iters - 1):
        mix = mix / (mix.sum(axis=-1, keepdims=True) + hc_eps)
        mix = mix / (mix.sum(axis=-2, keepdims=True) + hc_eps)
    return mix


def maps_reference(
    z: Float32[Array, "*tokens rows"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    *,
    num_streams: int,
    num_iters: int,
    hc_eps: float,
) -> Float32[Array, "*tokens rows"]:
    """Columns pre (N), post (N), comb (N * N, row-major in [j, k])."""
    n = num_streams
    pre = jax.nn.sigmoid(z[..., :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * jax.nn.sigmoid(z[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (z[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*z.shape[:-1], n, n)
    comb = sinkhorn_reference(logits, num_iters, hc_eps)
    return jnp.concatenate([pre, post, comb.reshape(*z.shape[:-1], n * n)], axis=-1)


def combine_reference(
    streams: Float[Array, "*tokens N D"], pre: Float32[Array, "*tokens N"]
) -> Float[Array, "*tokens D"]:
    """sum_j pre[j] X[j], one rounding."""
    return (pre[..., None] * streams.astype(jnp.float32)).sum(axis=-2).astype(streams.dtype)


def pre_reference(
    streams, fn, base, scale, norm_weight, *, num_iters: int, hc_eps: float, norm_eps: float
) -> tuple[Float[Array, "*tokens D"], StreamMaps]:
    """The definition; the contract is in `op.pre`."""
    n = streams.shape[-2]
    z = scores_reference(streams, fn, norm_eps)
    maps = maps_reference(z, base, scale, num_streams=n, num_iters=num_iters, hc_eps=hc_eps)
    h = combine_reference(streams, maps[..., :n]).astype(jnp.float32)
    x = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + norm_eps) * norm_weight
    return x.astype(streams.dtype), of_columns(maps, n)


def post_reference(streams, update, maps) -> Float[Array, "*tokens N D"]:
    """The definition; the contract is in `op.post`."""
    post = jnp.moveaxis(maps.post, 0, -1)
    comb = jnp.moveaxis(maps.comb, (0, 1), (-2, -1))
    mixed = (comb[..., None] * streams.astype(jnp.float32)[..., :, None, :]).sum(axis=-3)
    written = post[..., None] * update.astype(jnp.float32)[..., None, :]
    return (written + mixed).astype(streams.dtype)


def post_pre_reference(streams, update, maps, fn, base, scale, norm_weight, **settings):
    """The definition; the contract is in `op.post_pre`."""
    streams = post_reference(streams, update, maps)
    return streams, *pre_reference(streams, fn, base, scale, norm_weight, **settings)


def collapse_reference(
    streams, fn, base, scale, *, hc_eps: float, norm_eps: float
) -> Float[Array, "*tokens D"]:
    """The definition; the contract is in `op.collapse`."""
    z = scores_reference(streams, fn, norm_eps)
    return combine_reference(streams, jax.nn.sigmoid(z * scale + base) + hc_eps)
