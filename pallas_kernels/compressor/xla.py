"""The compressor in plain XLA; the equations are those of `op`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.compressor.blocks import block_rows


def compressor_xla(
    kv: Float[Array, "B T w Dc"],
    gate: Float[Array, "B T w Dc"],
    ape: Float32[Array, "m w Dc"],
    norm: Float32[Array, " Dc"],
    cos: Float32[Array, "B P pairs"],
    sin: Float32[Array, "B P pairs"],
    is_first: Bool[Array, "B P"],
    source: Int32[Array, "B P m"] | None,
    previous: Int32[Array, "B P m"] | None,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B P Dc"]:
    """The contract is in `op.compressor`. Rounded to `dtype` are the pooled rows, the norm and the result."""
    (ratio, branches, _), num_entries = ape.shape, cos.shape[1]
    own = branches - 1
    values = block_rows(kv[:, :, own], source, ratio, num_entries)
    logits = block_rows(gate[:, :, own], source, ratio, num_entries) + ape[:, own]
    if branches == 2:
        before = [
            _before(rows[:, :, 0], source, previous, ratio, num_entries, fill)
            for rows, fill in ((kv, 0.0), (gate, -jnp.inf))
        ]
        absent = is_first[..., None, None]
        values = jnp.concatenate([jnp.where(absent, 0, before[0]), values], axis=2)
        earlier = jnp.where(absent, -jnp.inf, before[1] + ape[:, 0])
        logits = jnp.concatenate([earlier, logits], axis=2)
    return _rotated(_normalised(_pooled(values, logits).astype(dtype), norm, eps), cos, sin)


def _pooled(
    values: Float[Array, "B P rows Dc"], logits: Float[Array, "B P rows Dc"]
) -> Float32[Array, "B P Dc"]:
    """sum_j softmax_j(logits)[channel] * values[j], independently for every channel."""
    weight = jax.nn.softmax(logits.astype(jnp.float32), axis=2)
    return (weight * values.astype(jnp.float32)).sum(axis=2)


def _before(
    rows: Float[Array, "B T Dc"],
    source: Int32[Array, "B P m"] | None,
    previous: Int32[Array, "B P m"] | None,
    ratio: int,
    num_entries: int,
    fill: float,
) -> Float[Array, "B P m Dc"]:
    """The rows of each block's predecessor; `fill` where the list has none."""
    if previous is not None:
        return block_rows(rows, previous, ratio, num_entries)
    grouped = block_rows(rows, source, ratio, num_entries)
    return jnp.concatenate([jnp.full_like(grouped[:, :1], fill), grouped[:, :-1]], axis=1)


def _normalised(
    x: Float[Array, "B P Dc"], weight: Float32[Array, " Dc"], eps: float
) -> Float[Array, "B P Dc"]:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y * weight).astype(x.dtype)


def _rotated(
    x: Float[Array, "B P Dc"], cos: Float32[Array, "B P pairs"], sin: Float32[Array, "B P pairs"]
) -> Float[Array, "B P Dc"]:
    width = 2 * cos.shape[-1]
    passed, turned = x[..., :-width], x[..., -width:]
    pairs = turned.astype(jnp.float32).reshape(*turned.shape[:-1], width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    y = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([passed, y.reshape(turned.shape).astype(x.dtype)], axis=-1)
