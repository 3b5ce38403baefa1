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
    source: Int32[Array, "B P m"] | None,
    previous: Int32[Array, "B P m"] | None,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B P Dc"]:
    """The definition; the contract is in `op.compressor`."""
    ratio, branches, _ = ape.shape
    batch = jnp.arange(kv.shape[0], dtype=jnp.int32)[:, None, None]
    rows = jnp.arange(cos.shape[1] * ratio, dtype=jnp.int32).reshape(1, -1, ratio)
    rows = jnp.broadcast_to(rows, (*cos.shape[:2], ratio)) if source is None else source  # [B, P, m]
    values = kv.astype(jnp.float32)[batch, rows]  # [B, P, m, w, Dc]
    logits = gate.astype(jnp.float32)[batch, rows] + ape

    if branches == 1:
        values, logits = values[:, :, :, 0], logits[:, :, :, 0]
    else:
        # Branch 0 of the block before in the list, branch 1 of the block itself: 2 m rows.
        if previous is None:
            absent = is_first.at[:, 0].set(True)[:, :, None, None]
            before = [jnp.roll(x[:, :, :, 0], 1, axis=1) for x in (values, logits)]
        else:
            absent = is_first[:, :, None, None]
            before = [x.astype(jnp.float32)[batch, previous][:, :, :, 0] for x in (kv, gate)]
            before[1] += ape[:, 0]
        values = jnp.concatenate([jnp.where(absent, 0.0, before[0]), values[:, :, :, 1]], axis=2)
        logits = jnp.concatenate([jnp.where(absent, -jnp.inf, before[1]), logits[:, :, :, 1]], axis=2)
    pooled = (jax.nn.softmax(logits, axis=2) * values).sum(axis=2)

    pooled = pooled.astype(dtype).astype(jnp.float32)
    entry = pooled * jax.lax.rsqrt(jnp.mean(pooled**2, axis=-1, keepdims=True) + eps) * norm

    width = 2 * cos.shape[-1]
    passed, even, odd = entry[..., :-width], entry[..., -width::2], entry[..., 1 - width :: 2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(*entry.shape[:-1], width)
    return jnp.concatenate([passed, turned], axis=-1).astype(dtype)
