"""Public entry points of the family: contracts, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.arithmetic import round_up
from pallas_kernels.indexer import kernel_tpu, kernel_tpu_backward, reference, tuning

VMEM_BUDGET = 24 * 2**20  # bytes a step may plan with; every generation has at least 64 MiB


def index_scores(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Float[Array, "B S Di"],
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
    *,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.IndexerBlocks | None = None,
    interpret: Any = False,
) -> Float32[Array, "B T S"]:
    """Scores every visible compressed entry for every query; what the indexer is trained through.

    Equation (DeepSeek-V4 report, section 2.3, lightning indexer):
        I[t, s] = sum_h weights[t, h] relu(q[t, h] . keys[s])     for lo[t] <= s < hi[t], else -inf

    Args:
        q: [B, T, Hi, Di] rotated head queries, bf16 or f32 (Hi = 64, Di = 128 in V4).
        weights: f32[B, T, Hi] head weights, already scaled by (Di Hi)^-1/2.
        keys: [B, S, Di] the indexer's compressed keys, in the dtype of `q`.
        lo, hi: i32[B, T] visible entries of each query, 0 <= lo and hi <= S.
        impl: "reference" runs plain XLA. There is no silent fallback.
        blocks: sizes of one grid step; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        f32[B, T, S].

    Numerics: products accumulate in float32 (float32 operands at highest precision); ReLU, weights and the
        sum over heads are float32. Within 1e-5 (relative to the largest score) of the reference: the order of
        the sum over heads differs.
    Gradients: w.r.t. q, weights and keys, each in its operand's dtype, summed in float32 in a fixed order.
        Saves the operands; products are recomputed. Entries outside lo .. hi get none. For bf16 operands the
        gradient of a product is rounded to bf16 before it meets the other operand.
    Cost: 2 B T S Hi (Di + 1) FLOP. HBM bytes: q and weights once, 4 B T S of scores, and the keys once for
        every block of queries: B T / queries * S Di * itemsize. [Hi, T, S] is never in HBM. Backward:
        2.5 times the FLOP, operands and scores twice. VMEM: `tuning.IndexerBlocks.vmem_bytes`.
    Sharding: B and T may be split freely (keys replicated over T's axis), and S (scores stay split); Hi
        may be split if the results are summed. Di must be whole.
    Raises:
        ValueError: for shapes or dtypes that do not fit, or blocks that do not suit T; all problems at once.
    """
    _check("index_scores", q, weights, keys, lo, hi, impl)
    if impl == "reference":
        return reference.index_scores_reference(q, weights, keys, lo, hi)
    blocks = _chosen(blocks, q, keys)
    batch, length = lo.shape
    rows = _rows(q, weights, keys, lo, hi, blocks)
    scores = _scores(*rows, blocks, interpret)
    return _unrow(scores, batch, length, blocks)


def index_select(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Float[Array, "B S Di"],
    lo: Int32[Array, "B T"],
    hi: Int32[Array, "B T"],
    k: int,
    *,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.IndexerBlocks | None = None,
    interpret: Any = False,
) -> Bool[Array, "B T S"]:
    """Chooses the k best entries of every query, exactly, without the scores ever leaving the chip.

    Equation (DeepSeek-V4 report, section 2.3, selection of compressed entries):
        mask[t, s] = |{ j visible : (I[t, j], -j) > (I[t, s], -s) }| < k     for visible s
        with I of `index_scores`

    Args:
        q, weights, keys, lo, hi, impl, blocks, interpret: as in `index_scores`.
        k: entries to choose, >= 1 (512 Flash, 1024 Pro); a query that sees fewer keeps them all.

    Returns:
        bool[B, T, S].

    Numerics: scores as in `index_scores`; the choice among them is exact, ties go to the lowest index. NaN
        and -inf are never chosen. Scores that differ by less than their rounding may be ordered differently
        from the reference.
    Gradients: none (a choice of indices).
    Cost: the FLOP of `index_scores`; HBM bytes: q, weights, keys as there, and 4 bytes an entry of mask. The
        selection makes 32 + log2 S counting passes over 4 S bytes a row in VMEM; no row is sorted.
    Sharding: B and T may be split freely; S, Hi and Di must be whole on every device.
    Raises:
        ValueError: as `index_scores`, and for k < 1.
    """
    _check("index_select", q, weights, keys, lo, hi, impl, k)
    operands = jax.lax.stop_gradient((q, weights, keys))
    if impl == "reference":
        return reference.index_select_reference(reference.index_scores_reference(*operands, lo, hi), k)
    blocks = _chosen(blocks, q, keys)
    rows = _rows(*operands, lo, hi, blocks)
    mask = kernel_tpu.index_select_fwd(*rows, k=k, blocks=blocks, interpret=interpret)
    return _unrow(mask, *lo.shape, blocks).astype(bool)


def _check(name, q, weights, keys, lo, hi, impl, k=1) -> None:
    batch, length, heads, width = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"k={k} must be at least 1": k >= 1,
        f"q {q.shape} must be [B, T, Hi, Di]": q.ndim == 4,
        f"weights {weights.shape} must be {[batch, length, heads]}": weights.shape == (batch, length, heads),
        f"keys {keys.shape} must be {[batch, 'S', width]}": keys.ndim == 3
        and keys.shape[::2] == (batch, width),
        f"lo {lo.shape} must be {[batch, length]}": lo.shape == (batch, length),
        f"hi {hi.shape} must be {[batch, length]}": hi.shape == (batch, length),
        f"keys {keys.dtype} must have the dtype of q, {q.dtype}": keys.dtype == q.dtype,
    }
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"{name}: " + "; ".join(problems))


def _chosen(blocks, q, keys):
    _, length, heads, width = q.shape
    if blocks is None:
        return tuning.choose_blocks(
            length, heads, width, keys.shape[1], q.dtype.itemsize, vmem_budget=VMEM_BUDGET
        )
    if blocks.sequences > 1 and blocks.queries != length:
        raise ValueError(f"{blocks}: several sequences share a step only with all their T={length} queries")
    return blocks


def _rows(q, weights, keys, lo, hi, blocks):
    """Operands with one axis of query rows, padded to whole blocks; padding sees no entry."""
    batch, length = lo.shape
    more = round_up(batch, blocks.sequences) - batch, round_up(length, blocks.queries) - length

    def rows(x):
        x = jnp.pad(x, ((0, more[0]), (0, more[1])) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, *x.shape[2:])

    keys = jnp.pad(keys, ((0, more[0]), (0, 0), (0, 0)))
    return rows(q), rows(weights), keys, rows(lo)[:, None], rows(hi)[:, None]


def _unrow(x, batch, length, blocks):
    return x.reshape(-1, round_up(length, blocks.queries), x.shape[-1])[:batch, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _scores(q, weights, keys, lo, hi, blocks, interpret):
    return kernel_tpu.index_scores_fwd(q, weights, keys, lo, hi, blocks=blocks, interpret=interpret)


def _save(q, weights, keys, lo, hi, blocks, interpret):
    return _scores(q, weights, keys, lo, hi, blocks, interpret), (q, weights, keys, lo, hi)


def _pull(blocks, interpret, saved, d_scores):
    grads = kernel_tpu_backward.index_scores_bwd(*saved, d_scores, blocks=blocks, interpret=interpret)
    return (*grads, None, None)


_scores.defvjp(_save, _pull)
