"""Public entry points of the family: contracts and dispatch. The kernels are those of other families."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.core_attention import by_kernels, xla
from pallas_kernels.core_attention.operands import Queries
from pallas_kernels.held_rows import HeldRows
from pallas_kernels.splits import Splits

Implementation = Literal["xla", "pallas", "reference"]


def attend(
    queries: Queries,
    line: Float[Array, "B past+T Dh"],
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool = False,
    forward_only: bool = False,
    impl: Implementation,
    interpret: Any = False,
) -> Float[Array, "B T H Dh"]:
    """Attention of the T queries of a call to a window of recent tokens and compressed entries.

    Equation (DeepSeek-V4 report, section 2.3): `hybrid_attention` over the last W tokens of a query's segment
        and those entries lo <= s < hi that it may see: all of them (HCA), the `top_k` best by
        `indexer.index_scores` (CSA), or none (window layers).

    Args:
        queries: of the whole call, [B, T, ...].
        line: [B, W - 1 + T, Dh] window entries of the W - 1 tokens before the call, then of the call.
        entries: compressed entries; None for window layers.
        index_keys: the indexer's keys for the same entries; None for HCA.
        sink: f32[H] logits, finite, not scaled.
        window: W >= 1 (128 in V4).
        top_k: Ki, entries a CSA query may attend to (512 or 1024 in V4).
        rounded_scores: round every step of the index scores to bfloat16; "xla" only.
        forward_only: nobody asks for gradients (a call with a cache). Only then, "pallas" fetches the chosen
            entries row by row once a query sees as many as `hybrid_attention.tuning.gather_from` says; else
            all visible ones are read and masked. Nothing changes for "xla".
        impl: "xla" for any backend, "pallas" for TPUs, or "reference", which composes the references of
            `indexer` and `hybrid_attention`. There is no silent fallback.
        interpret: passed to the kernels; tests set it, callers leave it alone.

    Returns:
        [B, T, H, Dh] in the dtype of `queries.q`, still rotated. B, T and S may be 0.

    Numerics: as `hybrid_attention` and `indexer.index_select`: the choice is exact, ties go to the lowest
        index. Scores that differ by less than their rounding may be ordered differently.
    Gradients: w.r.t. queries.q, line, entries, sink. "xla" recomputes a block of queries at a time; "pallas"
        as `hybrid_attention`. None through the choice.
    Cost: "xla" reads, for every block of 128 queries, the shortest power-of-two prefix of the entries that
        holds all the block can see, and beyond 8 `top_k` of them gathers the chosen ones. "pallas": see
        `indexer.index_select` and `hybrid_attention`.
    Sharding: `SPLITS`, where the dims of entries and keys are those of their stack.
    Raises:
        ValueError: for an unknown impl, rounded scores that it does not compute, a line that does not fit, or
            index keys without entries; all problems at once. As the ops that it calls.
    """
    _check("attend", queries, line, entries, index_keys, window, rounded_scores, impl)
    if 0 in queries.q.shape:
        return jnp.zeros_like(queries.q)
    operands = (queries, line, entries, index_keys, sink)
    sizes = {"window": window, "top_k": top_k}
    if impl == "xla":
        return xla.attend_xla(*operands, **sizes, rounded_scores=rounded_scores)
    how = {"impl": impl, "interpret": interpret}
    return by_kernels.attend_by_kernels(*operands, **sizes, forward_only=forward_only, how=how)


def attend_cached(
    queries: Queries,
    ring: HeldRows,
    entries: HeldRows | None,
    index_keys: HeldRows | None,
    sink: Float32[Array, "H"],
    *,
    window: int,
    top_k: int,
    rounded_scores: bool = False,
    impl: Implementation,
    interpret: Any = False,
) -> Float[Array, "B T H Dh"]:
    """Attention of a few new tokens, whose rows and entries are in the cache already.

    Equation (DeepSeek-V4 report, section 2.3): as `attend`, with the line of window entries in a ring.

    Args:
        queries: of the whole call: T consecutive tokens of each sequence.
        ring: rows of recent tokens, slot = position mod M, M >= W - 1 + T.
        entries, index_keys, sink, window, top_k, rounded_scores, impl, interpret: as `attend`. "pallas" and
            "reference" read all three stacks as they are stored, in the formats of `decode_attention` and
            `indexer`.

    Returns:
        [B, T, H, Dh] in the dtype of `queries.q`, still rotated. B, T and S may be 0.

    Numerics: as `decode_attention` and `indexer.index_select`.
    Gradients: none; training has no cache.
    Cost: "xla" as `attend`; "pallas" as `decode_attention`.
    Sharding: `SPLITS`, where the dims of ring, entries and keys are those of their stacks.
    Raises:
        ValueError: for an unknown impl, rounded scores that it does not compute, or index keys without
            entries; all problems at once. As the ops that it calls.
    """
    _check("attend_cached", queries, None, entries, index_keys, window, rounded_scores, impl)
    if 0 in queries.q.shape:
        return jnp.zeros_like(queries.q)
    operands = (queries, ring, entries, index_keys, sink)
    sizes = {"window": window, "top_k": top_k}
    if impl == "xla":
        return xla.attend_cached_xla(*operands, **sizes, rounded_scores=rounded_scores)
    how = {"impl": impl, "interpret": interpret}
    return by_kernels.attend_cached_by_kernels(*operands, **sizes, how=how)


def _check(name, queries, line, entries, index_keys, window, rounded_scores, impl) -> None:
    """Raises for every rule the arguments break."""
    batch, length, _, width = queries.q.shape
    wanted = (batch, window - 1 + length, width)
    rules = {
        f"impl={impl!r} must be 'xla', 'pallas' or 'reference'": impl in ("xla", "pallas", "reference"),
        f"rounded_scores: impl={impl!r} does not round the steps of its index scores": impl == "xla"
        or not rounded_scores,
        "index_keys need entries": index_keys is None or entries is not None,
    }
    if line is not None:
        rules[f"line {line.shape} must be {wanted}"] = line.shape == wanted
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError(f"{name}: " + "; ".join(problems))


_QUERIES = Queries("B T H Dh", "B T", "B T", "B T", "B T Hi Di", "B T Hi")
_HELD = {"entries": "R B S Dh", "index_keys": "R B S Di", "sink": "H"}
SPLITS = {
    "attend": Splits({"queries": _QUERIES, "line": "B W-1+T Dh", **_HELD}, ("B T H Dh",), free="B H"),
    "attend_cached": Splits({"queries": _QUERIES, "ring": "R B M Dh", **_HELD}, ("B T H Dh",), free="B H"),
}
