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
from pallas_kernels.hyper_connection import parts
from pallas_kernels.hyper_connection.kernel_tpu import Variant, lanes_at, token_groups, widen
from pallas_kernels.hyper_connection.tuning import LANES, PARTS, SUBLANES
from pallas_kernels.precision import product_precision

# Columns of `r.columns` behind the maps, their scores and the inverse RMS of the streams.
STREAMS_FACTOR, NORM_FACTOR, INVERSE_NORM = LANES - 1, LANES - 2, LANES - 3


def _place(columns: dict[int, jax.Array]) -> jax.Array:
    """[tokens, 128] with the given [tokens, 1] columns, zero elsewhere."""
    shape = (next(iter(columns.values())).shape[0], LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    out = jnp.zeros(shape, jnp.float32)
    for index, column in columns.items():
        out = jnp.where(lane == index, column, out)
    return out


def _lane_sum(value: jax.Array) -> jax.Array:
    return value.sum(axis=1, keepdims=True)


def _weighted_sum(pre: list[jax.Array], xs: list[jax.Array], dtype) -> jax.Array:
    """h as the forward pass rounded it."""
    h = pre[0] * xs[0]
    for weight, x in zip(pre[1:], xs[1:], strict=True):
        h += weight * x
    return h.astype(dtype).astype(jnp.float32)


def _reduce_channels(r: types.SimpleNamespace, x_ref, variant: Variant, channels: int) -> None:
    """What the maps' gradients need of the channels, into r.columns: d_maps and the norm's factors.

    With g = weight * dx, i = 1 / rms(h) and f = i^3 mean(h g): d_h = i g - f h, hence
    d_pre[j] = i sum(g X[j]) - f sum(h X[j]): all sums in one sweep.
    """
    n, num_tokens, hidden = x_ref.shape
    num_rows = r.fn.shape[0]
    width = shared.lane_group(channels)

    def sum_chunk(chunk, _):
        for rows in token_groups(num_tokens):
            for lane in range(0, channels, width):
                lanes = lanes_at(chunk * channels + lane, width)
                xs = [x_ref[j, rows, lanes].astype(jnp.float32) for j in range(n)]
                g = r.d_sublayer[rows, lanes].astype(jnp.float32)
                if variant.norm:
                    g = g * r.norm_weight[:, lanes]
                    pre = [widen(r.gates[j, rows, :], width) for j in range(n)]
                    h = _weighted_sum(pre, xs, x_ref.dtype)
                    terms = [*(g * x for x in xs), *(h * x for x in xs), h * h, h * g]
                else:
                    terms = [g * x for x in xs]
                for i, term in enumerate(terms):
                    shared.add_lanes(r.channel_sums, (i, rows), term)

    r.channel_sums[...] = jnp.zeros_like(r.channel_sums)
    shared.chunks(hidden, channels, sum_chunk)
    sums = [_lane_sum(r.channel_sums[i]) for i in range(r.channel_sums.shape[0])]
    if not variant.norm:
        r.columns[...] = _place(dict(enumerate(sums)))
        return
    inverse = lax.rsqrt(sums[2 * n] * (1 / hidden) + variant.norm_eps)
    factor = inverse * inverse * inverse * sums[2 * n + 1] * (1 / hidden)
    d_pre = [inverse * sums[j] - factor * sums[n + j] for j in range(n)]
    r.columns[...] = _place({**dict(enumerate(d_pre)), NORM_FACTOR: factor, INVERSE_NORM: inverse})
    r.columns[:, :num_rows] += r.d_next_maps[...]


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
        token_maps.sinkhorn_keep(affine[2 * n :], n, variant.num_iters, variant.hc_eps, r.kept)
        d_affine += token_maps.sinkhorn_backward(d_maps[2 * n :], n, variant.num_iters, r.kept)
    d_z = [d * r.scale[token_maps.scale_index(i, n)] for i, d in enumerate(d_affine)]
    along = token_maps.total([d * value for d, value in zip(d_z, z, strict=True)])
    r.lines[STREAMS_FACTOR : STREAMS_FACTOR + 1, :] = -along * inverse_rms * inverse_rms * (1 / (n * hidden))
    for i, d in enumerate(d_affine):
        r.lines[i : i + 1, :] = d
    r.columns[...] = r.lines[...].T
    r.d_affine[...] = r.columns[:, :num_rows]

    for i, d in enumerate(d_z):
        d = d * inverse_rms
        # Tokens behind the end hold anything; here they would enter the sums over tokens.
        r.d_scores[i : i + 1, :] = d if valid is None else jnp.where(valid, d, 0.0)


def _project_back(r: types.SimpleNamespace, x_ref, chunk, channels: int, valid: jax.Array | None) -> None:
    """For one chunk of channels: r.through_scores[k] = d_s fn_k, and d_fn_k += d_s^T X_k."""
    n, _, hidden = x_ref.shape
    num_rows = r.fn.shape[0]
    height = r.parts.shape[2]
    d_scores = r.d_scores[...]  # [rows, tokens]
    left = [d_scores]
    right = [d_scores]
    if x_ref.dtype == jnp.bfloat16:
        right = parts.split(d_scores)
        # Times the three parts of fn below one another. Two parts of d_s: 16 bits, twice the result's.
        left = [parts.stack([part] * PARTS, height) for part in right[:2]]
    left = [part.astype(x_ref.dtype) for part in left]
    stacked = parts.stack(right, height).astype(x_ref.dtype)
    precision = product_precision(x_ref.dtype)

    def product(a, b, axis_a, axis_b):
        dims = (((axis_a,), (axis_b,)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    for k in range(n):
        fn = shared.load_parts(r.parts, k, chunk, channels)[: left[0].shape[0]]
        r.through_scores[k] = token_maps.total([product(part, fn, 0, 0) for part in left])
        x = x_ref[k, :, lanes_at(chunk * channels, channels)]
        if valid is not None:
            x = jnp.where(valid, x.astype(jnp.float32), 0.0).astype(x.dtype)
        d_fn = product(stacked, x, 1, 0)
        d_fn = parts.sum_parts(d_fn, num_rows) if x.dtype == jnp.bfloat16 else d_fn[:num_rows]
        r.d_fn[:, lanes_at(k * hidden + chunk * channels, channels)] += d_fn


def _stream_gradients(r: types.SimpleNamespace, x_ref, chunk, channels: int, variant, invalid_from) -> None:
    """For one chunk of channels: the gradient of X' (or X), and from it those of X, y and maps."""
    n, num_tokens, _ = r.streams.shape
    width = shared.lane_group(channels)

    def gates(rows, count):
        return [widen(r.gates[i, rows, :], width) for i in range(count)]

    for rows in token_groups(num_tokens):
        for lane in range(0, channels, width):
            lanes = lanes_at(chunk * channels + lane, width)
            if variant.post:
                total = [r.d_next_streams[k, rows, lanes].astype(jnp.float32) for k in range(n)]
            if variant.pre:
                xs = [x_ref[k, rows, lanes].astype(jnp.float32) for k in range(n)]
                d_h = r.d_sublayer[rows, lanes].astype(jnp.float32)
                pre, own = gates(rows, n), widen(r.gates[n, rows, :], width)
            if variant.norm:
                factor, inverse = (widen(r.gates[n + i, rows, :], width) for i in (1, 2))
                h = _weighted_sum(pre, xs, x_ref.dtype)
                d_weight = d_h * h * inverse
                if invalid_from is not None:
                    token = rows.start + lax.broadcasted_iota(jnp.int32, d_weight.shape, 0)
                    d_weight = jnp.where(token < invalid_from, d_weight, 0.0)
                r.d_norm_weight[:, lanes] += d_weight
                d_h = inverse * (d_h * r.norm_weight[:, lanes]) - factor * h
            if variant.pre:
                through = [r.through_scores[k, rows, lane : lane + width] for k in range(n)]
                through = [through[k] + pre[k] * d_h + own * xs[k] for k in range(n)]
                total = [total[k] + through[k] for k in range(n)] if variant.post else through
            if not variant.post:
                for k in range(n):
                    r.d_streams[k, rows, lanes] = total[k].astype(r.d_streams.dtype)
                continue
            maps = [widen(r.spread[i, rows, :], width) for i in range(n + n * n)]
            y = r.update[rows, lanes].astype(jnp.float32)
            d_y = token_maps.total([maps[k] * total[k] for k in range(n)])
            r.d_update[rows, lanes] = d_y.astype(r.d_update.dtype)
            for k in range(n):
                shared.add_lanes(r.map_sums, (k, rows), y * total[k])
            for j in range(n):
                x = r.streams[j, rows, lanes].astype(jnp.float32)
                d_x = token_maps.total([maps[n + j * n + k] * total[k] for k in range(n)])
                r.d_streams[j, rows, lanes] = d_x.astype(r.d_streams.dtype)
                for k in range(n):
                    shared.add_lanes(r.map_sums, (n + j * n + k, rows), x * total[k])


def _write_map_gradients(r: types.SimpleNamespace) -> None:
    """d_maps from the sums, whose lanes are still to be added; pre has no part in `post`."""
    n = r.streams.shape[0]
    sums = {n + i: _lane_sum(r.map_sums[i]) for i in range(n + n * n)}
    r.d_maps[...] = _place(sums)[:, : r.d_maps.shape[1]]


def _backward_body(*refs, names: tuple[str, ...], variant: Variant, channels: int, ragged_end) -> None:
    r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    _, tile, hidden = r.streams.shape
    invalid_from = lanes_valid = rows_valid = None
    if ragged_end is not None:
        invalid_from = ragged_end - pl.program_id(0) * tile
        lanes_valid = lax.broadcasted_iota(jnp.int32, (1, tile), 1) < invalid_from
        rows_valid = lax.broadcasted_iota(jnp.int32, (tile, channels), 0) < invalid_from

    x_ref = r.streams
    n = x_ref.shape[0]
    if variant.post:
        r.map_sums[...] = jnp.zeros_like(r.map_sums)
        shared.spread(r.maps[...], r.spread, n)
    if variant.pre:
        shared.load_fn(r.fn, r.parts)

        @pl.when(pl.program_id(0) == 0)
        def _():
            r.d_fn[...] = jnp.zeros_like(r.d_fn)
            if variant.norm:
                r.d_norm_weight[...] = jnp.zeros_like(r.d_norm_weight)

        if variant.post:
            x_ref = r.next_streams
            shared.chunks(hidden, channels, lambda chunk, _: shared.mix(r, chunk, channels))
        shared.spread(r.saved[...], r.gates.at[:n], 0)
        _reduce_channels(r, x_ref, variant, channels)
        # The norm's factors have no row among the maps' gradients: they ride along in `columns`.
        _maps_backward(r, x_ref, variant, lanes_valid)
        for i, column in enumerate((STREAMS_FACTOR, NORM_FACTOR, INVERSE_NORM)[: 3 if variant.norm else 1]):
            shared.spread(r.columns[...], r.gates.at[n + i : n + i + 1], column)

    def gradients(chunk, _):
        if variant.pre:
            _project_back(r, x_ref, chunk, channels, rows_valid)
        _stream_gradients(r, x_ref, chunk, channels, variant, invalid_from)

    shared.chunks(hidden, channels, gradients)
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
        d_fn; with `norm` d_norm_weight [8, D], still to be summed.
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
        scratch["spread"] = pltpu.VMEM((n + n * n, tile, LANES), jnp.float32)
        scratch["map_sums"] = pltpu.VMEM((n + n * n, tile, LANES), jnp.float32)
    if variant.pre:
        outputs["d_affine"] = jax.ShapeDtypeStruct((num_tokens, rows), jnp.float32)
        outputs["d_fn"] = jax.ShapeDtypeStruct((rows, n * hidden), jnp.float32)
        scratch["parts"] = shared.parts_shape(rows, n, hidden, streams.dtype)
        scratch["gates"] = pltpu.VMEM((n + 3, tile, LANES), jnp.float32)
        scratch["channel_sums"] = pltpu.VMEM((2 * n + 2 if variant.norm else n, tile, LANES), jnp.float32)
        scratch["columns"] = pltpu.VMEM((tile, LANES), jnp.float32)
        scratch["lines"] = pltpu.VMEM((LANES, tile), jnp.float32)
        scratch["d_scores"] = pltpu.VMEM((rows, tile), jnp.float32)
        scratch["through_scores"] = pltpu.VMEM((n, tile, channels), jnp.float32)
        if variant.post:
            scratch["next_streams"] = pltpu.VMEM((n, tile, hidden), streams.dtype)
    if variant.norm:
        outputs["d_norm_weight"] = jax.ShapeDtypeStruct((SUBLANES, hidden), jnp.float32)
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
