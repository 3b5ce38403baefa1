"""What `expert_ffn` means: every expert on every token. Nothing in this file is fast."""

import jax
import jax.numpy as jnp


def expert_ffn_reference(x, gate_up, down, expert_ids, weights, *, swiglu_limit, valid, first_expert):
    """The definition; the contract is in `op.expert_ffn`."""
    both = jnp.einsum("td,egfd->etgf", x, gate_up.astype(x.dtype), preferred_element_type=jnp.float32)
    gate, up = both[:, :, 0], both[:, :, 1]
    if swiglu_limit:
        gate, up = jnp.minimum(gate, swiglu_limit), jnp.clip(up, -swiglu_limit, swiglu_limit)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    out = jnp.einsum("etf,edf->etd", hidden, down.astype(x.dtype), preferred_element_type=jnp.float32)
    chosen = (first_expert + expert_ids)[..., None] == jnp.arange(gate_up.shape[0])
    share = (chosen * weights[..., None]).sum(axis=1) * valid[:, None]  # f32[T, E]
    return jnp.einsum("te,etd->td", share, out, preferred_element_type=jnp.float32)
