"""Hyper-connections in plain XLA; the equations are those of `op`.

Everything here is float32; streams are stored in the compute dtype.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.block_matmul import matmul_xla
from pallas_kernels.hyper_connection.stream_maps import StreamMaps
from pallas_kernels.precision import einsum_float32


def sinkhorn(logits: Float32[Array, "N N B T"], num_iters: int, eps: float) -> Float32[Array, "N N B T"]:
    """Projects each logits[:, :, b, t] towards the doubly stochastic matrices (report, section 2.2).

    Row softmax, then columns, then `num_iters` - 1 times rows and columns; `eps` is added to the softmax
    and to every denominator. The last step normalises columns (axis 0, over input streams j).
    """
    mix = jax.nn.softmax(logits, axis=1) + eps
    mix = mix / (mix.sum(axis=0, keepdims=True) + eps)

    def normalise(mix: jax.Array, _: None) -> tuple[jax.Array, None]:
        mix = mix / (mix.sum(axis=1, keepdims=True) + eps)
        return mix / (mix.sum(axis=0, keepdims=True) + eps), None

    return jax.lax.scan(normalise, mix, None, length=num_iters - 1)[0]


def _scores(
    streams: Float[Array, "B T N D"], fn: Float32[Array, "rows N D"], eps: float
) -> Float32[Array, "rows B T"]:
    """(v fn^T) / rms(v) with v the flattened streams; dividing after the product is the same algebra."""
    x = streams.astype(jnp.float32)
    x = x.reshape(*x.shape[:-2], -1)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + eps)
    z = matmul_xla(x, fn.reshape(fn.shape[0], -1), jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(z, -1, 0) * inverse_rms


def _mix(streams, comb):
    """f32[B, T, N, D]: sum_j comb[j, k] X[j] for every k."""
    by_token = jnp.moveaxis(comb, (0, 1), (-2, -1))[..., None]  # [B, T, N, N, 1]
    # Spelled out per stream: a batched 4 x 4 product a token is far slower than N multiply-adds.
    return sum(
        by_token[:, :, j] * streams[:, :, j, None].astype(jnp.float32) for j in range(streams.shape[2])
    )


# The gradients of `combine` and `expand` are stated by hand: autodiff turns every stream's slice into a
# padded copy of all streams, three times the work and twice the compile time of a sublayer.


@jax.custom_vjp
def combine(streams: Float[Array, "B T N D"], pre: Float32[Array, "N B T"]) -> Float[Array, "B T D"]:
    """sum_j pre[j] X[j]: float32 sum, one cast to the dtype of the streams."""
    total = sum(pre[j][..., None] * streams[:, :, j].astype(jnp.float32) for j in range(streams.shape[2]))
    return total.astype(streams.dtype)


def _combine_backward(saved, d_out):
    streams, pre = saved
    d_out = d_out.astype(jnp.float32)
    d_streams = jnp.moveaxis(pre, 0, -1)[..., None] * d_out[:, :, None]
    d_pre = einsum_float32("btnd,btd->nbt", streams.astype(jnp.float32), d_out)
    return d_streams.astype(streams.dtype), d_pre


combine.defvjp(lambda streams, pre: (combine(streams, pre), (streams, pre)), _combine_backward)


def expand(
    streams: Float[Array, "B T N D"], update: Float[Array, "B T D"], maps: StreamMaps
) -> Float[Array, "B T N D"]:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j] (report, section 2.2); float32 sum, one cast."""
    return _expand(streams, update, maps.post, maps.comb)


@jax.custom_vjp
def _expand(streams, update, post, comb):
    written = jnp.moveaxis(post, 0, -1)[..., None] * update[:, :, None].astype(jnp.float32)
    return (written + _mix(streams, comb)).astype(streams.dtype)


def _expand_backward(saved, d_out):
    streams, update, post, comb = saved
    d_out32 = d_out.astype(jnp.float32)
    d_streams = _mix(d_out, comb.swapaxes(0, 1)).astype(streams.dtype)
    d_update = combine(d_out, post).astype(update.dtype)
    d_post = einsum_float32("btd,btkd->kbt", update.astype(jnp.float32), d_out32)
    d_comb = einsum_float32("btjd,btkd->jkbt", streams.astype(jnp.float32), d_out32)
    return d_streams, d_update, d_post, d_comb


_expand.defvjp(lambda *operands: (_expand(*operands), operands), _expand_backward)


def maps_xla(
    streams: Float[Array, "B T N D"],
    fn: Float32[Array, "rows N D"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    *,
    num_iters: int,
    hc_eps: float,
    norm_eps: float,
) -> StreamMaps:
    """The maps computed from the streams that enter a sublayer (report, section 2.2)."""
    n = streams.shape[-2]
    z = _scores(streams, fn, norm_eps)
    base = base[:, None, None]
    pre = jax.nn.sigmoid(z[:n] * scale[0] + base[:n]) + hc_eps
    post = 2 * jax.nn.sigmoid(z[n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (z[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n, *z.shape[1:])
    return StreamMaps(pre, post, sinkhorn(logits, num_iters, hc_eps))


def pre_xla(
    streams: Float[Array, "B T N D"],
    fn: Float32[Array, "rows N D"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    norm_weight: Float32[Array, "D"],
    *,
    num_iters: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "B T D"], StreamMaps]:
    """As `op.pre`: the normalised input of a sublayer, and its maps."""
    maps = maps_xla(streams, fn, base, scale, num_iters=num_iters, hc_eps=hc_eps, norm_eps=norm_eps)
    h = combine(streams, maps.pre)
    h32 = h.astype(jnp.float32)
    y = h32 * jax.lax.rsqrt(jnp.mean(jnp.square(h32), axis=-1, keepdims=True) + norm_eps)
    return (y * norm_weight).astype(h.dtype), maps


def post_pre_xla(
    streams: Float[Array, "B T N D"],
    update: Float[Array, "B T D"],
    maps: StreamMaps,
    fn: Float32[Array, "rows N D"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    norm_weight: Float32[Array, "D"],
    *,
    num_iters: int,
    hc_eps: float,
    norm_eps: float,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T D"], StreamMaps]:
    """As `op.post_pre`: `expand` by the maps of one sublayer, then `pre_xla` of the next."""
    streams = expand(streams, update, maps)
    settings = {"num_iters": num_iters, "hc_eps": hc_eps, "norm_eps": norm_eps}
    return streams, *pre_xla(streams, fn, base, scale, norm_weight, **settings)


def collapse_xla(
    streams: Float[Array, "B T N D"],
    fn: Float32[Array, "N N D"],
    base: Float32[Array, "N"],
    scale: Float32[Array, "1"],
    *,
    hc_eps: float,
    norm_eps: float,
) -> Float[Array, "B T D"]:
    """As `op.collapse`: sum_j (sigmoid(z_j scale + base_j) + eps) X[j]."""
    gates = jax.nn.sigmoid(_scores(streams, fn, norm_eps) * scale + base[:, None, None]) + hc_eps
    return combine(streams, gates)
