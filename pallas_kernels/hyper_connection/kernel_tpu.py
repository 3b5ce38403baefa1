"""The Mosaic TPU forward kernel of the hyper-connections, in four variants (`Variant`).

Layout: streams are [N, tokens, D], N outside the tiles, so that a stream of a block is an ordinary
[tokens, D] tile. All tokens of a block go through one chunk of channels after the other, eight tokens and 256
channels at a time, with per-token weights that lie in scratch spread over 128 lanes. Maps are computed with
tokens on the lanes (`maps.py`); small transpositions change between the two. Maps are [tokens, rows] in HBM.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import round_up
from pallas_kernels.hyper_connection import maps as token_maps
from pallas_kernels.hyper_connection import tuning
from pallas_kernels.hyper_connection.parts import split, stack, sum_parts
from pallas_kernels.hyper_connection.tuning import LANES, SUBLANES, TOKEN_TILE
from pallas_kernels.precision import product_precision


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
    start = round_up(num_rows, SUBLANES)
    return slice(start, start + num_rows)


def inverse_rms_row(num_rows: int) -> int:
    """Where the inverse RMS of a token's streams stands."""
    return 2 * round_up(num_rows, SUBLANES)


def lane_group(channels: int) -> int:
    """Channels of one load: two registers' width fills a register with bfloat16 numbers of 8 tokens."""
    return math.gcd(channels, 2 * LANES)


def widen(column: jax.Array, width: int) -> jax.Array:
    """[8, 128] with the same number on every lane, on `width` lanes."""
    return jnp.concatenate([column] * (width // LANES), axis=1)


def token_groups(num_tokens: int) -> list[slice]:
    """Eight at a time: their weights of all streams fit the registers."""
    return [slice(token, token + SUBLANES) for token in range(0, num_tokens, SUBLANES)]


def lanes_at(start, width: int):
    """The slice of `width` channels from `start`, a multiple of 128."""
    return pl.ds(pl.multiple_of(start, LANES), width)


def chunks(hidden: int, channels: int, body, carry=None):
    """carry = body(chunk, carry) for every chunk of channels."""
    return lax.fori_loop(0, hidden // channels, body, carry)


def spread(columns: jax.Array, out_ref, first: int) -> None:
    """out[i, t] = columns[t, first + i] on all lanes."""
    count, num_tokens, _ = out_ref.shape
    for i in range(count):
        out_ref[i] = jnp.broadcast_to(columns[:, first + i : first + i + 1], (num_tokens, LANES))


def load_fn(fn_ref, parts_ref) -> None:
    """Copies `fn` to scratch on the first step: as it is, or as bfloat16 parts below one another.

    With bfloat16 streams one product with the stacked parts is an exact float32 projection: the matrix unit
    has room for three times as many rows.
    """
    n, num_tiles, height, _ = parts_ref.shape
    exact = parts_ref.dtype == jnp.bfloat16
    unrolled = math.gcd(num_tiles, 8)

    def copy(group, _):
        for j in range(n):
            for i in range(unrolled):
                tile = group * unrolled + i
                value = fn_ref[:, lanes_at((j * num_tiles + tile) * LANES, LANES)]
                parts = split(value) if exact else [value]
                parts_ref[j, tile] = stack(parts, height).astype(parts_ref.dtype)

    @pl.when(pl.program_id(0) == 0)
    def _():
        chunks(num_tiles, unrolled, copy)


def parts_shape(num_rows: int, n: int, hidden: int, dtype) -> pltpu.VMEM:
    """The scratch that `load_fn` fills: [N, D / 128, rows, 128], in tiles as the matrix unit takes them."""
    return pltpu.VMEM((n, hidden // LANES, tuning.part_rows(num_rows, dtype.itemsize), LANES), dtype)


def load_parts(parts_ref, j: int, chunk, channels: int) -> jax.Array:
    """[rows, channels] of stream j."""
    tiles = channels // LANES
    return jnp.concatenate([parts_ref[j, chunk * tiles + i] for i in range(tiles)], axis=1)


def mix(r: types.SimpleNamespace, chunk, channels: int, staged=None) -> None:
    """next_streams[k] = post[k] y + sum_j comb[j, k] X[j] for one chunk; a copy goes to `staged`.

    staged: [N, channels / 128, tokens, 128], in tiles as the matrix unit takes them.
    """
    n, num_tokens, _ = r.streams.shape
    width = lane_group(channels)

    def mix_group(rows, lanes):
        y = r.update[rows, lanes].astype(jnp.float32)
        xs = [r.streams[j, rows, lanes].astype(jnp.float32) for j in range(n)]
        out = []
        for k in range(n):
            mixed = widen(r.spread[k, rows, :], width) * y
            for j in range(n):
                mixed += widen(r.spread[n + j * n + k, rows, :], width) * xs[j]
            r.next_streams[k, rows, lanes] = mixed.astype(r.next_streams.dtype)
            out.append(mixed)
        return out

    for token in range(0, num_tokens, TOKEN_TILE):
        tokens = slice(token, token + TOKEN_TILE)
        for lane in range(0, channels, width):
            lanes = lanes_at(chunk * channels + lane, width)
            halves = [mix_group(slice(t, t + SUBLANES), lanes) for t in (token, token + SUBLANES)]
            if staged is None:
                continue
            for k in range(n):
                both = jnp.concatenate([half[k] for half in halves], axis=0).astype(staged.dtype)
                for i in range(0, width, LANES):
                    staged[k, (lane + i) // LANES, tokens, :] = both[:, i : i + LANES]


def add_products(sums_ref, pairs: list[tuple[jax.Array, jax.Array]]) -> None:
    """sums += the sum of left right^T."""
    products = [
        lax.dot_general(
            left,
            right,
            (((1,), (1,)), ((), ())),
            precision=product_precision(left.dtype),
            preferred_element_type=jnp.float32,
        )
        for left, right in pairs
    ]
    sums_ref[...] += token_maps.total(products)


def mix_and_project(r: types.SimpleNamespace, channels: int) -> tuple[jax.Array, jax.Array]:
    """Mixes the streams; returns fn v^T in parts [rows, tokens] and |v|^2 [1, tokens] of the result v.

    The matrix unit projects a chunk of channels while the vector unit, the busier one, mixes the next:
    therefore |v|^2 is of the diagonal of v v^T. The copy of a chunk in scratch is there for the compiler: it
    cannot tell that the chunk of `next_streams` it reads is not the one it writes.
    """
    n, _, hidden = r.streams.shape
    tiles = range(channels // LANES)

    def project(chunk):
        pairs = []
        for j in range(n):
            x = jnp.concatenate([r.staged[j, i] for i in tiles], axis=1)
            pairs.append((x, jnp.concatenate([load_parts(r.parts, j, chunk, channels), x], axis=0)))
        add_products(r.scores, pairs)

    def step(chunk, _):
        project(chunk)
        mix(r, chunk + 1, channels, r.staged)

    mix(r, 0, channels, r.staged)
    chunks(hidden - channels, channels, step)
    project(hidden // channels - 1)
    scores = r.scores[...].T
    height = r.parts.shape[2]
    gram = scores[height:]
    rows, columns = (lax.broadcasted_iota(jnp.int32, gram.shape, axis) for axis in (0, 1))
    return scores[:height], jnp.where(rows == columns, gram, 0.0).sum(axis=0, keepdims=True)


def project_streams(r: types.SimpleNamespace, channels: int) -> tuple[jax.Array, jax.Array]:
    """The same without mixing: the vector unit has the time for squares, and a trip may be twice as long."""
    n, num_tokens, hidden = r.streams.shape
    channels = math.gcd(hidden, 2 * channels)
    width = lane_group(channels)

    def step(chunk, _):
        xs = [r.streams[j, :, lanes_at(chunk * channels, channels)] for j in range(n)]
        add_products(r.scores, [(load_parts(r.parts, j, chunk, channels), x) for j, x in enumerate(xs)])
        for rows in token_groups(num_tokens):
            for lane in range(0, channels, width):
                lanes = lanes_at(chunk * channels + lane, width)
                xs = [r.streams[j, rows, lanes].astype(jnp.float32) for j in range(n)]
                add_lanes(r.sums, rows, token_maps.total([x * x for x in xs]))

    r.sums[...] = jnp.zeros_like(r.sums)
    chunks(hidden, channels, step)
    return r.scores[...], r.sums[...].T.sum(axis=0, keepdims=True)


def add_lanes(sums_ref, index, value: jax.Array) -> None:
    """sums[index] += value, folded to 128 lanes."""
    parts = [value[:, lane : lane + LANES] for lane in range(0, value.shape[1], LANES)]
    sums_ref[index] += token_maps.total(parts)


def affine_rows(z: list[jax.Array], base_ref, scale_ref, n: int) -> list[jax.Array]:
    """z scale + base."""
    return [
        row * scale_ref[token_maps.scale_index(i, n)] + base_ref[i]
        for i, row in enumerate(z)
    ]  # fmt: skip


def start_maps(r, scores: jax.Array, squares: jax.Array, variant: Variant) -> token_maps.Rows:
    """Scores, inverse RMS, pre and post to r.lines, pre to r.gates; returns the logits of comb."""
    n, _, hidden = r.streams.shape
    num_rows = r.fn.shape[0]
    inverse_rms = lax.rsqrt(squares * (1 / (n * hidden)) + variant.norm_eps)  # [1, tokens]
    scores = sum_parts(scores, num_rows) if r.parts.dtype == jnp.bfloat16 else scores[:num_rows]
    r.lines[...] = jnp.zeros_like(r.lines)
    r.lines[score_rows(num_rows), :] = scores * inverse_rms
    r.lines[pl.ds(inverse_rms_row(num_rows), 1), :] = inverse_rms

    first = score_rows(num_rows).start
    z = [r.lines[first + i : first + i + 1, :] for i in range(num_rows)]
    affine = affine_rows(z, r.base, r.scale, n)
    rows = token_maps.gates(affine[:n], variant.hc_eps)
    if variant.norm:
        rows += [2 * gate for gate in token_maps.gates(affine[n : 2 * n], 0.0)]
    for i, row in enumerate(rows):
        r.lines[i : i + 1, :] = row
    spread(r.lines[:SUBLANES, :].T, r.gates, 0)
    return affine[2 * n :]


def combine(r, x_ref, logits: token_maps.Rows, variant: Variant, channels: int) -> None:
    """sublayer = sum_j pre[j] X[j], and comb to r.lines.

    Sinkhorn's iterations are one long chain of few operations: they hide behind the sum.
    """
    n, num_tokens, hidden = x_ref.shape
    width = lane_group(channels)
    num_steps = variant.num_iters - 1 if variant.norm else 0
    per_chunk = min(num_steps // (hidden // channels), 4)  # they are unrolled

    def sum_chunk(chunk, matrix):
        for _ in range(per_chunk):
            matrix = token_maps.sinkhorn_step(matrix, n, variant.hc_eps)
        for rows in token_groups(num_tokens):
            pre = [widen(r.gates[j, rows, :], width) for j in range(n)]
            for lane in range(0, channels, width):
                lanes = lanes_at(chunk * channels + lane, width)
                h = token_maps.total([pre[j] * x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)])
                r.sublayer[rows, lanes] = h.astype(x_ref.dtype)
                if variant.norm:
                    add_lanes(r.sums, rows, jnp.square(r.sublayer[rows, lanes].astype(jnp.float32)))
        return matrix

    r.sums[...] = jnp.zeros_like(r.sums)
    matrix = token_maps.sinkhorn_start(logits, n, variant.hc_eps) if variant.norm else ()
    matrix = chunks(hidden, channels, sum_chunk, matrix)
    if not variant.norm:
        return
    left = num_steps - per_chunk * (hidden // channels)
    matrix = lax.fori_loop(0, left, lambda _, m: token_maps.sinkhorn_step(m, n, variant.hc_eps), matrix)
    for i, row in enumerate(matrix):
        r.lines[2 * n + i : 2 * n + i + 1, :] = row


def normalise(r: types.SimpleNamespace, variant: Variant, channels: int) -> None:
    """sublayer *= norm_weight / its RMS."""
    num_tokens, hidden = r.sublayer.shape
    width = lane_group(channels)
    mean = r.sums[...].sum(axis=1, keepdims=True) * (1 / hidden)
    r.sums[...] = jnp.broadcast_to(lax.rsqrt(mean + variant.norm_eps), r.sums.shape)

    def scale_chunk(chunk, _):
        for lane in range(0, channels, width):
            lanes = lanes_at(chunk * channels + lane, width)
            weight = jnp.broadcast_to(r.norm_weight[:, lanes], (SUBLANES, width))
            for rows in token_groups(num_tokens):
                h = r.sublayer[rows, lanes].astype(jnp.float32)
                x = h * widen(r.sums[rows, :], width) * weight
                r.sublayer[rows, lanes] = x.astype(r.sublayer.dtype)

    chunks(hidden, channels, scale_chunk)


def _forward_body(*refs, names: tuple[str, ...], variant: Variant, channels: int) -> None:
    r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    n, _, hidden = r.streams.shape
    if variant.pre:
        load_fn(r.fn, r.parts)
    if variant.post:
        spread(r.maps[...], r.spread, n)
    if not variant.pre:
        chunks(hidden, channels, lambda chunk, _: mix(r, chunk, channels))
        return
    r.scores[...] = jnp.zeros_like(r.scores)
    scores, squares = (mix_and_project if variant.post else project_streams)(r, channels)
    x_ref = r.next_streams if variant.post else r.streams
    combine(r, x_ref, start_maps(r, scores, squares, variant), variant, channels)
    if variant.norm:
        normalise(r, variant, channels)
    if variant.norm or hasattr(r, "saved"):
        columns = r.lines[...].T
        if variant.norm:
            r.next_maps[...] = columns[:, : r.fn.shape[0]]
        if hasattr(r, "saved"):
            r.saved[...] = columns


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
        "d_norm_weight": pl.BlockSpec((SUBLANES, hidden), lambda i: (0, 0)),
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
    tokens, channels = blocks.tokens, blocks.channels
    outputs, scratch = {}, {}
    if variant.post:
        outputs["next_streams"] = jax.ShapeDtypeStruct(streams.shape, streams.dtype)
        scratch["spread"] = pltpu.VMEM((n + n * n, tokens, LANES), jnp.float32)
    if variant.pre:
        outputs["sublayer"] = jax.ShapeDtypeStruct((num_tokens, hidden), streams.dtype)
        scratch["parts"] = parts_shape(rows, n, hidden, streams.dtype)
        height = scratch["parts"].shape[2]
        shape = (tokens, height + tokens) if variant.post else (height, tokens)
        scratch["scores"] = pltpu.VMEM(shape, jnp.float32)
        scratch["gates"] = pltpu.VMEM((n, tokens, LANES), jnp.float32)
        scratch["sums"] = pltpu.VMEM((tokens, LANES), jnp.float32)
        scratch["lines"] = pltpu.VMEM((LANES, tokens), jnp.float32)
        if variant.post:
            scratch["staged"] = pltpu.VMEM((n, channels // LANES, tokens, LANES), streams.dtype)
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
