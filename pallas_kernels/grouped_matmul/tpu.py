"""The routed experts on TPU kernels: rows are laid out by work item, multiplied, and added up by token.

What is not a product with weights (choice of rows, `round_hidden`, sums over a token's experts) is plain XLA.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import kernel_tpu, tuning_tpu
from pallas_kernels.grouped_matmul.stored import Stack
from pallas_kernels.grouped_matmul.work_items import WorkItems, of_pairs, sum_rows, token_rows, work_items
from pallas_kernels.grouped_matmul.xla import Hidden


class Options(NamedTuple):
    """What is static; `blocks` None lets `tuning_tpu` pick, for so many `pairs`."""

    num_experts: int
    hidden: Hidden
    blocks: tuning_tpu.ItemBlocks | None
    pairs: int
    interpret: Any


def problems(x: jax.Array, gate_up: Stack, down: Stack) -> list[str]:
    """What the kernels do not take."""
    rules = {
        f"x {x.dtype} must be bfloat16 or float32 for the kernels": x.dtype in (jnp.bfloat16, jnp.float32)
    }
    for name, stack in (("gate_up", gate_up), ("down", down)):
        values = stack.values
        rules[f"{name} {values.dtype} must be bfloat16 or float32 for the kernels"] = (
            stack.format != "plain" or values.dtype in (jnp.bfloat16, jnp.float32)
        )
        rules[f"{name} {list(values.shape)} must have a multiple of 32 outputs for the kernels in FP4"] = (
            stack.format != "mxfp4" or values.shape[-2] % 32 == 0
        )
    return [rule for rule, holds in rules.items() if not holds]


def expert_ffn_forward(
    options: Options, x, gate_up: Stack, down: Stack, expert_ids, weights, first_expert, valid
) -> jax.Array:
    """f32[T, D]; the contract is in `op.expert_ffn`."""
    rows = _rows(options)
    items = work_items(expert_ids, valid, num_experts=options.num_experts, rows=rows)
    place_weights = _at_places(weights, items)
    rounding = options.hidden.round_weighted
    hidden = _product(
        options,
        token_rows(_columns_of(gate_up, x), items),
        gate_up,
        first_expert,
        items,
        swiglu=options.hidden.limit,
        weight=None if rounding is None else place_weights,
    )
    if rounding is not None:
        hidden = rounding(hidden)
    out = _product(options, _columns_of(down, hidden), _one(down), first_expert, items)[:, 0]
    return sum_rows(out, items, weights if rounding is None else None)


def expert_ffn_backward(
    options: Options, dy, x, gate_up: Stack, down: Stack, expert_ids, weights, first_expert, valid
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array]:
    """Gradients of x, gate_up, down and weights; None for quantised matrices. Hidden is recomputed."""
    rows = _rows(options)
    choice = dict(num_experts=options.num_experts, rows=rows)
    # Gradients of weights want every expert among the items, to write its zeros.
    plain = "plain" in (gate_up.format, down.format)
    items = work_items(expert_ids, valid, **choice, every_expert=plain)
    # Rows that are not in use are multiplied with each other there: zeros add nothing to any gradient.
    used = items.used[..., None]
    x_rows = jnp.where(used, token_rows(x, items), 0)
    dy_rows = jnp.where(used, token_rows(dy.astype(x.dtype), items), 0)
    weight = _at_places(weights, items)

    both = _product(options, _columns_of(gate_up, x_rows), gate_up, first_expert, items)
    hidden, pull = jax.vjp(lambda both, weight: _before(options.hidden, both, weight, x.dtype), both, weight)
    after = options.hidden.after(weight)[..., None]
    # Unweighted, it gives the routing weight's gradient too: dy . (W2 h) = (W2^T dy) . h
    d_hidden = _columns_back(down, _pull(options, dy_rows[:, None], _one(down), first_expert, items))
    d_both, d_weight = pull(d_hidden * after)
    if options.hidden.round_weighted is None:
        d_weight = (d_hidden * hidden).sum(axis=-1)
    d_both = jnp.where(used[:, None], d_both, 0).astype(x.dtype)
    d_x = _columns_back(gate_up, _pull(options, d_both, gate_up, first_expert, items))

    weighted = jnp.where(used, hidden * after, 0).astype(x.dtype)
    d_down = _weight_gradient(options, dy_rows[:, None], weighted, _one(down), first_expert, items)
    return (
        sum_rows(d_x, items).astype(x.dtype),
        _weight_gradient(options, d_both, x_rows, gate_up, first_expert, items),
        None if d_down is None else d_down[:, 0],
        of_pairs(d_weight, items),
    )


def _before(hidden: Hidden, both, weight, dtype):
    """f32[items, rows, F] in front of W2 from f32[items, 2, rows, F] and the routing weights."""
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    gate, up = flat(both[:, 0]), flat(both[:, 1])
    before = hidden.before(jnp.concatenate([gate, up], axis=1).T, weight.reshape(-1), dtype)
    return before.T.reshape(*weight.shape, -1)


def _rows(options: Options) -> int:
    if options.blocks is not None:
        return options.blocks.rows
    return tuning_tpu.choose_rows(options.pairs, options.num_experts)


def _at_places(weights, items: WorkItems):
    return weights.reshape(-1).at[items.pair].get(mode="promise_in_bounds")


def _one(stack: Stack) -> Stack:
    """[S, N, K] as [S, 1, N, K]."""
    return Stack(*(None if a is None else a[:, None] for a in stack))


def _columns_of(stack: Stack, rows):
    """The columns in the kernel's order: even ones before odd ones for FP4."""
    if stack.format != "mxfp4":
        return rows
    return jnp.concatenate([rows[..., 0::2], rows[..., 1::2]], axis=-1)


def _columns_back(stack: Stack, rows):
    if stack.format != "mxfp4":
        return rows
    return jnp.stack(jnp.split(rows, 2, axis=-1), axis=-1).reshape(rows.shape)


def _blocks(options: Options, kernel: tuning_tpu.Kernel, rows: int, stack: Stack, x) -> tuning_tpu.ItemBlocks:
    chosen, given = tuning_tpu.choose_blocks(kernel, rows, stack, x.dtype.itemsize), options.blocks
    if given is None:
        return chosen
    _, _, outer, width = stack.shape
    return tuning_tpu.ItemBlocks(
        rows,
        chosen.outer if outer % given.outer else given.outer,
        given.inner if given.inner and chosen.inner and width % given.inner == 0 else chosen.inner,
    )


def _product(options: Options, rows, stack: Stack, first_expert, items: WorkItems, **how):
    return kernel_tpu.grouped_product(
        rows, stack, items.expert + first_expert, items.count, items.total, axis="output",
        blocks=_blocks(options, "output", rows.shape[-2], stack, rows), interpret=options.interpret, **how,
    )  # fmt: skip


def _pull(options: Options, rows, stack: Stack, first_expert, items: WorkItems):
    """f32[items, rows, K] from [items, M, rows, N]."""
    return kernel_tpu.grouped_product(
        rows, stack, items.expert + first_expert, items.count, items.total, axis="input",
        blocks=_blocks(options, "input", rows.shape[-2], stack, rows), interpret=options.interpret,
    )  # fmt: skip


def _weight_gradient(options: Options, d, rows, stack: Stack, first_expert, items: WorkItems):
    """In the shape of the stack: zeros around this layer's experts."""
    if stack.format != "plain":
        return None
    own = kernel_tpu.grouped_weight_gradient(
        d, rows, items.expert, items.total, num_experts=options.num_experts,
        blocks=_blocks(options, "weights", rows.shape[-2], stack, rows),
        dtype=stack.values.dtype, interpret=options.interpret,
    )  # fmt: skip
    if len(stack.values) == options.num_experts:
        return own
    zeros = jnp.zeros(stack.values.shape, stack.values.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, own, first_expert, axis=0)
