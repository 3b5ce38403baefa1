"""Public entry point of the family: contract, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.hybrid_attention import kernel_tpu, kernel_tpu_backward, reference, tuning
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def hybrid_attention(
    q: Float[Array, "B T H Dh"],
    line: Float[Array, "B W-1+T Dh"],
    position: Int32[Array, "B T"],
    sink: Float32[Array, "H"],
    entries: Float[Array, "B S Dh"] | None = None,
    lo: Int32[Array, "B T"] | None = None,
    hi: Int32[Array, "B T"] | None = None,
    selected: Bool[Array, "B T S"] | None = None,
    *,
    window: int,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.HybridBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """One softmax over the last W tokens and the visible compressed entries, with a sink logit per head.

    Equation (DeepSeek-V4 report, section 2.3, core attention):
        J_t     = { line[t + W - 1 - d] : 0 <= d <= min(position_t, W - 1) }
                  and { entries[s] : lo_t <= s < hi_t and selected_ts }
        z_hj    = Dh^-1/2 q_th . k_j,   j in J_t
        lse_th  = log(exp(sink_h) + sum_j exp(z_hj))
        o_th    = sum_j exp(z_hj - lse_th) k_j          (the key is also the value; the sink has none)

    Args:
        q: [B, T, H, Dh] rotated queries, bfloat16 or float32 (H = 64 or 128, Dh = 512 in V4).
        line: [B, W - 1 + T, Dh] window entries of the W - 1 tokens before the call, then of the call; the
            dtype of `q`. All values must be finite, those that no query sees too.
        position: i32[B, T] tokens from the start of the segment, >= 0; places before it are not seen.
        sink: f32[H] logits, finite, not scaled.
        entries: [B, S, Dh] compressed entries, finite, rounded to the dtype of `line`; None for none.
        lo, hi: i32[B, T] with 0 <= lo and hi <= S; query t sees entries lo <= s < hi, none if hi <= lo.
        selected: bool[B, T, S] the indexer's choice among them (CSA); None for all (HCA).
        window: W >= 1 (128 in V4).
        impl: "reference" runs dense plain XLA. There is no silent fallback.
        blocks: tile sizes; None lets `tuning.choose_blocks` pick. Speed only.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        o: [B, T, H, Dh] in the dtype of `q`, still rotated.
        lse: f32[B, T, H], the sink included: what a merge with attention over other keys needs. B, T and S
            may be 0.

    Numerics: logits, maxima, sums and accumulation are float32; the sink takes part in the maximum;
        probabilities are rounded to the dtype of `line` before they meet the values, and normalised after.
        Within 1e-5 (relative to max |o|) of the reference in float32, where only the order of sums differs;
        within 1e-2 in bfloat16, because probabilities are rounded relative to a running maximum.
    Gradients: w.r.t. q, line, entries, sink, through o and lse. Saves the operands, o and lse; probabilities
        are recomputed tile by tile. Sums are float32 in a fixed order (deterministic); in bfloat16 the
        probabilities and their gradients are rounded before the products. No gradient for the selection.
    Cost: with K = W + (visible entries), 4 K H Dh FLOP a query forward and 14 K H Dh backward, where every
        block of queries pays for whole blocks of keys. HBM: 2 T H Dh elements forward; backward
        4 T H Dh for dq and, for d_line and d_entries, 2 T H Dh for every key block that a query sees. VMEM
        of a grid step: `tuning.Geometry.vmem_bytes`. No T x S array is made but an int8 copy of `selected`.
        Blocks of entries outside lo .. hi are skipped; `selected` masks, but skips nothing.
    Sharding: `SPLITS`. Line and entries are repeated over the devices that share H; their gradients are
        partial sums. Devices can share T as well, if each gets a line with the W - 1 tokens before its own.
    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown impl, entries without lo and hi or the
            reverse; all problems at once. For shapes whose smallest tiles exceed VMEM.
    """
    operands = _Operands(q, line, position, sink, entries, lo, hi, selected)
    if problems := _problems(operands, window, impl):
        raise ValueError("hybrid_attention: " + "; ".join(problems))
    if 0 in q.shape:
        return jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)
    if entries is not None:
        operands = operands._replace(entries=entries.astype(line.dtype))
        if entries.shape[1] == 0:
            operands = operands._replace(entries=None, lo=None, hi=None, selected=None)
    if impl == "reference":
        return reference.hybrid_attention_reference(*operands, window=window)
    batch, length, heads, width = q.shape
    masked = operands.selected is not None
    num_entries = 0 if operands.entries is None else operands.entries.shape[1]
    blocks = blocks or tuning.choose_blocks(
        heads=heads, width=width, window=window, itemsize=q.dtype.itemsize, masked=masked
    )
    geometry = tuning.Geometry(
        batch, length, heads, width, window, num_entries, q.dtype.itemsize, masked, blocks
    )
    return _hybrid_attention(geometry, interpret, operands)


class _Operands(NamedTuple):
    q: jax.Array
    line: jax.Array
    position: jax.Array
    sink: jax.Array
    entries: jax.Array | None
    lo: jax.Array | None
    hi: jax.Array | None
    selected: jax.Array | None


def _problems(o: _Operands, window: int, impl: str) -> list[str]:
    """Every rule the arguments break."""
    if o.q.ndim != 4:
        return [f"q {o.q.shape} must be [B, T, H, Dh]"]
    batch, length, heads, width = o.q.shape
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"window={window} must be at least 1": window >= 1,
        f"q is {o.q.dtype}, must be bfloat16 or float32": o.q.dtype in (jnp.bfloat16, jnp.float32),
        f"line is {o.line.dtype}, must be {o.q.dtype} as q": o.line.dtype == o.q.dtype,
        f"line {o.line.shape} must be {(batch, window - 1 + length, width)}": (
            o.line.shape == (batch, window - 1 + length, width)
        ),
        f"position {o.position.shape} must be {(batch, length)}": o.position.shape == (batch, length),
        f"sink {o.sink.shape} must be {(heads,)}": o.sink.shape == (heads,),
        f"sink is {o.sink.dtype}, must be float32": o.sink.dtype == jnp.float32,
    } | not_empty(H=heads, Dh=width)
    for name, limits in (("lo", o.lo), ("hi", o.hi)):
        rules[f"entries and {name} must come together"] = (limits is None) == (o.entries is None)
        if limits is not None:
            rules[f"{name} {limits.shape} must be {(batch, length)}"] = limits.shape == (batch, length)
    if o.entries is not None:
        size = o.entries.shape[1] if o.entries.ndim == 3 else 0
        rules[f"entries {o.entries.shape} must be {(batch, 'S', width)}"] = o.entries.shape == (
            batch,
            size,
            width,
        )
        rules["selected must be [B, T, S]"] = o.selected is None or o.selected.shape == (batch, length, size)
    else:
        rules["selected needs entries"] = o.selected is None
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _hybrid_attention(g, interpret, operands):
    keys = kernel_tpu.whole_blocks(g, *_without_queries(operands))
    rows = operands.q.reshape(g.batch, -1, g.width)
    o, lse = kernel_tpu.hybrid_forward(g, rows, operands.sink[:, None], keys, interpret=interpret)
    return o.reshape(operands.q.shape), lse[:, : g.length]


def _without_queries(o: _Operands) -> tuple:
    return o.line, o.position, o.entries, o.lo, o.hi, o.selected


def _save(g, interpret, operands):
    o, lse = _hybrid_attention(g, interpret, operands)
    return (o, lse), (operands, o, lse)


def _pull(g, interpret, saved, cotangents):
    operands, o, lse = saved
    do, d_lse = cotangents
    keys = kernel_tpu.whole_blocks(g, *_without_queries(operands))
    more = ((0, 0), (0, keys.view.shape[1] - g.length), (0, 0))
    q, do, o = (x.reshape(g.batch, -1, g.width) for x in (operands.q, do, o))
    padded_lse, d_lse = jnp.pad(lse, more), jnp.pad(d_lse, more)
    # A softmax turns dp into p (dp - sum p dp), and that sum is do . o; lse itself has the gradient p:
    # together p (dp - delta) with delta = do . o - d_lse.
    dq, delta = kernel_tpu_backward.hybrid_d_query(g, q, do, o, padded_lse, d_lse, keys, interpret=interpret)
    d_sink = -(jnp.exp(operands.sink - lse) * delta[:, : g.length]).sum(axis=(0, 1))
    rows = kernel_tpu_backward.Rows(q, do, padded_lse, delta)
    d_line = kernel_tpu_backward.hybrid_d_line(g, rows, keys, interpret=interpret)
    d_entries = None
    if keys.entries is not None:
        d_entries = kernel_tpu_backward.hybrid_d_entries(g, rows, keys, interpret=interpret)
        d_entries = d_entries[:, : g.num_entries]
    d_line = d_line[:, : operands.line.shape[1]]
    gradients = _Operands(dq.reshape(operands.q.shape), d_line, None, d_sink, d_entries, None, None, None)
    return (gradients,)


_hybrid_attention.defvjp(_save, _pull)


SPLITS = {
    "hybrid_attention": Splits(
        arguments={
            "q": "B T H Dh",
            "line": "B W-1+T Dh",
            "position": "B T",
            "sink": "H",
            "entries": "B S Dh",
            "lo": "B T",
            "hi": "B T",
            "selected": "B T S",
        },
        results=("B T H Dh", "B T H"),
        free="B H",
    )
}
