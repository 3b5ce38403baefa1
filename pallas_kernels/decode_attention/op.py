"""Public entry point of the family: contract, dispatch, refusal to differentiate. No tiling here."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.arithmetic import round_up
from pallas_kernels.decode_attention import (
    kernel_tpu,
    kernel_tpu_gather,
    reference,
    stored,
    tuning,
    visibility,
)
from pallas_kernels.formats import entry_rows
from pallas_kernels.formats.entries import Fp8Entries, scale_bytes
from pallas_kernels.formats.sizes import ENTRY_GROUP
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def decode_attention(
    q: Float[Array, "B T H Dh"],
    ring: stored.Entries,
    position: Int32[Array, "B T"],
    sink: Float32[Array, "H"],
    entries: stored.Entries | None = None,
    hi: Int32[Array, "B T"] | None = None,
    index: Int32[Array, "B T K"] | None = None,
    *,
    repeat: Int32[Array, ""] | None = None,
    window: int,
    impl: Literal["pallas", "reference"] = "pallas",
    blocks: tuning.DecodeBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H Dh"], Float32[Array, "B T H"]]:
    """One softmax of a few new tokens over the ring of recent rows, compressed entries and a sink.

    Equation (DeepSeek-V4 report, section 2.3, core attention):
        p(s)    = last - (last - s) mod M,   last = max_t position_t         the position of ring slot s
        J_t     = { ring[s] : 0 <= position_t - p(s) <= min(position_t, W - 1) }
                  and { entries[s] : s < hi_t }  or  { entries[s] : s in index_t }
        z_hj    = Dh^-1/2 q_th . k_j,   j in J_t
        lse_th  = log(exp(sink_h) + sum_j exp(z_hj))
        o_th    = sum_j exp(z_hj - lse_th) k_j          (the key is also the value; the sink has none)

    Args:
        q: [B, T, H, Dh] rotated queries, bfloat16 or float32 (H = 64 or 128, Dh = 512 in V4); T = 1 for
            decoding, 1 + drafts for verification.
        ring: [B, M, Dh], or with `repeat` a stack [R, B, M, Dh]: rows of recent tokens in the dtype of `q`,
            or `Fp8Entries`; the call's own already written, slot = position mod M, M >= W - 1 + T. All values
            must be finite, those that no query sees too.
        position: i32[B, T], the last T tokens of each sequence in any order; negative for padding, which
            sees no row of the ring. Padding behind the last token may also count on, as if it were tokens.
        sink: f32[H] logits, finite, not scaled.
        entries: [B, S, Dh], or with `repeat` [R, B, S, Dh]: compressed entries in the dtype of `q`,
            `Fp8Entries`, or with `index` `entry_rows.Fp8Rows`, whatever the ring is; None for none (window
            layers). With `hi`, those from max_t hi_t on may be uninitialised memory; with `index` all must be
            finite.
        hi: i32[B, T], 0 <= hi <= S: query t sees entries s < hi_t (HCA).
        index: i32[B, T, K]: query t sees these (CSA); -1 for none, any order, none twice, < S.
        repeat: i32[], which layer of the stacks ring and entries to use, 0 .. R - 1; None where there is no
            axis R.
        window: W >= 1 (128 in V4).
        impl: "reference" runs dense plain XLA. There is no silent fallback.
        blocks: tile sizes, and the path for `index`; None lets `tuning.choose_blocks` pick. Speed only. Those
            of `sparse_core.blocks`, for chips that have one, let the SparseCore fetch the chosen entries
            first: compiled, never run on a chip, and nothing here picks or even imports them.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        o: [B, T, H, Dh] in the dtype of `q`, still rotated.
        lse: f32[B, T, H], the sink included. A query that sees nothing has o = 0, lse = sink. B, T, S and K
            may be 0.

    Numerics: logits, maxima, sums and accumulation are float32; the sink takes part in the maximum;
        probabilities are rounded to the dtype of `q` before they meet the values, and normalised after.
        Within 1e-5 (relative to max |o|) of the reference in float32, where only the order of sums differs;
        within 1e-2 in bfloat16, because probabilities are rounded relative to a running maximum. Fp8
        rows and entries are decoded to the dtype of `q` without rounding.
    Gradients: none, and asking for them raises: training uses `hybrid_attention`.
    Cost: with N keys read a sequence, 4 T H N Dh FLOP and N Dh + 2 T H Dh elements of HBM. N is M without
        entries; with `hi`, M + max_t hi_t rounded up to a block (blocks beyond are not fetched); with
        `index`, either M + max_t max index_t likewise, under a mask of B T S bytes, or M + T K rows copied
        one by one, in bfloat16 two for one (`tuning.gather_pays` says which). Of `Fp8Entries` all are read
        and masked; of `Fp8Rows` T K entries are fetched by two copies of Dh bytes each, whatever S is.
        Fetched by the SparseCore, the T K rows are also written and read once more, to and from a temporary
        of B T K Dh elements. Decoding an fp8 ring adds about 2 M Dh (Dr + Dh / 64) FLOP. No copy of the
        cache, if it lies in memory as expected: XLA may store arrays whose M or S is no multiple of 8
        (fetching by the SparseCore: S no multiple of 16; fp8 entries: S no multiple of 128; an fp8 ring: M
        not just above a multiple of 128) in another layout, and then copies them for every call. VMEM of a
        grid step: `tuning.Geometry.vmem_bytes`; gathering, it is mostly K rows of 4 Dh bytes.
    Sharding: `SPLITS`. Ring and entries are repeated over the devices that share H.
    Raises:
        ValueError: for shapes or dtypes that do not fit, an unknown impl, entries without exactly one of hi
            and index, or a gathering block where rows have no pairs; all problems at once. For shapes whose
            smallest tiles exceed VMEM.
        RuntimeError: for blocks of the SparseCore on a chip without (v5e).
        TypeError: when differentiated.
    """
    if repeat is None:
        ring, entries = jax.tree.map(lambda leaf: leaf[None], (ring, entries))
    repeat = jnp.int32(0) if repeat is None else jnp.asarray(repeat)
    operands = _Operands(q, ring, position, sink, repeat, entries, hi, index)
    if problems := _problems(operands, window, impl, blocks):
        raise ValueError("decode_attention: " + "; ".join(problems))
    if entries is not None and 0 in (entries.shape[2], 1 if index is None else index.shape[2]):
        operands = operands._replace(entries=None, hi=None, index=None)
    if 0 in q.shape:
        run = _no_queries
    elif impl == "reference":
        run = functools.partial(reference.decode_attention_reference, window=window)
    else:
        run = functools.partial(_run_kernel, window=window, blocks=blocks, interpret=interpret)
    return _without_gradient(run, operands)


class _Operands(NamedTuple):
    q: jax.Array
    ring: stored.Entries
    position: jax.Array
    sink: jax.Array
    repeat: jax.Array
    entries: stored.Entries | None
    hi: jax.Array | None
    index: jax.Array | None


def _problems(o: _Operands, window: int, impl: str, blocks: tuning.DecodeBlocks | None) -> list[str]:
    """Every rule the arguments break."""
    ring = o.ring.shape
    if o.q.ndim != 4 or len(ring) != 4:
        return [f"q {o.q.shape} must be [B, T, H, Dh] and ring {ring} [R, B, M, Dh]"]
    batch, length, heads, width = o.q.shape
    repeats, _, slots, _ = ring
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"window={window} must be at least 1": window >= 1,
        f"q is {o.q.dtype}, must be bfloat16 or float32": o.q.dtype in (jnp.bfloat16, jnp.float32),
        f"ring {ring} must be {('R', batch, 'M', width)}": ring == (repeats, batch, slots, width),
        f"ring has {slots} slots, needs window - 1 + T = {window - 1 + length}": slots >= window - 1 + length,
        f"position {o.position.shape} must be {(batch, length)}": o.position.shape == (batch, length),
        f"sink {o.sink.shape} must be {(heads,)}": o.sink.shape == (heads,),
        f"sink is {o.sink.dtype}, must be float32": o.sink.dtype == jnp.float32,
        f"repeat {o.repeat.shape} must be a scalar": o.repeat.shape == (),
    }
    rules |= not_empty(R=repeats, H=heads, Dh=width) | _format_rules("ring", o.ring, o.q.dtype)
    if o.entries is None:
        rules["hi and index need entries"] = o.hi is None and o.index is None
    else:
        shape = o.entries.shape
        size = shape[2] if len(shape) == 4 else 0
        rules |= _format_rules("entries", o.entries, o.q.dtype) | {
            f"entries {shape} must be {('R', batch, 'S', width)}": shape == (repeats, batch, size, width),
            "entries need exactly one of hi and index": (o.hi is None) != (o.index is None),
        }
        in_rows = isinstance(o.entries, entry_rows.Fp8Rows)
        if in_rows:
            rules["entries in rows need index"] = o.index is not None
            rules["entries in rows can only be gathered"] = blocks is None or blocks.gather
            rules["entries in rows are not fetched ahead"] = blocks is None or blocks.ahead is None
        if blocks is not None and blocks.gather:
            pairs = 1 if in_rows else kernel_tpu_gather.rows_a_copy(o.q.dtype)
            rules["blocks.gather needs index"] = o.index is not None
            rules["blocks.gather reads fp8 entries in rows only"] = not isinstance(o.entries, Fp8Entries)
            rules[f"blocks.gather needs S={size} to be a multiple of {pairs}"] = size % pairs == 0
    if o.hi is not None:
        rules[f"hi {o.hi.shape} must be {(batch, length)}"] = o.hi.shape == (batch, length)
    if o.index is not None:
        shape = (batch, length, o.index.shape[-1])
        rules[f"index {o.index.shape} must be {(batch, length, 'K')}"] = o.index.shape == shape
    integers = {"position": o.position, "repeat": o.repeat, "hi": o.hi, "index": o.index}
    for name, x in integers.items():
        if x is not None:
            rules[f"{name} is {x.dtype}, must be int32"] = x.dtype == jnp.int32
    return [rule for rule, holds in rules.items() if not holds]


def _format_rules(name: str, x: stored.Entries, dtype: jnp.dtype) -> dict[str, bool]:
    """How rows must be stored: in the dtype of q, or in fp8."""
    if isinstance(x, entry_rows.Fp8Rows):
        return _row_rules(name, x)
    if not isinstance(x, Fp8Entries):
        return {f"{name} is {x.dtype}, must be {dtype} as q": x.dtype == dtype}
    *rows, channels = x.values.shape
    scales = (*rows, scale_bytes(channels))
    return {
        f"{name}.values is {x.values.dtype}, must be e4m3fn": x.values.dtype == jnp.float8_e4m3fn,
        f"{name}.values has {channels} channels, must be a positive multiple of {ENTRY_GROUP}": channels > 0
        and channels % ENTRY_GROUP == 0,
        f"{name}.scales is {x.scales.dtype}, must be uint8": x.scales.dtype == jnp.uint8,
        f"{name}.scales {x.scales.shape} must be {scales}": x.scales.shape == scales,
        f"{name}.rotary is {x.rotary.dtype}, must be bfloat16": x.rotary.dtype == jnp.bfloat16,
        f"{name}.rotary {x.rotary.shape} must be {(*rows, 'Dr')}": x.rotary.shape[:-1] == tuple(rows),
    }


def _row_rules(name: str, x: entry_rows.Fp8Rows) -> dict[str, bool]:
    layout = x.layout
    if problems := layout.problems():
        return dict.fromkeys((f"{name}: {problem}" for problem in problems), False)
    *lead, size, lanes = x.words.shape
    rest = (*lead, layout.rest_rows(size), lanes)
    return {
        f"{name} must not be in rows": name == "entries",
        f"{name}.words is {x.words.dtype}, must be uint32": x.words.dtype == jnp.uint32,
        f"{name}.rest is {x.rest.dtype}, must be uint32": x.rest.dtype == jnp.uint32,
        f"{name}.rest {x.rest.shape} must be {rest}": x.rest.shape == rest,
    }


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_gradient(run, operands):
    return run(*operands)


@_without_gradient.defjvp
def _refuse(run, primals, tangents):
    raise TypeError("decode_attention has no gradient: train through hybrid_attention")


def _no_queries(q, *keys):
    return jnp.zeros_like(q), jnp.zeros(q.shape[:3], jnp.float32)


def _run_kernel(q, ring, position, sink, repeat, entries, hi, index, *, window, blocks, interpret):
    batch, length, heads, width = q.shape
    repeats, _, slots, _ = ring.shape
    num_entries = 0 if entries is None else entries.shape[2]
    formats = {
        "quantized": isinstance(entries, Fp8Entries),
        "quantized_ring": isinstance(ring, Fp8Entries),
    }
    num_chosen = None if index is None else index.shape[2]
    blocks = blocks or tuning.choose_blocks(
        queries=length,
        heads=heads,
        width=width,
        slots=slots,
        num_entries=num_entries,
        num_chosen=num_chosen,
        itemsize=q.dtype.itemsize,
        in_rows=isinstance(entries, entry_rows.Fp8Rows),
        **formats,
    )
    masked = index is not None and not blocks.gather
    g = tuning.Geometry(
        batch, length, heads, width, slots, num_entries, q.dtype.itemsize, masked, **formats, blocks=blocks
    )
    if hi is not None:
        hi = jnp.clip(hi, 0, num_entries)
    if index is not None:
        index = jnp.clip(index, -1, num_entries - 1)
    sink, repeat = sink[:, None], jnp.clip(repeat, 0, repeats - 1)[None]
    if blocks.gather:
        view = visibility.views(position, None, window, slots).reshape(batch * length, 1, -1)
        whole = round_up(num_chosen, tuning.LIST_ROWS)
        chunk = whole if blocks.ahead else min(whole, blocks.entries)
        padded = round_up(num_chosen, chunk) - num_chosen
        index = jnp.pad(index, ((0, 0), (0, 0), (0, padded)), constant_values=-1)
        lists = index.reshape(batch * length, -1, chunk)
        q_rows = q.reshape(batch * length, heads, width)
        run = blocks.ahead or kernel_tpu_gather.gather
        o, lse = run(g, q_rows, view, ring, sink, repeat, entries, lists, interpret=interpret)
        return o.reshape(q.shape), lse.reshape(batch, length, heads)
    chosen = None
    if index is not None:
        hi = index.max(axis=2) + 1
        chosen = visibility.chosen_mask(index, num_entries).astype(jnp.int8)
    view = visibility.views(position, hi, window, slots)
    extent = view[..., visibility.HI].max(axis=1)
    rows = q.reshape(batch, length * heads, width)
    o, lse = kernel_tpu.stream(
        g, rows, view, ring, sink, repeat, entries, extent, chosen, interpret=interpret
    )
    return o.reshape(q.shape), lse


SPLITS = {
    "decode_attention": Splits(
        arguments={
            "q": "B T H Dh",
            "ring": "*R B M Dh",
            "position": "B T",
            "sink": "H",
            "entries": "*R B S Dh",
            "hi": "B T",
            "index": "B T K",
            "repeat": "",
        },
        results=("B T H Dh", "B T H"),
        free="B H",
    )
}
