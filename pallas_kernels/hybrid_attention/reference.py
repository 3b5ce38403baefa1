"""What `hybrid_attention` means, in plain jax.numpy. Nothing in this file is fast."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.precision import einsum_float32


def hybrid_attention_reference(
    q: Float[Array, "B T H Dh"],
    line: Float[Array, "B W-1+T Dh"],
    position: Int32[Array, "B T"],
    sink: Float32[Array, "H"],
    entries: Float[Array, "B S Dh"] | None,
    lo: Int32[Array, "B T"] | None,
    hi: Int32[Array, "B T"] | None,
    selected: Bool[Array, "B T S"] | None,
    *,
    window: int,
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """The definition; the contract is in `op.hybrid_attention`."""
    length = q.shape[1]
    # Query t stands at place t + W - 1 of the line; the key at place j is `distance` tokens older.
    distance = (
        jnp.arange(length, dtype=jnp.int32)[:, None] + window - 1 - jnp.arange(line.shape[1], dtype=jnp.int32)
    )
    visible = (distance >= 0) & (distance <= jnp.minimum(position, window - 1)[..., None])
    keys = line
    if entries is not None:
        index = jnp.arange(entries.shape[1], dtype=jnp.int32)
        chosen = (index >= lo[..., None]) & (index < hi[..., None])
        if selected is not None:
            chosen &= selected
        keys = jnp.concatenate([line, entries], axis=1)
        visible = jnp.concatenate([visible, chosen], axis=2)

    logits = einsum_float32("bthd,bkd->bthk", q, keys)
    logits = jnp.where(visible[:, :, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    top = jnp.maximum(logits.max(axis=-1), sink)[..., None]
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)
    out = einsum_float32("bthk,bkd->bthd", weight.astype(keys.dtype), keys)
    return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]


def gathered_attention_reference(
    q: Float[Array, "B T H Dh"],
    entries: Float[Array, "R B S Dh"],
    index: Int32[Array, "B T K"],
    repeat: Int32[Array, ""],
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """The definition; the contract is in `gathered.gathered_attention`."""
    batch = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None, None]
    keys = entries[repeat][batch, jnp.maximum(index, 0)]  # [B, T, K, Dh]
    logits = einsum_float32("bthd,btkd->bthk", q, keys)
    logits = jnp.where((index >= 0)[:, :, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    top = logits.max(axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1, keepdims=True)
    out = einsum_float32("bthk,btkd->bthd", weight.astype(keys.dtype), keys)
    return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype), (top + jnp.log(total))[..., 0]
