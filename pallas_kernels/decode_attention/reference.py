"""What `decode_attention` means, in plain jax.numpy. Nothing in this file is fast."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_attention import stored
from pallas_kernels.precision import einsum_float32


def decode_attention_reference(
    q: Float[Array, "B T H Dh"],
    ring: stored.Entries,
    position: Int32[Array, "B T"],
    sink: Float32[Array, "H"],
    repeat: Int32[Array, ""],
    entries: stored.Entries | None,
    hi: Int32[Array, "B T"] | None,
    index: Int32[Array, "B T K"] | None,
    *,
    window: int,
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """The definition; the contract is in `op.decode_attention`."""
    keys = stored.decoded(ring)[repeat].astype(q.dtype)
    slots = keys.shape[1]
    last = position.max(axis=1, keepdims=True)
    held = (
        last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots
    )  # [B, M]: the position of the row in each slot
    distance = position[:, :, None] - held[:, None]
    visible = (distance >= 0) & (distance <= jnp.minimum(position, window - 1)[..., None])
    if entries is not None:
        rows = stored.decoded(entries)[repeat].astype(q.dtype)
        slot = jnp.arange(rows.shape[1], dtype=jnp.int32)
        if index is None:
            chosen = slot < hi[..., None]
        else:
            chosen = (index[..., None] == slot).any(axis=2)
        keys = jnp.concatenate([keys, rows], axis=1)
        visible = jnp.concatenate([visible, chosen], axis=2)
    # A row that no query sees may be anything: zero times NaN would not be zero.
    keys = jnp.where(visible.any(axis=1)[..., None], keys, 0)

    logits = einsum_float32("bthd,bkd->bthk", q, keys)
    logits = jnp.where(visible[:, :, None], logits * q.shape[-1] ** -0.5, -jnp.inf)
    top = jnp.maximum(logits.max(axis=-1), sink)[..., None]
    weight = jnp.exp(logits - top)
    total = weight.sum(axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)
    out = einsum_float32("bthk,bkd->bthd", weight.astype(keys.dtype), keys)
    return (out / total).astype(q.dtype), (top + jnp.log(total))[..., 0]
