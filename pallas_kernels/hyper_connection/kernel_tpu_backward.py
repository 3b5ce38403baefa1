"""The Mosaic TPU backward kernel of the hyper-connections, in the variants of `kernel_tpu.py`.

Layout: as in the forward kernel. Streams cross HBM once: the kernel reads X, y and the incoming gradients,
recomputes X' in VMEM, and writes dX and dy. The gradients of weights are sums over tokens: their blocks stay
in VMEM while the grid, which is sequential, runs over the tokens (deterministic).
"""

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arithmetic import round_up
from pallas_kernels.hyper_connection import kernel_tpu as shared
from pallas_kernels.hyper_connection import maps as token_maps
from pallas_kernels.hyper_connection.kernel_tpu import Variant, groups, spread
from pallas_kernels.hyper_connection.tuning import LANES, PART_ROWS, TOKEN_TILE

# Columns of `r.columns` behind the maps, their scores and the inverse RMS of the streams.
STREAMS_FACTOR, NORM_FACTOR, INVERSE_NORM = LANES - 1, LANES - 2, LANES - 3


def _place(columns: dict[int, jax.Array]) -> jax.Array:
    """[TOKEN_TILE, 128] with the given [TOKEN_TILE, 1] columns, zero elsewhere."""
    lane = lax.broadcasted_iota(jnp.int32, (TOKEN_TILE, LANES), 1)
    out = jnp.zeros((TOKEN_TILE, LANES), jnp.float32)
    for index, column in columns.items():
        out = jnp.where(lane == index, column, out)
    return out


def _lane_sum(value: jax.Array) -> jax.Array:
    return value.sum(axis=1, keepdims=True)


def _weighted_sum(pre: list[jax.Array], xs: list[jax.Array], dtype) -> jax.Array:
    """h as the forward pass rounded it."""
    h = token_maps.total([weight * x for weight, x in zip(pre, xs, strict=True)])
    return h.astype(dtype).astype(jnp.float32)


def _reduce_channels(r: types.SimpleNamespace, x_ref, variant: Variant, channels: int) -> None:
    """What the maps' gradients need of the channels, into r.columns: d_maps and the norm's factors.

    With g = weight * dx, i = 1 / rms(h) and f = i^3 mean(h g): d_h = i g - f h, hence
    d_pre[j] = i sum(g X[j]) - f sum(h X[j]): all sums in one sweep.
    """
    n, num_tokens, hidden = x_ref.shape
    num_rows = r.fn.shape[0]

    def group(rows):
        saved = r.saved[rows, :]
        pre = [spread(saved, j) for j in range(n)]

        def sweep(lanes, sums):
            xs = [x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)]
            g = r.d_sublayer[rows, lanes].astype(jnp.float32)
            if not variant.norm:
                return tuple(s + g * x for s, x in zip(sums, xs, strict=True))
            g = g * r.norm_weight[:, lanes]
            h = _weighted_sum(pre, xs, x_ref.dtype)
            terms = [h * h, h * g, *(g * x for x in xs), *(h * x for x in xs)]
            return tuple(s + term for s, term in zip(sums, terms, strict=True))

        zero = jnp.zeros((TOKEN_TILE, LANES), jnp.float32)
        count = 2 + 2 * n if variant.norm else n
        sums = [_lane_sum(s) for s in shared.chunks(hidden, channels, sweep, (zero,) * count)]
        if not variant.norm:
            r.columns[rows, :] = _place(dict(enumerate(sums)))
            return
        inverse = lax.rsqrt(sums[0] * (1 / hidden) + variant.norm_eps)
        factor = inverse * inverse * inverse * sums[1] * (1 / hidden)
        d_pre = [inverse * sums[2 + j] - factor * sums[2 + n + j] for j in range(n)]
        r.columns[rows, :] = _place({**dict(enumerate(d_pre)), NORM_FACTOR: factor, INVERSE_NORM: inverse})
        r.columns[rows, :num_rows] += r.d_next_maps[rows, :]

    groups(num_tokens, group)


def _maps_backward(r: types.SimpleNamespace, x_ref, variant: Variant, valid: jax.Array | None) -> None:
    """From d_maps in r.columns: the gradients of scale * z + base, of v fn^T, and the streams' own factor.

    z = s r with r = 1 / rms(v): d_s = d_z r, and d_v has - (sum d_z z) r^2 / (N D) v besides fn^T d_s.
    """
    n, _, hidden = x_ref.shape
    num_rows = r.fn.shape[0]
    r.lines[...] = r.saved[...].T
    first = shared.score_rows(num_rows).start
    z = [r.lines[first + i : first + i + 1, :] for i in range(num_rows)]
    inverse_rms = r.lines[pl.ds(shared.inverse_rms_row(num_rows), 1), :]
    affine = shared.affine_rows(z, r.base, r.scale, n)

    r.lines[...] = r.columns[...].T
    d_maps = [r.lines[i : i + 1, :] for i in range(num_rows)]
    d_affine = token_maps.gates_backward(affine[:n], d_maps[:n], 1.0)
    if variant.norm:
        d_affine += token_maps.gates_backward(affine[n : 2 * n], d_maps[n : 2 * n], 2.0)
        token_maps.sinkhorn(affine[2 * n :], n, variant.num_iters, variant.hc_eps, r.kept)
        d_affine += token_maps.sinkhorn_backward(d_maps[2 * n :], n, variant.num_iters, r.kept)
    d_z = [d * r.scale[token_maps.scale_index(i, n)] for i, d in enumerate(d_affine)]
    along = token_maps.total([d * value for d, value in zip(d_z, z, strict=True)])
    r.lines[STREAMS_FACTOR : STREAMS_FACTOR + 1, :] = -along * inverse_rms * inverse_rms * (1 / (n * hidden))
    for i, d in enumerate(d_affine):
        r.lines[i : i + 1, :] = d
    r.columns[...] = r.lines[...].T
    r.d_affine[...] = r.columns[:, :num_rows]

    r.d_scores[...] = jnp.zeros_like(r.d_scores)
    for i, d in enumerate(d_z):
        d = d * inverse_rms
        # Tokens behind the end hold anything; here they would enter the sums over tokens.
        r.d_scores[i : i + 1, :] = d if valid is None else jnp.where(valid, d, 0.0)


def _project_back(r: types.SimpleNamespace, x_ref, lanes, variant: Variant, valid: jax.Array | None) -> None:
    """For one chunk of channels: r.through_scores[k] = d_s fn_k, and d_fn_k += d_s^T X_k."""
    n, _, hidden = x_ref.shape
    num_rows = r.fn.shape[0]
    exact = x_ref.dtype == jnp.bfloat16
    d_scores = r.d_scores[...]  # [padded rows, tokens]
    height = d_scores.shape[0]
    if exact:
        parts = split_rows = shared.split(d_scores, shared.PASS_SCORES)
        # Times the three parts of fn below one another. Two parts of d_s: 16 bits, twice the result's.
        left = [jnp.concatenate([part] * shared.PASS_SCORES, axis=0) for part in parts[:2]]
        stacked = jnp.concatenate(split_rows, axis=0)
    else:
        left, stacked = [d_scores], d_scores
    precision = shared.precision(x_ref.dtype)

    def product(a, b, axis_a, axis_b):
        dims = (((axis_a,), (axis_b,)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    for k in range(n):
        at = pl.ds(pl.multiple_of(k * hidden + lanes.start, LANES), lanes.size)
        fn = r.parts[:, at]
        r.through_scores[k] = token_maps.total([product(part, fn, 0, 0) for part in left])
        x = x_ref[k, :, lanes]
        if valid is not None:
            x = jnp.where(valid, x.astype(jnp.float32), 0.0).astype(x.dtype)
        d_fn = product(stacked, x, 1, 0)
        d_fn = shared.sum_parts(d_fn) if exact else d_fn[:height]
        r.d_fn[:, at] += d_fn[:num_rows]


def _stream_gradients(r: types.SimpleNamespace, x_ref, chunk, variant: Variant, invalid_from) -> None:
    """For one chunk of channels: the gradient of X' (or X), and from it those of X, y and maps."""
    n, num_tokens, _ = r.streams.shape

    def group(rows):
        weights = r.columns[rows, :] if variant.pre else None
        if variant.pre:
            saved = r.saved[rows, :]
            pre = [spread(saved, j) for j in range(n)]
            own = spread(weights, STREAMS_FACTOR)
        if variant.norm:
            factor, inverse = spread(weights, NORM_FACTOR), spread(weights, INVERSE_NORM)
            token = rows.start + lax.broadcasted_iota(jnp.int32, (TOKEN_TILE, LANES), 0)
        if variant.post:
            maps = r.maps[rows, :]
            post = [spread(maps, n + k) for k in range(n)]
            comb = [[spread(maps, 2 * n + j * n + k) for k in range(n)] for j in range(n)]
            sums = [r.map_sums[i, rows, :] for i in range(n + n * n)]
        for lane in range(0, chunk.size, LANES):
            lanes = pl.ds(pl.multiple_of(chunk.start + lane, LANES), LANES)
            total = [jnp.zeros((TOKEN_TILE, LANES), jnp.float32)] * n
            if variant.post:
                total = [r.d_next_streams[k, rows, lanes].astype(jnp.float32) for k in range(n)]
            if variant.pre:
                xs = [x_ref[k, rows, lanes].astype(jnp.float32) for k in range(n)]
                d_h = r.d_sublayer[rows, lanes].astype(jnp.float32)
            if variant.norm:
                h = _weighted_sum(pre, xs, x_ref.dtype)
                d_weight = d_h * h * inverse
                if invalid_from is not None:
                    d_weight = jnp.where(token < invalid_from, d_weight, 0.0)
                r.d_norm_weight[:, lanes] += d_weight
                d_h = inverse * (d_h * r.norm_weight[:, lanes]) - factor * h
            if variant.pre:
                through = [r.through_scores[k, rows, lane : lane + LANES] for k in range(n)]
                total = [total[k] + (pre[k] * d_h + (own * xs[k] + through[k])) for k in range(n)]
            if not variant.post:
                for k in range(n):
                    r.d_streams[k, rows, lanes] = total[k].astype(r.d_streams.dtype)
                continue
            y = r.update[rows, lanes].astype(jnp.float32)
            d_y = token_maps.total([post[k] * total[k] for k in range(n)])
            r.d_update[rows, lanes] = d_y.astype(r.d_update.dtype)
            for k in range(n):
                sums[k] += y * total[k]
            for j in range(n):
                x = r.streams[j, rows, lanes].astype(jnp.float32)
                d_x = token_maps.total([comb[j][k] * total[k] for k in range(n)])
                r.d_streams[j, rows, lanes] = d_x.astype(r.d_streams.dtype)
                for k in range(n):
                    sums[n + j * n + k] += x * total[k]
        if variant.post:
            for i, value in enumerate(sums):
                r.map_sums[i, rows, :] = value

    groups(num_tokens, group)


def _write_map_gradients(r: types.SimpleNamespace) -> None:
    """d_maps from the sums, whose lanes are still to be added; pre has no part in `post`."""
    n, num_tokens, _ = r.streams.shape

    def group(rows):
        sums = {n + i: _lane_sum(r.map_sums[i, rows, :]) for i in range(n + n * n)}
        r.d_maps[rows, :] = _place(sums)[:, : r.d_maps.shape[1]]

    groups(num_tokens, group)


def _backward_body(*refs, names: tuple[str, ...], variant: Variant, channels: int, ragged_end) -> None:
    r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    _, tile, hidden = r.streams.shape
    invalid_from = lanes_valid = rows_valid = None
    if ragged_end is not None:
        invalid_from = ragged_end - pl.program_id(0) * tile
        lanes_valid = lax.broadcasted_iota(jnp.int32, (1, tile), 1) < invalid_from
        rows_valid = lax.broadcasted_iota(jnp.int32, (tile, channels), 0) < invalid_from

    x_ref = r.streams
    if variant.post:
        r.map_sums[...] = jnp.zeros_like(r.map_sums)
    if variant.pre:
        shared.load_fn(r.fn, r.parts)

        @pl.when(pl.program_id(0) == 0)
        def _():
            r.d_fn[...] = jnp.zeros_like(r.d_fn)
            if variant.norm:
                r.d_norm_weight[...] = jnp.zeros_like(r.d_norm_weight)

        if variant.post:
            x_ref = r.next_streams
            shared.mix_streams(r.streams, r.update, r.maps, x_ref, channels)
        _reduce_channels(r, x_ref, variant, channels)
        # The norm's factors have no row among the maps' gradients: they ride along in `columns`.
        _maps_backward(r, x_ref, variant, lanes_valid)

    def chunk(c, _):
        lanes = pl.ds(pl.multiple_of(c * channels, LANES), channels)
        if variant.pre:
            _project_back(r, x_ref, lanes, variant, rows_valid)
        _stream_gradients(r, x_ref, lanes, variant, invalid_from)

    lax.fori_loop(0, hidden // channels, chunk, None)
    if variant.post:
        _write_map_gradients(r)


def backward(operands: dict, *, variant: Variant, blocks, interpret) -> dict:
    """The gradients of the variant's operands by name.

    Args:
        operands: those of `kernel_tpu.forward`, and with `post` d_next_streams; with `pre` saved and
            d_sublayer; with `norm` d_next_maps.
        variant: as in the forward pass.
        blocks: tile sizes.
        interpret: as in `pl.pallas_call`.

    Returns:
        d_streams; with `post` d_update and d_maps; with `pre` d_affine [T, rows] (of scale * z + base) and
        d_fn; with `norm` d_norm_weight [16, D], still to be summed.
    """
    streams = operands["streams"]
    n, num_tokens, hidden = streams.shape
    rows = (operands["fn"] if variant.pre else operands["maps"].T).shape[0]
    tile, channels = blocks.tokens, blocks.channels
    outputs = {"d_streams": jax.ShapeDtypeStruct(streams.shape, streams.dtype)}
    scratch = {}
    if variant.post:
        outputs["d_update"] = jax.ShapeDtypeStruct((num_tokens, hidden), operands["update"].dtype)
        outputs["d_maps"] = jax.ShapeDtypeStruct((num_tokens, rows), jnp.float32)
        scratch["map_sums"] = pltpu.VMEM((n + n * n, tile, LANES), jnp.float32)
    if variant.pre:
        outputs["d_affine"] = jax.ShapeDtypeStruct((num_tokens, rows), jnp.float32)
        outputs["d_fn"] = jax.ShapeDtypeStruct((rows, n * hidden), jnp.float32)
        scratch["parts"] = shared.parts_shape(rows, n * hidden, streams.dtype)
        scratch["columns"] = pltpu.VMEM((tile, LANES), jnp.float32)
        scratch["lines"] = pltpu.VMEM((LANES, tile), jnp.float32)
        scratch["d_scores"] = pltpu.VMEM((round_up(rows, PART_ROWS), tile), jnp.float32)
        scratch["through_scores"] = pltpu.VMEM((n, tile, channels), jnp.float32)
        if variant.post:
            scratch["next_streams"] = pltpu.VMEM((n, tile, hidden), streams.dtype)
    if variant.norm:
        outputs["d_norm_weight"] = jax.ShapeDtypeStruct((TOKEN_TILE, hidden), jnp.float32)
        scratch["kept"] = pltpu.VMEM((2 * variant.num_iters, round_up(n * n + n, 8), tile), jnp.float32)
    per_channel = variant.post * n * (6 * n + 6) + variant.pre * (n * (4 * rows + 14) + 24)

    def body(*refs, **static):
        _backward_body(*refs, **static, ragged_end=num_tokens if num_tokens % tile else None)

    return shared.call(
        body,
        operands=operands,
        specs=shared.block_specs(blocks, n, hidden, rows),
        outputs=outputs,
        scratch=scratch,
        num_tokens=num_tokens,
        blocks=blocks,
        variant=variant,
        name=variant.name + "_backward",
        interpret=interpret,
        flops=per_channel * num_tokens * hidden,
    )
