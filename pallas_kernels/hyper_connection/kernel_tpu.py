"""The Mosaic TPU forward kernel of the hyper-connections, in four variants (`Variant`).

Layout: streams are [N, tokens, D], N outside the tiles, so that a stream of a block is an ordinary
[tokens, D] tile. Elementwise work walks the block in groups of 16 tokens and in chunks of channels, with the
per-token weights spread over 128 lanes once a group. Scores and maps are computed with tokens on the lanes
(`maps.py`); two small transpositions a block change between the two. Maps are [tokens, rows] in HBM.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import round_up
from pallas_kernels.hyper_connection import maps as token_maps
from pallas_kernels.hyper_connection import tuning
from pallas_kernels.hyper_connection.tuning import LANES, PART_ROWS, TOKEN_TILE

PASS_SCORES = 3  # bfloat16 parts of a float32 number: 3 x 8 significant bits


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """Which stages a kernel has, and the constants of the maps."""

    post: bool  # X' = post y + comb^T X comes first
    pre: bool  # maps and the weighted sum of the streams
    norm: bool  # the RMSNorm of that sum; without it (the head's collapse) the maps are gates only
    num_iters: int = 1
    hc_eps: float = 0.0
    norm_eps: float = 0.0

    @property
    def name(self) -> str:
        """The kernel's name in profiles."""
        stages = ["post"] * self.post + (["pre"] if self.norm else ["collapse"]) * self.pre
        return "hyper_connection_" + "_".join(stages)


def score_rows(num_rows: int) -> slice:
    """Where the scores stand in the saved columns, behind the maps."""
    start = round_up(num_rows, 8)
    return slice(start, start + num_rows)


def inverse_rms_row(num_rows: int) -> int:
    """Where the inverse RMS of a token's streams stands."""
    return 2 * round_up(num_rows, 8)


def spread(columns: jax.Array, index: int) -> jax.Array:
    """Column `index` of [TOKEN_TILE, columns] on all lanes."""
    return jnp.broadcast_to(columns[:, index : index + 1], (TOKEN_TILE, LANES))


def groups(num_tokens: int, body) -> None:
    """Runs body(rows) for every 16 tokens of the block."""

    def run(g, _):
        body(pl.ds(pl.multiple_of(g * TOKEN_TILE, TOKEN_TILE), TOKEN_TILE))

    lax.fori_loop(0, num_tokens // TOKEN_TILE, run, None)


def chunks(hidden: int, channels: int, body, carry):
    """carry = body(lanes, carry) for every register's width of channels, `channels` of them unrolled."""

    def run(c, carry):
        for lane in range(0, channels, LANES):
            carry = body(pl.ds(pl.multiple_of(c * channels + lane, LANES), LANES), carry)
        return carry

    return lax.fori_loop(0, hidden // channels, run, carry)


def split(value: jax.Array, num_parts: int) -> list[jax.Array]:
    """float32 `value` as the sum of bfloat16 numbers; three of them are exact.

    By masking bits: a compiler may drop a rounding to bfloat16 and back, but no mask.
    """
    parts = []
    for _ in range(num_parts):
        bits = lax.bitcast_convert_type(value, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        value = value - part
    return parts


def load_fn(fn_ref, parts_ref) -> None:
    """Copies `fn` to scratch on the first step: as it is, or as bfloat16 parts below one another.

    With bfloat16 streams one product with the stacked parts is an exact float32 projection: the matrix unit
    has room for three times as many rows.
    """
    num_rows = fn_ref.shape[0]

    @pl.when(pl.program_id(0) == 0)
    def _():
        parts_ref[...] = jnp.zeros_like(parts_ref)
        if parts_ref.dtype == jnp.float32:
            parts_ref[:num_rows] = fn_ref[...]
            return
        height = parts_ref.shape[0] // PASS_SCORES

        def copy(lanes, carry):
            for i, part in enumerate(split(fn_ref[:, lanes], PASS_SCORES)):
                parts_ref[i * height : i * height + num_rows, lanes] = part
            return carry

        chunks(fn_ref.shape[1], LANES, copy, None)


def parts_shape(num_rows: int, width: int, dtype) -> pltpu.VMEM:
    """The scratch that `load_fn` fills."""
    height = round_up(num_rows, PART_ROWS)
    if dtype == jnp.bfloat16:
        return pltpu.VMEM((PASS_SCORES * height, width), jnp.bfloat16)
    return pltpu.VMEM((height, width), jnp.float32)


def sum_parts(stacked: jax.Array) -> jax.Array:
    """[3 * height, ...] -> [height, ...], smallest first."""
    height = stacked.shape[0] // PASS_SCORES
    return stacked[2 * height :] + stacked[height : 2 * height] + stacked[:height]


def precision(dtype) -> lax.Precision:
    """float32 products need the matrix unit's slow mode, bfloat16 ones are exact."""
    return lax.Precision.DEFAULT if dtype == jnp.bfloat16 else lax.Precision.HIGHEST


def mix_streams(x_ref, y_ref, maps_ref, out_ref, channels: int) -> None:
    """out[k] = post[k] y + sum_j comb[j, k] X[j]."""
    n, num_tokens, hidden = x_ref.shape

    def group(rows):
        columns = maps_ref[rows, :]
        post = [spread(columns, n + k) for k in range(n)]
        comb = [[spread(columns, 2 * n + j * n + k) for k in range(n)] for j in range(n)]

        def chunk(lanes, carry):
            y = y_ref[rows, lanes].astype(jnp.float32)
            xs = [x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)]
            for k in range(n):
                mixed = token_maps.total([comb[j][k] * xs[j] for j in range(n)])
                out_ref[k, rows, lanes] = (post[k] * y + mixed).astype(out_ref.dtype)
            return carry

        chunks(hidden, channels, chunk, None)

    groups(num_tokens, group)


def sum_squares(x_ref, columns_ref, channels: int) -> None:
    """columns[t, 0:128] sum to |v_t|^2; the sum over lanes is left to the transposition."""
    n, num_tokens, hidden = x_ref.shape

    def group(rows):
        def chunk(lanes, carry):
            xs = [x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)]
            return carry + token_maps.total([x * x for x in xs])

        columns_ref[rows, :] = chunks(hidden, channels, chunk, jnp.zeros((TOKEN_TILE, LANES), jnp.float32))

    groups(num_tokens, group)


def scores(x_ref, parts_ref) -> jax.Array:
    """v fn^T as f32[rows, tokens]."""
    n, _, hidden = x_ref.shape
    products = [
        lax.dot_general(
            parts_ref[:, j * hidden : (j + 1) * hidden],
            x_ref[j],
            (((1,), (1,)), ((), ())),
            precision=precision(x_ref.dtype),
            preferred_element_type=jnp.float32,
        )
        for j in range(n)
    ]
    stacked = token_maps.total(products)
    return sum_parts(stacked) if x_ref.dtype == jnp.bfloat16 else stacked


def affine_rows(z: list[jax.Array], base_ref, scale_ref, n: int) -> list[jax.Array]:
    """z scale + base."""
    return [
        row * scale_ref[token_maps.scale_index(i, n)] + base_ref[i]
        for i, row in enumerate(z)
    ]  # fmt: skip


def compute_maps(r: types.SimpleNamespace, x_ref, variant: Variant, channels: int) -> None:
    """Fills r.columns [tokens, 128] with maps, scores and the inverse RMS of the streams."""
    n, _, hidden = x_ref.shape
    num_rows = r.fn.shape[0]
    sum_squares(x_ref, r.columns, channels)
    mean = r.columns[...].T.sum(axis=0, keepdims=True) * (1 / (n * hidden))
    inverse_rms = lax.rsqrt(mean + variant.norm_eps)  # [1, tokens]
    r.lines[...] = jnp.zeros_like(r.lines)
    r.lines[score_rows(num_rows), :] = scores(x_ref, r.parts)[:num_rows] * inverse_rms
    r.lines[pl.ds(inverse_rms_row(num_rows), 1), :] = inverse_rms

    first = score_rows(num_rows).start
    z = [r.lines[first + i : first + i + 1, :] for i in range(num_rows)]
    affine = affine_rows(z, r.base, r.scale, n)
    rows = token_maps.gates(affine[:n], variant.hc_eps)
    if variant.norm:
        rows += [2 * gate for gate in token_maps.gates(affine[n : 2 * n], 0.0)]
        rows += token_maps.sinkhorn(affine[2 * n :], n, variant.num_iters, variant.hc_eps)
    for i, row in enumerate(rows):
        r.lines[i : i + 1, :] = row
    r.columns[...] = r.lines[...].T


def combine(r: types.SimpleNamespace, x_ref, variant: Variant, channels: int) -> None:
    """r.sublayer = RMSNorm(sum_j pre[j] X[j]), or the plain sum."""
    n, num_tokens, hidden = x_ref.shape

    def group(rows):
        columns = r.columns[rows, :]
        pre = [spread(columns, j) for j in range(n)]

        def weighted_sum(lanes, squares):
            h = token_maps.total([pre[j] * x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)])
            h = h.astype(x_ref.dtype)
            r.sublayer[rows, lanes] = h
            return squares + jnp.square(h.astype(jnp.float32))

        zeros = jnp.zeros((TOKEN_TILE, LANES), jnp.float32)
        squares = chunks(hidden, channels, weighted_sum, zeros)
        if not variant.norm:
            return
        mean = squares.sum(axis=1, keepdims=True) * (1 / hidden)
        inverse = jnp.broadcast_to(lax.rsqrt(mean + variant.norm_eps), (TOKEN_TILE, LANES))

        def normalise(lanes, carry):
            h = r.sublayer[rows, lanes].astype(jnp.float32)
            r.sublayer[rows, lanes] = (h * inverse * r.norm_weight[:, lanes]).astype(x_ref.dtype)
            return carry

        chunks(hidden, channels, normalise, None)

    groups(num_tokens, group)


def _forward_body(*refs, names: tuple[str, ...], variant: Variant, channels: int) -> None:
    r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    if variant.post:
        mix_streams(r.streams, r.update, r.maps, r.next_streams, channels)
    if not variant.pre:
        return
    x_ref = r.next_streams if variant.post else r.streams
    load_fn(r.fn, r.parts)
    compute_maps(r, x_ref, variant, channels)
    combine(r, x_ref, variant, channels)
    if variant.norm:
        r.next_maps[...] = r.columns[:, : r.fn.shape[0]]
    if hasattr(r, "saved"):
        r.saved[...] = r.columns[...]


def call(body, *, operands, specs, outputs, scratch, num_tokens, blocks, variant, name, interpret, flops):
    """One pallas_call over the tokens; operands, specs, outputs and scratch are dicts by name of a ref."""
    names = (*operands, *outputs, *scratch)
    bytes_accessed = sum(a.size * a.dtype.itemsize for a in (*operands.values(), *outputs.values()))
    results = pl.pallas_call(
        functools.partial(body, names=names, variant=variant, channels=blocks.channels),
        grid=(pl.cdiv(num_tokens, blocks.tokens),),
        in_specs=[specs[name] for name in operands],
        out_specs=[specs[name] for name in outputs],
        out_shape=list(outputs.values()),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            # The parts of `fn` are made on the first step and sums over tokens run along the grid.
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=tuning.VMEM_BUDGET + tuning.VMEM_SLACK,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=32 * num_tokens, bytes_accessed=bytes_accessed
        ),
        interpret=interpret,
        name=name,
    )(*operands.values())
    return dict(zip(outputs, results, strict=True))


def block_specs(blocks: tuning.HyperConnectionBlocks, n: int, hidden: int, rows: int) -> dict:
    """Every operand's tile, by name; what does not depend on the token stays where it is."""
    streams = pl.BlockSpec((n, blocks.tokens, hidden), lambda i: (0, i, 0))
    token = pl.BlockSpec((blocks.tokens, hidden), lambda i: (i, 0))
    columns = pl.BlockSpec((blocks.tokens, rows), lambda i: (i, 0))
    saved = pl.BlockSpec((blocks.tokens, LANES), lambda i: (i, 0))
    matrix = pl.BlockSpec((rows, n * hidden), lambda i: (0, 0))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    return {
        **dict.fromkeys(("streams", "next_streams", "d_streams", "d_next_streams"), streams),
        **dict.fromkeys(("update", "sublayer", "d_update", "d_sublayer"), token),
        **dict.fromkeys(("maps", "next_maps", "d_maps", "d_next_maps", "d_affine"), columns),
        **dict.fromkeys(("fn", "d_fn"), matrix),
        **dict.fromkeys(("base", "scale"), scalars),
        "saved": saved,
        "norm_weight": pl.BlockSpec((1, hidden), lambda i: (0, 0)),
        "d_norm_weight": pl.BlockSpec((TOKEN_TILE, hidden), lambda i: (0, 0)),
    }


def forward(operands: dict, *, variant: Variant, save: bool, blocks, interpret) -> dict:
    """The outputs of the variant's stages by name.

    Args:
        operands: streams [N, T, D]; with `post` update [T, D] and maps [T, rows]; with `pre`
            fn [rows, N * D], base [rows], scale [3 or 1]; with `norm` norm_weight [1, D].
        variant: what to compute.
        save: also return `saved` [T, 128]: maps, scores and inverse RMS for the backward pass.
        blocks: tile sizes.
        interpret: as in `pl.pallas_call`.
    """
    streams = operands["streams"]
    n, num_tokens, hidden = streams.shape
    rows = (operands["fn"] if variant.pre else operands["maps"].T).shape[0]
    outputs, scratch = {}, {}
    if variant.post:
        outputs["next_streams"] = jax.ShapeDtypeStruct(streams.shape, streams.dtype)
    if variant.pre:
        outputs["sublayer"] = jax.ShapeDtypeStruct((num_tokens, hidden), streams.dtype)
        scratch["parts"] = parts_shape(rows, n * hidden, streams.dtype)
        scratch["columns"] = pltpu.VMEM((blocks.tokens, LANES), jnp.float32)
        scratch["lines"] = pltpu.VMEM((LANES, blocks.tokens), jnp.float32)
        if variant.norm:
            outputs["next_maps"] = jax.ShapeDtypeStruct((num_tokens, rows), jnp.float32)
        if save:
            outputs["saved"] = jax.ShapeDtypeStruct((num_tokens, LANES), jnp.float32)
    per_channel = variant.post * n * (2 * n + 2) + variant.pre * (2 * n * (rows + 2) + 6)
    return call(
        _forward_body,
        operands=operands,
        specs=block_specs(blocks, n, hidden, rows),
        outputs=outputs,
        scratch=scratch,
        num_tokens=num_tokens,
        blocks=blocks,
        variant=variant,
        name=variant.name,
        interpret=interpret,
        flops=per_channel * num_tokens * hidden,
    )
