"""Public entry point of the family: contract, dispatch, custom VJP. No blocking here."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.grouped_matmul import reference, routing, stream, tpu, tuning, tuning_tpu, xla
from pallas_kernels.grouped_matmul.stored import Matrices, Stack, problems
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def expert_ffn(
    x: Float[Array, "T D"],
    gate_up: Matrices,
    down: Matrices,
    expert_ids: Int32[Array, "T Ke"],
    weights: Float32[Array, "T Ke"],
    *,
    swiglu_limit: float,
    repeat: Int32[Array, ""] | None = None,
    valid: Bool[Array, "T"] | None = None,
    expected_pairs: int | None = None,
    impl: Literal["xla", "pallas", "reference"] = "xla",
    round_hidden: Callable[[jax.Array], jax.Array] | None = None,
    blocks: tuning.ExpertBlocks | tuning_tpu.ItemBlocks | None = None,
    interpret: Any = False,
) -> Float32[Array, "T D"]:
    """The routed experts' output for every token, weighted and summed.

    Equation (DeepSeek-V4 report, section 2.1):
        y_t = sum_k weights[t, k] * Expert_{expert_ids[t, k]}(x_t)
        Expert(x) = (silu(min(x W1, c)) * clip(x W3, -c, c)) W2,   c = swiglu_limit

    Args:
        x: [T, D] tokens in the compute dtype.
        gate_up: [E, 2, F, D] W1 and W3 of the experts (E = 256 or 384 in V4), output dim first; rounded to
            the dtype of `x`. With `repeat` a stack [R, E, 2, F, D] of layers.
            Quantised, and then decoded exactly, one expert at a time (`formats.blocks`; codes of scales
            1 .. 254): `Fp8Blocks` with elements [E, 2, F, D], without NaN, and scales
            [E, 2, ceil(F / 128), ceil(D / 128)]; or `Mxfp4` with [E, 2, F, D / 2] and [E, 2, F, D / 32].
        down: [E, D, F] W2, likewise, in the same or another format.
        expert_ids: i32[T, Ke] in 0 .. E-1. Pairs whose id lies outside contribute nothing and cost nothing.
        weights: f32[T, Ke] routing weights, applied after W2.
        swiglu_limit: c >= 0 (10 in V4); 0 means no clamp.
        repeat: i32[], which layer of the stacks to use, 0 .. R - 1; None where there is no axis R. Experts
            are read where they lie; slicing a layer out of its stack would copy it.
        valid: bool[T]; False marks padding: such tokens give 0, get no gradient and cost nothing,
            whatever numbers (NaN too) stand in `x`. None means all True.
        expected_pairs: how many of the T * Ke pairs are likely to be in use, at least 1; None: all of them.
            Speed only: blocks are chosen for so many. A device that is given all tokens, and has one n-th of
            the experts, expects one n-th of the pairs.
        impl: "xla" for any backend, "pallas" for TPUs, or "reference". There is no silent fallback.
        round_hidden: for quantisation-aware numerics: the routing weight then multiplies the hidden
            activation (in float32, before it is rounded to the dtype of `x`), and this function, over the
            last axis, is applied to the result in front of W2. It brings its own gradient.
        blocks: speed only; None lets the family pick. "xla": rows handled at a time (`tuning`). "pallas":
            rows of an item and outputs of a tile (`tuning_tpu`; a tile that does not divide a matrix is
            chosen for it).
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        f32[T, D]. Finite for finite inputs; exact zeros for padding. T and Ke may be 0.

    Numerics: both products accumulate in float32, clamp, SiLU, gate product and routing weights are float32;
        the hidden activation is rounded to the dtype of `x` in between. A token's experts are added in
        ascending expert order. Within 1e-5 (relative to max |y|) of the reference in float32: only the
        order of sums differs; within 1e-2 in bfloat16: a hidden value may round the other way.
        Quantised weights give every bit that the numbers they stand for give with the same `blocks` ("xla").
        "pallas" decodes exactly too, tile by tile, but adds in another order: FP4 its even columns first
        (bfloat16 rows of few: in groups of 32, each sum times its scale), FP8 in groups of 128. There FP4
        scales must not exceed code 240 (2^113), and gradients of bfloat16 rows are rounded to bfloat16
        before each product. On a TPU, E5M2 subnormals (+-0.5 and 0 of FP4) must reach the matrix unit.
    Gradients: w.r.t. x, gate_up, down and weights, each in its operand's dtype, summed in float32 in sorted
        order (deterministic). Saves the operands only; hidden activations are recomputed. Weight
        gradients have the shape of the stack: slice a layer yourself where gradients are wanted.
        Quantised matrices have none (zeros); x, weights and the other matrix have theirs all the same.
    Cost: 6 * P * D * F FLOP for P valid pairs, rounded up to whole blocks an expert, and 3 * D * F weights
        (1/2 + 1/32 byte each in FP4, 1 in FP8) read once an expert in use; backward 16 * P * D * F.
        Memory: `tuning.ExpertBlocks.workspace_bytes`. "pallas": weights are read once for every item, that
        is an expert's pairs up to `tuning_tpu.choose_rows` of them (in decode: once), from where they lie;
        beside them about 2 R (D b + F b) + 4 R D bytes move for R places, b bytes a number of x, R = rows *
        (min(P, E) + P / rows + 1). VMEM: `tuning_tpu.ItemBlocks.vmem_bytes`.
    Sharding: `SPLITS`. A device with some of the experts takes ids relative to them: foreign ids contribute
        nothing. Scales are split like what they scale: FP8 in whole blocks of 128, FP4 of 32.
    Raises:
        ValueError: for shapes, dtypes, scales and blocks that do not fit, an unknown impl, or too many pairs
            for int32 sort keys; for "pallas" also float16, and FP4 matrices without a multiple of 32 outputs;
            all problems at once.
    """
    first_expert, num_experts = 0, gate_up.shape[0 if repeat is None else 1]
    if repeat is not None:
        if wrong := _stack_problems(gate_up, down, repeat):
            raise ValueError("expert_ffn: " + "; ".join(wrong))
        # The experts of all layers behind one another.
        gate_up, down = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (gate_up, down))
        first_expert = repeat * num_experts
    operands = _Operands(
        x, Stack.of(gate_up), Stack.of(down), expert_ids, weights,
        jnp.asarray(first_expert, jnp.int32),
        jnp.ones(x.shape[:1], bool) if valid is None else valid,
    )  # fmt: skip
    wrong = _problems(operands, num_experts, swiglu_limit, impl, blocks)
    if expected_pairs is not None and expected_pairs < 1:
        wrong.append(f"expected_pairs={expected_pairs} must be at least 1")
    if wrong := wrong + problems("gate_up", gate_up) + problems("down", down):
        raise ValueError("expert_ffn: " + "; ".join(wrong))
    if expert_ids.size == 0:
        return jnp.zeros(x.shape, jnp.float32)
    if impl == "reference":
        return reference.expert_ffn_reference(
            *operands, num_experts=num_experts, swiglu_limit=swiglu_limit, round_hidden=round_hidden
        )
    hidden = xla.Hidden(float(swiglu_limit), round_hidden)
    pairs = expert_ids.size if expected_pairs is None else min(expected_pairs, expert_ids.size)
    if impl == "pallas":
        return _on_kernels(tpu.Options(num_experts, hidden, blocks, pairs, interpret), *operands)
    return _expert_ffn(_Static(num_experts, hidden, blocks, pairs), *operands)


BLOCKS_OF = {"xla": tuning.ExpertBlocks, "pallas": tuning_tpu.ItemBlocks, "reference": object}
"""Implementations, and the sizes that each takes."""


class _Static(NamedTuple):
    num_experts: int
    hidden: xla.Hidden
    blocks: tuning.ExpertBlocks | None
    pairs: int


class _Operands(NamedTuple):
    x: jax.Array
    gate_up: Stack
    down: Stack
    expert_ids: jax.Array
    weights: jax.Array
    first_expert: jax.Array
    valid: jax.Array


def _problems(o: _Operands, num_experts: int, limit: float, impl: str, blocks) -> list[str]:
    """Every rule the arguments break."""
    gate_up, down = o.gate_up.shape, o.down.shape
    stack, _, width, hidden = gate_up if len(gate_up) == 4 else (0, 0, 0, 0)
    tokens, top_k = o.expert_ids.shape if o.expert_ids.ndim == 2 else (0, 0)
    bits = routing.key_bits(tokens * top_k, num_experts)
    rules = {
        f"impl={impl!r} must be 'xla', 'pallas' or 'reference'": impl in BLOCKS_OF,
        f"blocks={blocks} must be {BLOCKS_OF.get(impl, object).__name__} for impl={impl!r}": blocks is None
        or isinstance(blocks, BLOCKS_OF.get(impl, object)),
        f"swiglu_limit={limit} must not be negative": limit >= 0,
        f"gate_up {gate_up} must be [E, 2, F, D]": gate_up == (stack, 2, width, hidden),
        f"down {down} must be {[stack, hidden, width]}": down == (stack, hidden, width),
        f"expert_ids {o.expert_ids.shape} must be [T, Ke]": o.expert_ids.ndim == 2,
        f"weights {o.weights.shape} must be {o.expert_ids.shape}": o.weights.shape == o.expert_ids.shape,
        f"x {o.x.shape} must be {[tokens, hidden]}": o.x.shape == (tokens, hidden),
        f"valid {o.valid.shape} must be {[tokens]}": o.valid.shape == (tokens,),
        f"{tokens} x {top_k} pairs of {num_experts} experts need sort keys of {bits} > 31 bits": bits <= 31,
    }
    if len(gate_up) == 4:
        rules |= not_empty(E=stack, D=hidden, F=width)
    broken = [rule for rule, holds in rules.items() if not holds]
    if impl == "pallas":
        broken += tpu.problems(o.x, o.gate_up, o.down)
    return broken


def _stack_problems(gate_up: Matrices, down: Matrices, repeat: jax.Array) -> list[str]:
    """What keeps these from being stacks of layers."""
    rules = {
        f"gate_up {gate_up.shape} must be a stack [R, E, 2, F, D] for a repeat": len(gate_up.shape) == 5,
        f"down {down.shape} must be a stack [R, E, D, F] of as many for a repeat": len(down.shape) == 4
        and down.shape[:2] == gate_up.shape[:2],
        f"repeat {jnp.shape(repeat)} must be a scalar": jnp.shape(repeat) == (),
    }
    if len(gate_up.shape) == 5:
        rules |= not_empty(R=gate_up.shape[0])
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(static, *operands):
    o, blocks = _Operands(*operands), static.blocks
    if blocks is None:
        streamable = all(stream.can_stream(stack, o.x.dtype) for stack in (o.gate_up, o.down))
        fp4 = "mxfp4" in (o.gate_up.format, o.down.format)
        blocks = tuning.choose_blocks(
            static.pairs,
            static.num_experts,
            streamable=streamable,
            most_streamed=tuning.MAX_PAIRS_STREAMED_FP4 if fp4 else tuning.MAX_PAIRS_STREAMED,
        )
    return xla.expert_ffn_forward(
        *operands,
        num_experts=static.num_experts,
        hidden_of=static.hidden,
        blocks=blocks,
    )


def _save(static, *operands):
    return _expert_ffn(static, *operands), operands


def _pull(static, operands, dy):
    blocks = static.blocks
    if blocks is None or blocks.streamed:
        blocks = tuning.choose_blocks(static.pairs, static.num_experts, backward=True)
    dx, d_gate_up, d_down, d_weights = xla.expert_ffn_backward(
        dy,
        *operands,
        num_experts=static.num_experts,
        hidden_of=static.hidden,
        blocks=blocks,
    )
    return dx, Stack(d_gate_up), Stack(d_down), None, d_weights, None, None


_expert_ffn.defvjp(_save, _pull)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_kernels(options: tpu.Options, *operands):
    return tpu.expert_ffn_forward(options, *operands)


def _save_on_kernels(options, *operands):
    return _on_kernels(options, *operands), operands


def _pull_on_kernels(options, operands, dy):
    dx, d_gate_up, d_down, d_weights = tpu.expert_ffn_backward(options, dy, *operands)
    return dx, Stack(d_gate_up), Stack(d_down), None, d_weights, None, None


_on_kernels.defvjp(_save_on_kernels, _pull_on_kernels)


SPLITS = {
    "expert_ffn": Splits(
        arguments={
            "x": "T D",
            "gate_up": "*R E 2 F D",
            "down": "*R E D F",
            "expert_ids": "T Ke",
            "weights": "T Ke",
            "repeat": "",
            "valid": "T",
        },
        results=("T D",),
        free="T",
        summed="E F",
        multiples={"F": 128},
    )
}
