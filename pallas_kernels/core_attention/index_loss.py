"""The indexer's loss: how far its softmax over entries is from what core attention gives them."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels import indexer as indexer_family
from pallas_kernels.core_attention.operands import Queries
from pallas_kernels.core_attention.xla import entries_visible, sink_softmax, window_visible
from pallas_kernels.held_rows import HeldRows
from pallas_kernels.indexer.xla import select_xla
from pallas_kernels.precision import einsum_float32
from pallas_kernels.splits import Splits

QUERIES_AT_ONCE = 64
"""Queries whose probabilities f32[B, c, H, W + S] and products f32[B, c, Hi, S] exist at the same time."""

HIDDEN = -1e30
"""Logit of an entry that is left out: finite, so that a row of them has finite gradients."""


def index_loss(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: HeldRows,
    index_keys: HeldRows,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    of_chosen: bool,
    rounded_scores: bool = False,
    block: int = QUERIES_AT_ONCE,
    impl: Literal["xla", "pallas", "reference"],
    interpret: Any = False,
) -> Float32[Array, "B T"]:
    """KL(p_t || softmax_s I[t, s]) of every query, in nats: what an indexer is trained by.

    Equation (DeepSeek-V3.2, arXiv 2512.02556, section 2.1.1; target of one joint softmax as in the V4 report,
        arXiv 2606.19348, section 2.3):
        A_t     = the entries lo_t <= s < hi_t; of them the `top_k` best by I if `of_chosen`
        a_ths   = exp(z_ths) / (exp(sink_h) + sum_{j in window} exp(z_thj) + sum_{j in A_t} exp(z_thj))
        p_ts    = sum_h a_ths / sum_{s in A_t} sum_h a_ths
        loss_t  = sum_{s in A_t} p_ts (log p_ts - log softmax_{A_t}(I)_ts),   0 where A_t is empty
        with I of `indexer.index_scores` and z of `hybrid_attention`. Heads are summed before p is normalised:
        a head that looks at its window says little about entries.

    Args:
        queries, line, entries, index_keys, sink, window, top_k: as `op.attend`; queries have all fields.
        of_chosen: the loss of the chosen entries (sparse stage), else of all visible ones (warm-up).
        rounded_scores: the choice is made by scores whose steps are rounded to bfloat16; "xla" only. The loss
            takes them unrounded, as a gradient that passes straight through does.
        block: queries at a time.
        impl: what computes the scores: "xla", the kernels of `indexer` ("pallas"), or its "reference".
        interpret: passed to the kernels.

    Returns:
        f32[B, T], >= 0 up to rounding.

    Numerics: float32 throughout, from operands of any float dtype.
    Gradients: w.r.t. queries.index_q, queries.index_weights and index_keys: softmax(I) - p through I. Nothing
        else has one: the target is data.
    Cost: 2 (W + S) H Dh + 2 S Hi Di FLOP a query forward, the second term three times more backward; a block
        is recomputed in backward. All S entries are multiplied, also where few are visible or chosen.
    Sharding: `SPLITS`. All heads meet in p.
    Raises:
        ValueError: for an unknown impl, or rounded scores that it does not compute.
    """
    rules = {
        f"impl={impl!r} must be 'xla', 'pallas' or 'reference'": impl in ("xla", "pallas", "reference"),
        f"rounded_scores: impl={impl!r} does not round the steps of its index scores": impl == "xla"
        or not rounded_scores,
        f"block={block} must be at least 1": block >= 1,
    }
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("index_loss: " + "; ".join(problems))
    batch, length = queries.position.shape
    if 0 in (batch, length, entries.size):
        return jnp.zeros((batch, length), jnp.float32)
    data = jax.lax.stop_gradient((queries.q, line, entries.prefix(entries.size, line.dtype), sink))
    q, line, values, sink = data
    keys = index_keys.prefix(index_keys.size, queries.index_q.dtype)
    block = min(block, length)
    filling = -length % block
    line = jnp.pad(line, ((0, 0), (0, filling), (0, 0)))

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, filling)) + ((0, 0),) * (x.ndim - 2))  # padding sees no entry: hi = 0
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    scored = functools.partial(_scores, impl=impl, interpret=interpret)
    sizes = {"window": window, "top_k": top_k if of_chosen else entries.size, "rounded": rounded_scores}

    def losses(xs: tuple) -> Float32[Array, "B c"]:
        return _block_losses(*xs, line, values, keys, sink, scored, **sizes)

    starts = jnp.arange(0, length + filling, block, dtype=jnp.int32)
    found = jax.lax.map(jax.checkpoint(losses), (starts, jax.tree.map(split, queries._replace(q=q))))
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]


def _block_losses(start, queries, line, values, keys, sink, scored, *, window, top_k, rounded):
    count = queries.position.shape[1]
    near = jax.lax.dynamic_slice_in_dim(line, start, count + window - 1, axis=1)
    allowed = entries_visible(queries, keys.shape[1])
    scores = scored(queries, keys)
    if keys.shape[1] > top_k:
        chosen_by = jax.lax.stop_gradient(_rounded_scores(queries, keys) if rounded else scores)
        allowed = select_xla(chosen_by, allowed, top_k)
    weight, total = sink_softmax(
        queries.q,
        jnp.concatenate([near, values], axis=1),
        jnp.concatenate([window_visible(queries.position, window), allowed], axis=2),
        sink,
    )
    by_entry = (weight / total)[..., near.shape[1] :].sum(axis=2)
    whole = by_entry.sum(axis=-1, keepdims=True)
    target = by_entry / jnp.where(whole > 0, whole, 1)
    logs = jax.nn.log_softmax(jnp.where(allowed, scores, HIDDEN), axis=-1)
    # 0 log 0 = 0; what is not allowed has target 0.
    own = jnp.log(jnp.where(target > 0, target, 1))
    return jnp.sum(jnp.where(target > 0, target * (own - logs), 0), axis=-1)


def _scores(queries, keys, *, impl, interpret):
    """I f32[B, c, S]; outside lo .. hi anything."""
    q, weights = queries.index_q, queries.index_weights
    if impl != "xla":
        how = {"impl": impl, "interpret": interpret}
        return indexer_family.index_scores(q, weights, keys, queries.lo, queries.hi, **how)
    return (jax.nn.relu(_products(q, keys)) * weights[..., None]).sum(axis=2)


def _products(q, keys):
    """q . k f32[B, c, Hi, S]."""
    batch, count, heads, width = q.shape
    # With a head's dimension of its own XLA:CPU multiplies by a transposed copy of the keys.
    products = einsum_float32("bnd,bsd->bns", q.reshape(batch, count * heads, width), keys)
    return products.reshape(batch, count, heads, -1)


def _rounded_scores(queries, keys):
    """As `indexer.xla.index_scores_xla` rounds them."""

    def to_grid(x):
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    products = to_grid(_products(queries.index_q, keys))
    return to_grid(to_grid(jax.nn.relu(products) * queries.index_weights[..., None]).sum(axis=2))


SPLITS = {
    "index_loss": Splits(
        {
            "queries": Queries("B T H Dh", "B T", "B T", "B T", "B T Hi Di", "B T Hi"),
            "line": "B W-1+T Dh",
            "entries": "R B S Dh",
            "index_keys": "R B S Di",
            "sink": "H",
        },
        ("B T",),
        free="B",
    )
}
