"""Public entry point of the family: contract, dispatch, custom VJP. No blocking here."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.grouped_matmul import reference, sorted_blocks
from pallas_kernels.grouped_matmul.tuning import choose_rows


def expert_ffn(
    x: Float[Array, "T D"],
    gate_up: Float[Array, "E 2 F D"],
    down: Float[Array, "E D F"],
    expert_ids: Int32[Array, "T Ke"],
    weights: Float32[Array, "T Ke"],
    *,
    swiglu_limit: float,
    num_experts: int | None = None,
    valid: Bool[Array, "T"] | None = None,
    first_expert: Int32[Array, ""] | int = 0,
    impl: Literal["xla", "reference"] = "xla",
    rows: int | None = None,
) -> Float32[Array, "T D"]:
    """The routed experts' output for every token, weighted and summed.

    Equation (DeepSeek-V4 report, section 2.1):
        y_t = sum_k weights[t, k] Expert_{expert_ids[t, k]}(x_t)
        Expert(x) = (silu(min(x W1, c)) * clip(x W3, -c, c)) W2,   c = swiglu_limit

    Args:
        x: [T, D] tokens in the compute dtype.
        gate_up: [E, 2, F, D], W1 then W3, output dims first; cast to the dtype of `x` when used.
        down: [E, D, F], W2.
        expert_ids: i32[T, Ke] in 0..num_experts - 1.
        weights: f32[T, Ke] routing weights.
        swiglu_limit: c (10 in V4); 0 means no clamp.
        num_experts: experts the ids refer to; all E by default. Smaller when `gate_up` is a stack of layers.
        valid: bool[T]; other tokens give 0 and cost nothing. All by default.
        first_expert: added to every id: where a layer's experts start inside a stack of layers.
        impl: "xla" or "reference". There is no silent fallback.
        rows: tokens a block; None lets `tuning.choose_rows` pick.

    Returns:
        f32[T, D].

    Numerics: float32 accumulation in both matmuls, clamp and SiLU; the hidden activation is cast to the
        dtype of `x` between them. A token's result does not depend on the other tokens.
    Gradients: w.r.t. x, gate_up, down and weights; hidden activations are recomputed.
    Cost: 6 T Ke D F FLOP, plus up to `rows` - 1 rows of padding an expert; each used expert's weights are
        read once a block.
    Sharding: T may be sharded; D and F must be whole; E only with the dispatch that expert parallelism brings.
    Raises:
        ValueError: for shapes that do not fit together.
    """
    tokens, hidden = x.shape
    if gate_up.shape[1] != 2 or gate_up.shape[3] != hidden:
        raise ValueError(f"gate_up {gate_up.shape} must be [E, 2, F, {hidden}]")
    if down.shape != (gate_up.shape[0], hidden, gate_up.shape[2]):
        raise ValueError(f"down {down.shape} must be {(gate_up.shape[0], hidden, gate_up.shape[2])}")
    if expert_ids.shape != weights.shape or expert_ids.shape[0] != tokens:
        raise ValueError(f"ids {expert_ids.shape} and weights {weights.shape} must be [{tokens}, Ke]")
    valid = jnp.ones(tokens, bool) if valid is None else valid
    first_expert = jnp.asarray(first_expert, jnp.int32)
    if impl == "reference":
        return reference.expert_ffn_reference(
            x, gate_up, down, expert_ids, weights,
            swiglu_limit=swiglu_limit, valid=valid, first_expert=first_expert,
        )  # fmt: skip
    num_experts = gate_up.shape[0] if num_experts is None else num_experts
    rows = rows or choose_rows(tokens * expert_ids.shape[1], num_experts)
    static = (num_experts, swiglu_limit, rows)
    return _expert_ffn(static, x, gate_up, down, expert_ids, weights, valid, first_expert)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(static, x, gate_up, down, expert_ids, weights, valid, first_expert):
    num_experts, limit, rows = static
    blocks = sorted_blocks.sort_into_blocks(expert_ids, valid, num_experts, rows)
    return sorted_blocks.forward(x, gate_up, down, blocks, weights, first_expert, limit=limit, rows=rows)


def _save(static, *operands):
    return _expert_ffn(static, *operands), operands


def _pull(static, operands, dy):
    num_experts, limit, rows = static
    x, gate_up, down, expert_ids, weights, valid, first_expert = operands
    blocks = sorted_blocks.sort_into_blocks(expert_ids, valid, num_experts, rows)
    dx, dgate_up, ddown, dweights = sorted_blocks.backward(
        x, gate_up, down, blocks, weights, first_expert, dy, limit=limit, rows=rows
    )
    none = [np.zeros(a.shape, jax.dtypes.float0) for a in (expert_ids, valid, first_expert)]
    grads = dx.astype(x.dtype), dgate_up.astype(gate_up.dtype), ddown.astype(down.dtype)
    return *grads, none[0], dweights, none[1], none[2]


_expert_ffn.defvjp(_save, _pull)
