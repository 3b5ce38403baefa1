"""Public entry points of the family: contracts, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arithmetic import round_up
from pallas_kernels.formats.index_keys import Keys, format_of
from pallas_kernels.formats.sizes import FP4_GROUP
from pallas_kernels.indexer import kernel_tpu, kernel_tpu_backward, kernel_tpu_select, reference, tuning
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits

VMEM_BUDGET = 48 * 2**20  # bytes a step may plan with; every generation has at least 64 MiB
VMEM_LIMIT = 60 * 2**20


def index_scores(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Keys,
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
    *,
    repeat: Int32[Array, ""] | None = None,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.IndexerBlocks | None = None,
    gradient_blocks: tuning.IndexerBlocks | None = None,
    interpret: Any = False,
) -> Float32[Array, "B T S"]:
    """Scores every visible compressed entry for every query; what the indexer is trained through.

    Equation (DeepSeek-V4 report, section 2.3, lightning indexer):
        I[t, s] = sum_h weights[t, h] relu(q[t, h] . keys[s])     for lo[t] <= s < hi[t], else -inf

    Args:
        q: [B, T, Hi, Di] rotated head queries, bf16 or f32 (Hi = 64, Di = 128 in V4).
        weights: f32[B, T, Hi] head weights, already scaled by (Di Hi)^-1/2.
        keys: the indexer's compressed keys: [B, S, Di] in the dtype of `q`, or `Fp8Keys`, or `Mxfp4`.
        lo, hi: i32[B, T] visible entries of each query, 0 <= lo and hi <= S.
        repeat: i32[], which layer's keys to read when `keys` is a stack [R, B, S, Di] of layers, as a cache
            holds them; None when there is no axis R.
        impl: "reference" runs plain XLA. There is no silent fallback.
        blocks: sizes of one grid step; None lets `tuning.choose_blocks` pick.
        gradient_blocks: the same for the gradients.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        f32[B, T, S]; B, T and S may be 0.

    Numerics: products accumulate in float32 (float32 operands at highest precision); ReLU, weights and the
        sum over heads are float32. Within 1e-5 (relative to the largest score) of the reference: the order of
        the sum over heads differs. Quantised keys are decoded exactly where e2m1 x e8m0 is a normal float32
        after division by 2^14 (scales from 2^-111 on); the fp8 scale multiplies the finished sum. An fp8 key
        that is not finite needs a NaN scale: v6e's matrix unit reads the NaN code as 480.
    Gradients: w.r.t. q, weights and keys, each in its operand's dtype, summed in float32 in a fixed order.
        Saves the operands; products are recomputed. Entries outside lo .. hi get none. For bf16 operands the
        gradient of a product is rounded to bf16 before it meets the other operand. Quantised keys and stacks
        of layers have none: differentiating raises.
    Cost: 2 B T S Hi (Di + 1) FLOP. HBM bytes: q and weights once, 4 B T S of scores, and the keys, as stored,
        once for every block of queries: B T / queries * S * (2 Di | Di + 4 | Di / 2 + Di / 32). Tiles past
        the last entry a block of queries sees are neither fetched nor scored. [Hi, T, S] is never in HBM.
        Backward: 2.5 times the FLOP, operands and scores twice. VMEM: `tuning.IndexerBlocks.vmem_bytes`.
    Sharding: `SPLITS`. Keys are repeated over the devices that share T; scores stay split in S.
    Raises:
        ValueError: for shapes or dtypes that do not fit, or blocks that do not suit T; all problems at once.
            For gradients through quantised keys or a stack.
    """
    _check("index_scores", q, weights, keys, lo, hi, repeat, impl)
    shape = *lo.shape, keys.shape[-2]
    if 0 in shape:
        return jnp.zeros(shape, jnp.float32)
    if impl == "reference":
        return reference.index_scores_reference(q, weights, _one_layer(keys, repeat), lo, hi)
    blocks = _chosen(blocks, q, keys, tuning.choose_blocks)
    if repeat is None and format_of(keys) == "plain":
        gradient_blocks = _chosen(gradient_blocks, q, keys, tuning.choose_gradient_blocks)
        return _scores(q, weights, keys, lo, hi, blocks, gradient_blocks, interpret)
    return _scores_only(q, weights, keys, lo, hi, repeat, blocks, interpret)


def index_select(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Keys,
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
    k: int,
    *,
    repeat: Int32[Array, ""] | None = None,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.IndexerBlocks | None = None,
    interpret: Any = False,
) -> Bool[Array, "B T S"]:
    """Chooses the k best entries of every query, exactly, without the scores ever leaving the chip.

    Equation (DeepSeek-V4 report, section 2.3, selection of compressed entries):
        mask[t, s] = |{ j visible : (I[t, j], -j) > (I[t, s], -s) }| < k     for visible s
        with I of `index_scores`

    Args:
        q, weights, keys, lo, hi, repeat, impl, blocks, interpret: as in `index_scores`.
        k: entries to choose, >= 1 (512 Flash, 1024 Pro); a query that sees fewer keeps them all.

    Returns:
        bool[B, T, S]; B, T and S may be 0. `index_list` makes a list of it.

    Numerics: scores as in `index_scores`; the choice among them is exact, ties go to the lowest index. NaN
        and -inf are never chosen; -0 and subnormals equal 0.
        Scores that differ by less than their rounding may be ordered differently
        from the reference.
    Gradients: none (a choice of indices).
    Cost: the FLOP of `index_scores`; HBM bytes: q, weights, keys as there, and 1 byte an entry of mask (4
        where a step has fewer than 32 rows), which XLA then turns into bool: a read and a write of it. The
        selection makes at most 34 counting passes over 2 bytes an entry in VMEM; equal scores at the cut add
        log2 S passes. It follows the last entry a block of queries sees, ends early once all its rows are
        decided, and hardly begins where none sees more than k.
    Sharding: `SPLITS`.
    Raises:
        ValueError: as `index_scores`, and for k < 1.
    """
    _check("index_select", q, weights, keys, lo, hi, repeat, impl, k)
    shape = *lo.shape, keys.shape[-2]
    if 0 in shape:
        return jnp.zeros(shape, bool)
    q, weights, keys = jax.lax.stop_gradient((q, weights, keys))
    if impl == "reference":
        scores = reference.index_scores_reference(q, weights, _one_layer(keys, repeat), lo, hi)
        return reference.index_select_reference(scores, k)
    blocks = _chosen(blocks, q, keys, tuning.choose_blocks)
    mask = kernel_tpu_select.index_select_fwd(
        *_kernel_operands(q, weights, keys, lo, hi, repeat, blocks),
        k=k,
        blocks=blocks,
        vmem_limit=VMEM_LIMIT,
        interpret=interpret,
    )
    return _unrow(mask, *lo.shape, blocks)[..., : keys.shape[-2]].astype(bool)


def _check(name, q, weights, keys, lo, hi, repeat, impl, k=1) -> None:
    batch, length, heads, width = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    layers, repeat_shape = ((), ()) if repeat is None else (("R",), jnp.shape(repeat))
    shape, form = keys.shape, format_of(keys)
    fits = len(shape) == 3 + len(layers) and (shape[-3], shape[-1]) == (batch, width)
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"k={k} must be at least 1": k >= 1,
        f"q {q.shape} must be [B, T, Hi, Di]": q.ndim == 4,
        f"weights {weights.shape} must be {[batch, length, heads]}": weights.shape == (batch, length, heads),
        f"keys {shape} must be {[*layers, batch, 'S', width]}": fits,
        f"lo {lo.shape} must be {[batch, length]}": lo.shape == (batch, length),
        f"hi {hi.shape} must be {[batch, length]}": hi.shape == (batch, length),
        f"repeat {repeat_shape} must be a scalar": repeat_shape == (),
    }
    if q.ndim == 4:
        rules |= not_empty(Hi=heads, Di=width)
    if repeat is not None and fits:
        rules |= not_empty(R=shape[0])
    if form == "plain":
        rules[f"keys {keys.dtype} must have the dtype of q, {q.dtype}"] = keys.dtype == q.dtype
    else:
        wanted, scale_width, scale_dtype = {
            "fp8": (jnp.float8_e4m3fn, 1, jnp.float32),
            "mxfp4": (jnp.uint8, width // FP4_GROUP, jnp.uint8),
        }[form]
        values, given = jax.tree.leaves(keys)
        scales = (*shape[:-1], scale_width)
        rules |= {
            f"{form} values {values.dtype} must be {jnp.dtype(wanted)}": values.dtype == wanted,
            f"{form} scales {given.dtype} must be {jnp.dtype(scale_dtype)}": given.dtype == scale_dtype,
            f"{form} scales {given.shape} must be {scales}": given.shape == scales,
            f"Di={width} must be a multiple of {FP4_GROUP} for mxfp4": form == "fp8"
            or width % FP4_GROUP == 0,
        }
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"{name}: " + "; ".join(problems))


def _one_layer(keys: Keys, repeat) -> Keys:
    return keys if repeat is None else jax.tree.map(lambda stack: stack[repeat], keys)


def _chosen(blocks, q, keys, choose):
    batch, length, heads, width = q.shape
    if blocks is None:
        size = keys.shape[-2]
        return choose(batch, length, heads, width, size, q.dtype.itemsize, vmem_budget=VMEM_BUDGET)
    if blocks.sequences > 1 and blocks.queries != length:
        raise ValueError(f"{blocks}: several sequences share a step only with all their T={length} queries")
    return blocks


def _rows(blocks, *operands):
    """Operands [B, T, ...] with one axis of query rows, padded with zeros to whole blocks."""

    def rows(x):
        more = [
            round_up(n, block) - n
            for n, block in zip(x.shape[:2], (blocks.sequences, blocks.queries), strict=True)
        ]
        x = jnp.pad(x, ((0, more[0]), (0, more[1])) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, *x.shape[2:])

    return [rows(x) for x in operands]


def _unrow(x, batch, length, blocks):
    return x.reshape(-1, round_up(length, blocks.queries), *x.shape[1:])[:batch, :length]


def _kernel_operands(q, weights, keys, lo, hi, repeat, blocks):
    """What `kernel_tpu.scoring_call` takes. Padding rows see no entry."""
    if repeat is None:
        keys, repeat = jax.tree.map(lambda x: x[None], keys), jnp.int32(0)
    q, weights, lo, hi = _rows(blocks, q, weights, lo[..., None], hi[..., None])
    return q, weights, keys, lo, hi, jnp.asarray(repeat, jnp.int32)


def _forward(q, weights, keys, lo, hi, repeat, blocks, interpret):
    rows = _kernel_operands(q, weights, keys, lo, hi, repeat, blocks)
    scores = kernel_tpu.index_scores_fwd(*rows, blocks=blocks, vmem_limit=VMEM_LIMIT, interpret=interpret)
    return _unrow(scores, *lo.shape, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _scores(q, weights, keys, lo, hi, blocks, gradient_blocks, interpret):
    return _forward(q, weights, keys, lo, hi, None, blocks, interpret)


def _save(q, weights, keys, lo, hi, blocks, gradient_blocks, interpret):
    return _forward(q, weights, keys, lo, hi, None, blocks, interpret), (q, weights, keys, lo, hi)


def _pull(blocks, gradient_blocks, interpret, saved, d_scores):
    q, weights, keys, lo, hi = saved
    batch = keys.shape[0]
    whole = ((0, round_up(batch, gradient_blocks.sequences) - batch), (0, 0), (0, 0))
    q, weights, lo, hi, d_scores = _rows(gradient_blocks, q, weights, lo[..., None], hi[..., None], d_scores)
    dq, dw, dk = kernel_tpu_backward.index_scores_bwd(
        *(q, weights, jnp.pad(keys, whole), lo, hi, d_scores),
        blocks=gradient_blocks,
        vmem_limit=VMEM_LIMIT,
        interpret=interpret,
    )
    length = saved[3].shape[1]
    return *(_unrow(x, batch, length, gradient_blocks) for x in (dq, dw)), dk[:batch], None, None


_scores.defvjp(_save, _pull)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _scores_only(q, weights, keys, lo, hi, repeat, blocks, interpret):
    return _forward(q, weights, keys, lo, hi, repeat, blocks, interpret)


def _refuse(q, weights, keys, lo, hi, repeat, blocks, interpret):
    raise ValueError(
        f"index_scores: no gradients for {format_of(keys)} keys {keys.shape}, repeat={repeat}: they need "
        "keys [B, S, Di] in the dtype of q, without repeat"
    )


_scores_only.defvjp(_refuse, lambda *_: None)


_ARGUMENTS = {
    "q": "B T Hi Di",
    "weights": "B T Hi",
    "keys": "*R B S Di",
    "lo": "B T",
    "hi": "B T",
    "repeat": "",
}
SPLITS = {
    "index_scores": Splits(_ARGUMENTS, ("B T S",), free="B T S", summed="Hi"),
    "index_select": Splits(_ARGUMENTS, ("B T S",), free="B T"),
}
