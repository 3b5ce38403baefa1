"""What `expert_ffn` means: every expert on every token. Nothing in this file is fast."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.stored import Stack, decoded
from pallas_kernels.precision import einsum_float32


def expert_ffn_reference(
    x,
    gate_up: Stack,
    down: Stack,
    expert_ids,
    weights,
    first_expert,
    valid,
    *,
    num_experts: int,
    swiglu_limit: float,
    round_hidden=None,
) -> jax.Array:
    """The definition; the contract is in `op.expert_ffn`."""
    gate_up, down = (
        jax.lax.dynamic_slice_in_dim(decoded(stack), first_expert, num_experts).astype(x.dtype)
        for stack in (gate_up, down)
    )
    x, weights = jnp.where(valid[:, None], x, 0), jnp.where(valid[:, None], weights, 0)

    both = einsum_float32("td,egfd->gtef", x, gate_up)
    gate, up = both[0], both[1]
    if swiglu_limit:
        gate, up = jnp.minimum(gate, swiglu_limit), jnp.clip(up, -swiglu_limit, swiglu_limit)
    hidden = jax.nn.silu(gate) * up
    chosen = expert_ids[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)  # [T, Ke, E]
    share = (chosen * weights[:, :, None]).sum(axis=1)
    if round_hidden is not None:
        # One expert is chosen at most once by a token, so weighting first and summing after are one thing.
        hidden = round_hidden((share[:, :, None] * hidden).astype(x.dtype))
        return einsum_float32("tef,edf->td", hidden, down)
    out = einsum_float32("tef,edf->ted", hidden.astype(x.dtype), down)
    return (share[:, :, None] * out).sum(axis=1)
