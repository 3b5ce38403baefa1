"""Attention over each query's own list of entries: contract, dispatch, refusal to differentiate."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.decode_attention.kernel_tpu_gather import rows_a_copy
from pallas_kernels.hybrid_attention import kernel_tpu_gathered, reference, tuning
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def gathered_attention(
    q: Float[Array, "B T H Dh"],
    entries: Float[Array, "B S Dh"] | Float[Array, "R B S Dh"],
    index: Int32[Array, "B T K"],
    *,
    repeat: Int32[Array, ""] | None = None,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.GatherBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """One softmax of every query over K entries of its own, fetched row by row; no window and no sink.

    Equation (DeepSeek-V4 report, section 2.3, core attention, the compressed part of CSA):
        z_hk    = Dh^-1/2 q_th . entries[index_tk],   k with index_tk >= 0
        lse_th  = log(sum_k exp(z_hk))
        o_th    = sum_k exp(z_hk - lse_th) entries[index_tk]          (the key is also the value)

    Args:
        q: [B, T, H, Dh] rotated queries, bfloat16 or float32 (H = 64 or 128, Dh = 512 in V4).
        entries: [B, S, Dh] compressed entries in the dtype of `q`, or a stack [R, B, S, Dh] of them; all
            finite, those that no list names too. S is even in bfloat16.
        index: i32[B, T, K]: the entries of each query, < S, any order, none twice; -1 for none (K = 512 or
            1024 in V4).
        repeat: i32[], which layer of the stack `entries` to use, 0 .. R - 1; None where there is no axis R.
        impl: "reference" runs dense plain XLA. There is no silent fallback.
        blocks: chunk size; None lets `tuning.choose_gather_blocks` pick. Speed only.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        o: [B, T, H, Dh] in the dtype of `q`, still rotated.
        lse: f32[B, T, H]. A query that sees nothing has o = 0, lse = -inf. `merge` joins this with attention
            over other keys. B, T, S and K may be 0.

    Numerics: logits, maxima, sums and accumulation are float32; probabilities are rounded to the dtype of `q`
        before they meet the values, and normalised after. Within 1e-5 (relative to max |o|) of the reference
        in float32, where only the order of sums differs; within 1e-2 in bfloat16, because probabilities are
        rounded relative to a running maximum.
    Gradients: none, and asking for them raises: training uses `hybrid_attention` with `selected`.
    Cost: 4 T K H Dh FLOP, T K rows copied one by one (in bfloat16 two for one) and 2 T H Dh elements of HBM a
        sequence, whatever S is and however many of a list are -1; K is rounded up to whole chunks.
        `tuning.gather_from` says when this beats masking. No copy of the entries, if they lie in
        memory row by row: XLA may store arrays whose S is no multiple of 8 in another layout, and then copies
        them for every call. VMEM: `tuning.GatherGeometry.vmem_bytes`, mostly K rows of 4 Dh bytes.
    Sharding: `SPLITS`. Entries are repeated over the devices that share T and H.
    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown impl, a stack without `repeat` or the
            reverse, or bfloat16 entries without pairs; all problems at once. For lists that exceed VMEM.
        TypeError: when differentiated.
    """
    operands = _Operands(q, entries, index, None if repeat is None else jnp.asarray(repeat))
    if problems := _problems(operands, impl):
        raise ValueError("gathered_attention: " + "; ".join(problems))
    stack = entries[None] if repeat is None else entries
    operands = _Operands(q, stack, index, jnp.int32(0) if repeat is None else operands.repeat)
    if 0 in (*q.shape, stack.shape[2], index.shape[2]):
        run = _empty
    elif impl == "reference":
        run = reference.gathered_attention_reference
    else:
        run = functools.partial(_run_kernel, blocks=blocks, interpret=interpret)
    return _without_gradient(run, operands)


class _Operands(NamedTuple):
    q: jax.Array
    entries: jax.Array
    index: jax.Array
    repeat: jax.Array | None


def _problems(o: _Operands, impl: str) -> list[str]:
    """Every rule the arguments break."""
    if o.q.ndim != 4 or o.entries.ndim not in (3, 4) or o.index.ndim != 3:
        return [
            f"q {o.q.shape} must be [B, T, H, Dh], entries {o.entries.shape} [B, S, Dh] or [R, B, S, Dh], "
            f"index {o.index.shape} [B, T, K]"
        ]
    batch, length, heads, width = o.q.shape
    *_, entries_batch, size, entries_width = o.entries.shape
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"q is {o.q.dtype}, must be bfloat16 or float32": o.q.dtype in (jnp.bfloat16, jnp.float32),
        f"entries is {o.entries.dtype}, must be {o.q.dtype} as q": o.entries.dtype == o.q.dtype,
        f"entries {o.entries.shape} must end in {(batch, 'S', width)}": (entries_batch, entries_width)
        == (batch, width),
        f"S={size} must be even in bfloat16": o.entries.dtype != jnp.bfloat16
        or size % rows_a_copy(o.entries.dtype) == 0,
        f"index {o.index.shape} must be {(batch, length, 'K')}": o.index.shape[:2] == (batch, length),
        f"index is {o.index.dtype}, must be int32": o.index.dtype == jnp.int32,
        "a stack of entries and repeat must come together": (o.entries.ndim == 4) == (o.repeat is not None),
    } | not_empty(H=heads, Dh=width)
    if o.repeat is not None:
        rules |= not_empty(R=o.entries.shape[0])
        rules[f"repeat {o.repeat.shape} must be a scalar"] = o.repeat.shape == ()
        rules[f"repeat is {o.repeat.dtype}, must be int32"] = o.repeat.dtype == jnp.int32
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_gradient(run, operands):
    return run(*operands)


@_without_gradient.defjvp
def _refuse(run, primals, tangents):
    raise TypeError("gathered_attention has no gradient: train through hybrid_attention")


def _empty(q, entries, index, repeat):
    return jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)


def _run_kernel(q, entries, index, repeat, *, blocks, interpret):
    batch, length, heads, width = q.shape
    num_chosen = index.shape[2]
    blocks = blocks or tuning.choose_gather_blocks(
        heads=heads, width=width, num_chosen=num_chosen, itemsize=q.dtype.itemsize
    )
    g = tuning.GatherGeometry(batch, length, heads, width, num_chosen, q.dtype.itemsize, blocks)
    index = jnp.clip(index, -1, entries.shape[2] - 1)
    index = jnp.pad(index, ((0, 0), (0, 0), (0, g.num_keys - num_chosen)), constant_values=-1)
    o, lse = kernel_tpu_gathered.gathered_forward(
        g,
        q.reshape(g.queries, heads, width),
        entries,
        jnp.clip(repeat, 0, entries.shape[0] - 1)[None],
        index.reshape(g.queries, g.num_chunks, g.chunk),
        interpret=interpret,
    )
    return o.reshape(q.shape), lse.reshape(batch, length, heads)


SPLITS = {
    "gathered_attention": Splits(
        arguments={"q": "B T H Dh", "entries": "*R B S Dh", "index": "B T K", "repeat": ""},
        results=("B T H Dh", "B T H"),
        free="B T H",
    )
}
