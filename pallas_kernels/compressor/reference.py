"""What `compressor` means, in plain jax.numpy. Nothing in this file is fast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


def compressor_reference(
    kv: Float[Array, "B T w Dc"],
    gate: Float[Array, "B T w Dc"],
    ape: Float32[Array, "m w Dc"],
    norm: Float32[Array, " Dc"],
    cos: Float32[Array, "B P pairs"],
    sin: Float32[Array, "B P pairs"],
    is_first: Bool[Array, "B P"],
    starts: Int32[Array, "B P"],
    *,
    eps: float,
) -> Float[Array, "B P Dc"]:
    """The definition; the contract is in `op.compressor`."""
    ratio, branches, _ = ape.shape
    batch = jnp.arange(kv.shape[0], dtype=jnp.int32)[:, None, None]
    rows = jnp.clip(starts[..., None] + jnp.arange(ratio, dtype=jnp.int32), 0, kv.shape[1] - 1)  # [B, P, m]
    values = kv.astype(jnp.float32)[batch, rows]  # [B, P, m, w, Dc]
    logits = gate.astype(jnp.float32)[batch, rows] + ape

    if branches == 1:
        values, logits = values[:, :, :, 0], logits[:, :, :, 0]
    else:
        # Branch 0 of the block before in the list, branch 1 of the block itself: 2 m rows.
        absent = is_first.at[:, 0].set(True)[:, :, None, None]
        before = lambda x, fill: jnp.where(absent, fill, jnp.roll(x[:, :, :, 0], 1, axis=1))  # noqa: E731
        values = jnp.concatenate([before(values, 0.0), values[:, :, :, 1]], axis=2)
        logits = jnp.concatenate([before(logits, -jnp.inf), logits[:, :, :, 1]], axis=2)
    pooled = (jax.nn.softmax(logits, axis=2) * values).sum(axis=2)

    pooled = pooled.astype(kv.dtype).astype(jnp.float32)
    entry = pooled * jax.lax.rsqrt(jnp.mean(pooled**2, axis=-1, keepdims=True) + eps) * norm

    width = 2 * cos.shape[-1]
    passed, even, odd = entry[..., :-width], entry[..., -width::2], entry[..., 1 - width :: 2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(*entry.shape[:-1], width)
    return jnp.concatenate([passed, turned], axis=-1).astype(kv.dtype)
