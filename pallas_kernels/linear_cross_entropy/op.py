"""Public entry point of the family: contract, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.linear_cross_entropy import kernel_tpu, reference, tuning, xla
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def linear_cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "T"],
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
    impl: Literal["xla", "pallas", "reference"] = "pallas",
    blocks: tuning.LinearCrossEntropyBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float32[Array, "T"], Float32[Array, "T"]]:
    """Negative log-likelihood of every token's target, and its log-sum-exp, without logits in HBM.

    Equation (DeepSeek-V4 report, section 2.1, prediction head):
        z_tv  = hidden_t . head_v
        lse_t = log sum_v exp(z_tv)
        nll_t = lse_t - z_{t, ids_t}

    Args:
        hidden: [T, D] bf16 or f32, what the head multiplies, after the final norm (D 4096 or 7168 in V4).
            Finite, that of padding tokens too.
        head: [V, D] bf16 or f32, output rows (V 129,280 in V4).
        ids: i32[T] targets in 0 .. V-1. Any other id picks a logit of 0: nll = lse, finite, with the
            gradient of lse. Padding may therefore hold any id, as long as the caller gives it weight 0.
        precision: "float32" multiplies float32 numbers as float32, forward and backward, which is what the
            head of V4 asks for; products of two bf16 operands are exact and stay one pass of the matrix
            unit. "bfloat16" rounds every factor to bf16 first, the gradient of the logits included.
        impl: "pallas" for TPUs; "xla" for any backend, 1024 tokens at a time, at precision "float32"; or
            "reference": plain XLA with all logits in memory. There is no silent fallback.
        blocks: tile sizes of all kernels; None lets `tuning.choose_blocks` pick for each.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        nll f32[T], >= 0 for ids in 0 .. V-1, and lse f32[T], in nats; T may be 0. Weights and the mean are
        the caller's: sum(weight * nll) / sum(weight). lse serves a z-loss and sharded vocabularies.

    Numerics: sums, maxima, exponentials and logarithms are float32. Within 1e-5, relative to max(1, |lse|),
        of the reference at either precision: only the order of sums differs.
    Gradients: w.r.t. hidden and head, through nll and lse, summed in float32 in a fixed order (deterministic)
        and rounded once to the operand's dtype. Saves the operands and lse; each gradient recomputes the
        logits. Within 1e-5 of autodiff of the reference in float32, relative to the largest entry; in
        bf16 within 1e-2 (one rounding of the result, and at precision "bfloat16" one of each factor; at
        "float32" each gradient of a logit is then two bf16 numbers, within 2^-18 of itself).
    Cost: FLOP 2 T V D forward, 8 T V D backward (4 with logits kept: recomputing costs 4 T V D more, and
        spares 4 T V bytes of HBM, 8.5 GB at T = 16384). The matrix unit multiplies bf16 numbers; a product
        takes 1 pass for two bf16 factors, 3 for one float32 factor, 6 for two. At precision "float32" the
        gradient of the logits is a float32 factor; 2 of its passes are enough for a gradient that is rounded
        to bf16. Passes of 2 T V D, forward and backward: 1 and 6 with bf16 operands, 6 and 24 with float32
        operands, 1 and 4 at precision "bfloat16".
        HBM bytes, with h and w bytes a number of hidden and head and (bt, bv) the blocks of each kernel:
            forward  T D h + ceil(T / bt) V D w + 12 T
            d_hidden 2 T D h + ceil(T / bt) V D w + 16 T
            d_head   2 V D w + ceil(V / bv) T D h + 16 T
        VMEM: `tuning.LinearCrossEntropyBlocks.vmem_bytes`: two blocks of each operand, bf16 terms of float32
        operands, three logits tiles, and in the gradients the float32 sums and two output blocks; about
        2 D (bt h + bv w) + 12 bt bv, + b D (4 + 2 bytes of the gradient); at most 40 MiB by choice.
    Sharding: `SPLITS`. Sum d_head over the devices. Devices can share V too: give each its rows and ids
        relative to them, then lse = logsumexp of the lse_i, and nll = lse - sum(lse_i - nll_i), as foreign
        ids pick 0. Wrap in `shard_map`: kernels are not partitioned by the compiler.
    Raises:
        ValueError: for shapes that do not fit, D or V of 0, dtypes other than bf16 and f32, ids other than
            i32, or an unknown precision or impl; all problems at once.
    """
    if problems := _problems(hidden, head, ids, precision, impl):
        raise ValueError("linear_cross_entropy: " + "; ".join(problems))
    if len(hidden) == 0:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32)
    if impl == "reference":
        return reference.linear_cross_entropy_reference(hidden, head, ids, precision=precision)
    if impl == "xla":
        return xla.linear_cross_entropy_xla(hidden, head, ids)
    inside = (ids >= 0) & (ids < head.shape[0])
    ids = jnp.where(inside, ids, -1)  # -1 is no entry, also not of a last block that sticks out
    nll, lse = _linear_cross_entropy((precision, blocks, interpret), hidden, head, ids[None])
    return nll[0], lse[0]


def weighted_cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    ids: Int32[Array, "T"],
    weights: Float32[Array, "T"],
    z_weight: Float32[Array, ""] | None = None,
    *,
    impl: Literal["xla", "pallas", "reference"],
    chunk: int = xla.CHUNK,
    interpret: Any = False,
) -> Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The weighted sum of the tokens' negative log-likelihoods: the loss of a batch as one operation.

    Equation (DeepSeek-V4 report, section 2.1, prediction head):
        loss = sum_t weights_t (nll_t + z_weight lse_t^2),   nll and lse of `linear_cross_entropy`

    Args:
        hidden: [T, D] bf16 or f32, what the head multiplies, after the final norm.
        head: [V, D] bf16 or f32, output rows.
        ids: i32[T] targets in 0 .. V-1; with weight 0 any id.
        weights: f32[T], data: they get no gradient with "xla".
        z_weight: f32[], data too: of a loss that keeps lse near 0; None: none.
        impl: "xla" for any backend, "pallas" for TPUs, or "reference". There is no silent fallback.
        chunk: "xla": tokens whose logits exist at the same time, >= 1.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        f32[], in nats if the weights are a mean's; 0 of no tokens. With `z_weight` also
        sum_t weights_t lse_t^2, f32[], which has no gradient.

    Numerics: logits, softmax and sums are float32 for every dtype of the operands.
    Gradients: w.r.t. hidden and head. "xla" computes them chunk by chunk in the forward pass and only scales
        them in the backward pass: neither the logits f32[T, V] nor their cotangent is ever whole in memory,
        and no product is done twice. "pallas" recomputes the logits, see `linear_cross_entropy`.
    Cost ("xla"): 6 T V D FLOP with gradients, 2 T V D without; memory 4 chunk V bytes plus, with gradients,
        one float32 copy each of hidden and head.
    Sharding: `SPLITS`; V as in `linear_cross_entropy`.
    Raises:
        ValueError: as `linear_cross_entropy`, and for an unknown impl.
    """
    if impl not in ("xla", "pallas", "reference"):
        raise ValueError(f"weighted_cross_entropy: impl={impl!r} must be 'xla', 'pallas' or 'reference'")
    if len(hidden) == 0:
        return jnp.float32(0) if z_weight is None else (jnp.float32(0), jnp.float32(0))
    if impl == "xla":
        return xla.weighted_cross_entropy_xla(hidden, head, ids, weights, z_weight=z_weight, chunk=chunk)
    nll, lse = linear_cross_entropy(hidden, head, ids, impl=impl, interpret=interpret)
    if z_weight is None:
        return jnp.sum(weights * nll)
    squares = jnp.sum(weights * lse**2)
    return jnp.sum(weights * nll) + z_weight * squares, jax.lax.stop_gradient(squares)


def _problems(hidden: jax.Array, head: jax.Array, ids: jax.Array, precision: str, impl: str) -> list[str]:
    """Every rule the arguments break."""
    floats = (jnp.bfloat16, jnp.float32)
    rules = {
        f"impl={impl!r} must be 'xla', 'pallas' or 'reference'": impl in ("xla", "pallas", "reference"),
        f"precision={precision!r} must be 'float32' or 'bfloat16'": precision in ("float32", "bfloat16"),
        f"precision={precision!r} is not computed by impl='xla'": impl != "xla" or precision != "bfloat16",
        f"hidden {hidden.shape} must be [T, D]": hidden.ndim == 2,
        f"head {head.shape} must be [V, D] with D of hidden {hidden.shape}": head.ndim == 2
        and head.shape[-1:] == hidden.shape[-1:],
        f"ids {ids.shape} must be [T] with T of hidden {hidden.shape}": ids.shape == hidden.shape[:1],
        f"hidden {hidden.dtype} and head {head.dtype} must be bfloat16 or float32": hidden.dtype in floats
        and head.dtype in floats,
        f"ids {ids.dtype} must be int32": ids.dtype == jnp.int32,
    }
    if head.ndim == 2:
        rules |= not_empty(V=head.shape[0], D=head.shape[1])
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_cross_entropy(static, hidden, head, ids):
    return _run(kernel_tpu.linear_cross_entropy_forward, "forward", static, hidden, head, ids)


def _save(static, hidden, head, ids):
    nll, lse = _linear_cross_entropy(static, hidden, head, ids)
    return (nll, lse), (hidden, head, ids, lse)


def _pull(static, saved, cotangents):
    hidden, head, ids, lse = saved
    operands = (hidden, head, ids, lse, *cotangents)
    d_hidden = _run(kernel_tpu.linear_cross_entropy_d_hidden, "d_hidden", static, *operands)
    d_head = _run(kernel_tpu.linear_cross_entropy_d_head, "d_head", static, *operands)
    return d_hidden, d_head, None


_linear_cross_entropy.defvjp(_save, _pull)


def _run(call, kernel, static, hidden, head, *per_token):
    precision, blocks, interpret = static
    if blocks is None:
        blocks = tuning.choose_blocks(
            kernel, len(hidden), *head.shape, hidden.dtype.itemsize, head.dtype.itemsize, precision
        )
    return call(hidden, head, *per_token, precision=precision, blocks=blocks, interpret=interpret)


SPLITS = {
    "linear_cross_entropy": Splits({"hidden": "T D", "head": "V D", "ids": "T"}, ("T", "T"), free="T"),
    "weighted_cross_entropy": Splits(
        {"hidden": "T D", "head": "V D", "ids": "T", "weights": "T", "z_weight": ""},
        ("",),
        free="",
        summed="T",
    ),
}
