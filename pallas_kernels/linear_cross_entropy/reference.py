"""What `linear_cross_entropy` means, in plain jax.numpy. Nothing in this file is fast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.precision import einsum_float32


def linear_cross_entropy_reference(
    hidden: Float[Array, "T D"], head: Float[Array, "V D"], ids: Int32[Array, "T"], *, precision: str
) -> tuple[Float32[Array, "T"], Float32[Array, "T"]]:
    """The definition; the contract is in `op.linear_cross_entropy`."""
    if precision == "bfloat16":
        hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    logits = einsum_float32("td,vd->tv", hidden, head)

    lse = jax.nn.logsumexp(logits, axis=1)
    is_target = (
        jnp.arange(head.shape[0], dtype=jnp.int32) == ids[:, None]
    )  # nowhere true for ids outside 0 .. V-1
    target_logit = jnp.where(is_target, logits, 0).sum(axis=1)
    return lse - target_logit, lse
