"""Public entry point of the family: contract, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.compressor import kernel_tpu, reference, tuning, xla
from pallas_kernels.compressor.blocks import block_rows
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits


def compressor(
    kv: Float[Array, "B T w Dc"],
    gate: Float[Array, "B T w Dc"],
    ape: Float32[Array, "m w Dc"],
    norm: Float32[Array, " Dc"],
    cos: Float32[Array, "B P pairs"],
    sin: Float32[Array, "B P pairs"],
    *,
    is_first: Bool[Array, "B P"] | None = None,
    source: Int32[Array, "B P m"] | None = None,
    previous: Int32[Array, "B P m"] | None = None,
    eps: float,
    dtype: jax.typing.DTypeLike | None = None,
    impl: Literal["xla", "pallas", "reference"] = "pallas",
    blocks: tuning.CompressorBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "B P Dc"]:
    """Pools each complete block of m tokens into one compressed attention entry, normalised and rotated.

    Equation (DeepSeek-V4 report, section 2.3, token-level compressor), for block s with rows r = source[s]:
        Z_s[j], C_s[j] = gate[r_j] + ape[j], kv[r_j]                               j = 0 .. m-1, [w, Dc]
        w = 1:  p_s = sum_j softmax_j(Z_s[j]) C_s[j]                               m rows, each channel alone
        w = 2:  as above over 2 m rows: branch 0 of block s-1, then branch 1 of block s;
                a first block has only its own m rows
        e_s = rotate(norm * p_s / sqrt(mean(p_s^2) + eps))
        rotate: channel pairs (x, y) -> (x cos - y sin, x sin + y cos) of the last 2 * pairs channels

    Args:
        kv: [B, T, w, Dc] bf16 or f32 projected rows (Dc 512, or 128 for the indexer; w 2 with m 4, w 1 with
            m 128 in V4). Rows of no block take no part, whatever they hold.
        gate: [B, T, w, Dc] projected gate logits, dtype of `kv`.
        ape: f32[m, w, Dc] positional bias of a row by its place in its own block.
        norm: f32[Dc] weight of the RMS norm.
        cos, sin: f32[B, P, pairs] of the angle at the position of each block's first token (32 pairs in V4).
        is_first: bool[B, P], True where a block is the first of its segment. None means no others than block
            0 of a row, which always is, unless `previous` says what came before it. Not used for w = 1.
        source: i32[B, P, m] the row behind each token of each block (r), 0 .. T - 1: for packed segments,
            whose blocks start at the segment and not on the row's grid, and for rows kept in a ring. Entries
            that only fill the list may name any rows. None means blocks in place, r = m s + j.
        previous: i32[B, P, m] the same of the block before each, for w = 2 and with `source`: for calls that
            continue a segment. Block s-1 of the list is before block s, but for block 0 and first blocks, so
            only previous[:, 0] is news. None means that nothing is before block 0.
        dtype: of the entries; None means the dtype of `kv`.
        impl: "xla" for any backend, "pallas" for TPUs, or "reference". There is no silent fallback.
        blocks: tile sizes; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        [B, P, Dc] entries. B and P may be 0.

    Numerics: float32 throughout, except that p_s is rounded to `dtype` before the norm and e_s after the
        rotation. "xla" also rounds between norm and rotation; "pallas" rounds p_s to the dtype of `kv` and
        nothing to `dtype` but e_s, once more. Within 1e-5 of the reference in float32, relative to the
        largest entry (order of sums); in bf16 within 2e-2, as p_s may round to its other neighbour before e_s
        is rounded.
    Gradients: w.r.t. kv, gate, ape and norm, in float32 in a fixed order (deterministic), rounded once to the
        operand's dtype; none w.r.t. cos and sin, which are data. Roundings pass gradients unchanged. Saves
        the operands; softmax and norm are recomputed. Within 1e-5 of autodiff of the reference in float32,
        2e-2 in bf16, relative to the largest entry. Rows of no block get 0.
    Cost: with N = B P m w Dc numbers of b bytes in kv, 7 N FLOP and N exponentials forward, 13 N and N
        backward. HBM bytes:
            forward  2 N b + B P Dc b + extra
            backward 4 N b + B P Dc b + extra
            extra    1024 B P, and for w = 2 a further 512 B P + 32 Dc b ceil(P / block) B: rotation tables,
                     `is_first` padded to the lanes, and the rows before each grid step's own
        The projections x wkv and x wgate stay XLA matmuls: they read B T D b of x and write the 2 N b that
        are read here, the price of not fusing them (T = 2048, D = 4096, w = 2, Dc = 512 in bf16: 17 MB of
        x, 8.4 MB of rows, 0.5 MB of entries). Multiply with weights [w Dc, D]: given [w, Dc, D], XLA:TPU
        (seen for v6e) makes the rows tokens-minor and then copies them, 4 N b; an `optimization_barrier`
        behind the reshape of the weights prevents it. `source` adds a gather, 4 N b, and backward a
        scatter-add; m P < T adds a copy of the gradients. VMEM: `tuning.CompressorBlocks.vmem_bytes`: two
        buffers of each block and a few float32 copies of the rows; at most 32 MiB by choice.
    Sharding: `SPLITS`. Sum d_ape and d_norm over the devices. For w = 1 and blocks in place, devices that
        share T at multiples of m can each make their own entries. Wrap in `shard_map`: kernels are not
        partitioned by the compiler.
    Raises:
        ValueError: for shapes that do not fit, no complete block, dtypes, eps <= 0, an unknown impl; for
            "pallas" also a Dc that is no multiple of 128, more than 64 pairs, an m other than 2, 4 or a
            multiple of 8, or w = 2 with m > 8. All problems at once.
    """
    if problems := _problems(kv, gate, ape, norm, cos, sin, is_first, source, previous, eps, impl):
        raise ValueError("compressor: " + "; ".join(problems))
    ratio, branches, width = ape.shape
    batch, num_entries, _ = cos.shape
    dtype = kv.dtype if dtype is None else dtype
    if 0 in (batch, num_entries):
        return jnp.zeros((batch, num_entries, width), dtype)
    if is_first is None:
        is_first = jnp.zeros((batch, num_entries), bool)
    if impl != "pallas":
        run = xla.compressor_xla if impl == "xla" else reference.compressor_reference
        return run(kv, gate, ape, norm, cos, sin, is_first, source, previous, eps=eps, dtype=dtype)

    before = 0
    if source is not None:
        if branches == 2 and previous is not None:
            # The kernel looks for the block before in the list: list that of the first one too, and drop it.
            source, before = jnp.concatenate([previous[:, :1], source], axis=1), 1
            is_first = jnp.pad(is_first, ((0, 0), (1, 0)), constant_values=True)
            cos, sin = (jnp.pad(x, ((0, 0), (1, 0), (0, 0))) for x in (cos, sin))
            num_entries += 1
        kv, gate = (
            block_rows(x, source, ratio, num_entries).reshape(batch, -1, branches, width) for x in (kv, gate)
        )
    kv, gate = (x.reshape(*x.shape[:2], branches * width) for x in (kv, gate))
    # Only overlapping blocks ask what came before.
    first = is_first.at[:, 0].set(True).astype(jnp.int32)[..., None, None] if branches == 2 else None
    static = kernel_tpu.Static(ratio, branches, width, num_entries, float(eps))
    operands = kernel_tpu.Operands(
        kv, gate, ape.reshape(ratio, -1), norm[None], *_rotation_tables(cos, sin), first
    )
    return _compressor((static, blocks, interpret), operands)[:, before:].astype(dtype)


def _problems(kv, gate, ape, norm, cos, sin, is_first, source, previous, eps: float, impl: str) -> list[str]:
    """Every rule the arguments break."""
    if kv.ndim != 4 or ape.ndim != 3 or cos.ndim != 3:
        return [f"kv {kv.shape}, ape {ape.shape} and cos {cos.shape} must have 4, 3 and 3 axes"]
    (batch, length, branches, width), ratio, (_, num_entries, pairs) = kv.shape, ape.shape[0], cos.shape
    entries = (batch, num_entries)
    most = length // max(ratio, 1) if source is None else num_entries
    lists = {"source": source, "previous": previous}
    rules = {
        f"impl={impl!r} must be 'xla', 'pallas' or 'reference'": impl in ("xla", "pallas", "reference"),
        f"eps={eps} must be positive": eps > 0,
        f"kv {kv.shape} must have 1 or 2 branches": branches in (1, 2),
        f"gate {gate.shape} must have the shape of kv {kv.shape}": gate.shape == kv.shape,
        f"ape {ape.shape} must be [m, {branches}, {width}]": ape.shape == (ratio, branches, width),
        f"norm {norm.shape} must be [{width}]": norm.shape == (width,),
        f"cos {cos.shape} and sin {sin.shape} must be [{batch}, P, pairs]": cos.shape == sin.shape
        and cos.shape[0] == batch,
        f"{pairs} pairs must be within 1 .. {width // 2}": 1 <= pairs <= width // 2,
        f"P={num_entries} entries must be within 0 .. {most} complete blocks of {length} rows": num_entries
        <= most,
        f"is_first must be bool{list(entries)}": is_first is None
        or (is_first.shape == entries and is_first.dtype == jnp.bool_),
        "previous needs source": previous is None or source is not None,
        f"kv {kv.dtype} and gate {gate.dtype} must both be bfloat16 or float32": kv.dtype == gate.dtype
        and kv.dtype in (jnp.bfloat16, jnp.float32),
        "ape, norm, cos and sin must be float32": {ape.dtype, norm.dtype, cos.dtype, sin.dtype}
        == {jnp.dtype(jnp.float32)},
    } | not_empty(m=ratio, Dc=width)
    for name, rows in lists.items():
        rules[f"{name} must be int32{[*entries, ratio]}"] = rows is None or (
            rows.shape == (*entries, ratio) and rows.dtype == jnp.int32
        )
    if impl == "pallas":
        lanes, most_rows = tuning.LANES, tuning.HALO_ROWS // 2
        rules |= {
            f"Dc={width} must be a multiple of {lanes}": width % lanes == 0,
            f"{pairs} pairs must be at most {lanes // 2}": pairs <= lanes // 2,
            f"m={ratio} must be 2, 4 or a multiple of 8": ratio in (2, 4) or (ratio > 0 and ratio % 8 == 0),
            f"m={ratio} must be at most {most_rows} for two branches": branches == 1 or ratio <= most_rows,
        }
    return [rule for rule, holds in rules.items() if not holds]


def _rotation_tables(
    cos: Float32[Array, "B P pairs"], sin: Float32[Array, "B P pairs"]
) -> tuple[Float32[Array, "B P lanes"], Float32[Array, "B P lanes"]]:
    """What the last lanes are multiplied with, and what the other channel of each one's pair is."""
    still = tuning.LANES - 2 * cos.shape[-1]
    pad = ((0, 0), (0, 0), (still, 0))
    both = lambda first, second: jnp.stack([first, second], axis=-1).reshape(*cos.shape[:2], -1)  # noqa: E731
    return jnp.pad(both(cos, cos), pad, constant_values=1.0), jnp.pad(both(-sin, sin), pad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compressor(static_options, operands):
    static, blocks, interpret = static_options
    blocks = blocks or _choose(static, operands, backward=False)
    return kernel_tpu.compressor_forward(operands, static=static, blocks=blocks, interpret=interpret)


def _save(static_options, operands):
    return _compressor(static_options, operands), operands


def _pull(static_options, operands, d_entry):
    static, blocks, interpret = static_options
    blocks = blocks or _choose(static, operands, backward=True)
    d_kv, d_gate, d_ape, d_norm = kernel_tpu.compressor_backward(
        d_entry, operands, static=static, blocks=blocks, interpret=interpret
    )
    tail = ((0, 0), (0, operands.kv.shape[1] - d_kv.shape[1]), (0, 0))
    if tail[1][1]:  # rows of the incomplete block
        d_kv, d_gate = jnp.pad(d_kv, tail), jnp.pad(d_gate, tail)
    return (kernel_tpu.Operands(d_kv, d_gate, d_ape.sum(axis=0), d_norm.sum(axis=0), None, None, None),)


_compressor.defvjp(_save, _pull)


def _choose(static, operands, *, backward):
    return tuning.choose_blocks(
        static.num_entries,
        static.ratio,
        static.branches,
        static.width,
        operands.kv.dtype.itemsize,
        backward=backward,
    )


SPLITS = {
    "compressor": Splits(
        arguments={
            "kv": "B T w Dc",
            "gate": "B T w Dc",
            "ape": "m w Dc",
            "norm": "Dc",
            "cos": "B P pairs",
            "sin": "B P pairs",
            "is_first": "B P",
            "source": "B P m",
            "previous": "B P m",
        },
        results=("B P Dc",),
        free="B",
    )
}
