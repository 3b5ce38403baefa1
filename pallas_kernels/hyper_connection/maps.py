"""The per-token maps inside the kernels: lists of float32 [1, tokens] rows, one row a number of a token.

Tokens lie on the lanes and every entry of the N x N matrix is an array of its own, so that sums over rows and
columns are plain additions: no reduction across lanes or sublanes, whatever the axis.
"""

import functools

import jax
import jax.numpy as jnp

Rows = list[jax.Array]


def total(terms: Rows) -> jax.Array:
    """Pairwise: the chain of additions is as short as it can be."""
    if len(terms) == 1:
        return terms[0]
    half = (len(terms) + 1) // 2
    return total(terms[:half]) + total(terms[half:])


def scale_index(row: int, num_streams: int) -> int:
    """Which of the three scales a row of scores has: pre, post or comb."""
    return min(row // num_streams, 2)


def gates(affine: Rows, hc_eps: float) -> Rows:
    """sigmoid(a) + eps."""
    return [jax.nn.sigmoid(a) + hc_eps for a in affine]


def gates_backward(affine: Rows, d_gates: Rows, factor: float) -> Rows:
    """Of factor * sigmoid(a)."""
    sigmoids = [jax.nn.sigmoid(a) for a in affine]
    return [factor * d * s * (1 - s) for d, s in zip(d_gates, sigmoids, strict=True)]


def _lines(n: int, axis: str) -> list[list[int]]:
    """Indices j * n + k that are normalised together."""
    if axis == "rows":
        return [[j * n + k for k in range(n)] for j in range(n)]
    return [[j * n + k for j in range(n)] for k in range(n)]


def _normalise(mix: Rows, n: int, axis: str, eps: float) -> tuple[Rows, Rows]:
    """mix / (sum + eps) along `axis`, with one reciprocal a line, which is returned too."""
    out, inverses = list(mix), []
    for line in _lines(n, axis):
        inverse = 1.0 / (total([mix[i] for i in line]) + eps)
        inverses.append(inverse)
        for i in line:
            out[i] = mix[i] * inverse
    return out, inverses


def _normalise_backward(d_out: Rows, out: Rows, inverses: Rows, n: int, axis: str) -> Rows:
    """d_in = (d_out - sum(d_out * out)) / (sum + eps)."""
    d_in = list(d_out)
    for line, inverse in zip(_lines(n, axis), inverses, strict=True):
        along = total([d_out[i] * out[i] for i in line])
        for i in line:
            d_in[i] = (d_out[i] - along) * inverse
    return d_in


def _softmax(logits: Rows, n: int) -> Rows:
    """Of every row of the matrix."""
    exponentials = list(logits)
    for line in _lines(n, "rows"):
        highest = functools.reduce(jnp.maximum, [logits[i] for i in line])
        for i in line:
            exponentials[i] = jnp.exp(logits[i] - highest)
    return _normalise(exponentials, n, "rows", 0.0)[0]


def sinkhorn_start(logits: Rows, n: int, eps: float) -> tuple[jax.Array, ...]:
    """Row softmax + eps, columns: the first of the column normalisations."""
    return tuple(_normalise([p + eps for p in _softmax(logits, n)], n, "columns", eps)[0])


def sinkhorn_step(mix: tuple[jax.Array, ...], n: int, eps: float) -> tuple[jax.Array, ...]:
    """Rows, then columns."""
    return tuple(_normalise(_normalise(list(mix), n, "rows", eps)[0], n, "columns", eps)[0])


def sinkhorn_keep(logits: Rows, n: int, num_iters: int, eps: float, kept_ref) -> None:
    """What every step of the iteration gives, to kept_ref: f32[2 * num_iters, >= n * n + n, tokens]."""

    def keep(step, mix, inverses=()):
        for i, row in enumerate([*mix, *inverses]):
            kept_ref[step, i : i + 1, :] = row

    softmax = _softmax(logits, n)
    keep(0, softmax)
    mix, inverses = _normalise([p + eps for p in softmax], n, "columns", eps)
    keep(1, mix, inverses)

    def iterate(t, mix):
        mix, inverses = _normalise(list(mix), n, "rows", eps)
        keep(2 * t, mix, inverses)
        mix, inverses = _normalise(mix, n, "columns", eps)
        keep(2 * t + 1, mix, inverses)
        return tuple(mix)

    jax.lax.fori_loop(1, num_iters, iterate, tuple(mix))


def sinkhorn_backward(d_mix: Rows, n: int, num_iters: int, kept_ref) -> Rows:
    """The gradient of the logits from the steps that `sinkhorn_keep` kept."""

    def step_back(step, d_mix, axis):
        out = [kept_ref[step, i : i + 1, :] for i in range(n * n)]
        inverses = [kept_ref[step, i : i + 1, :] for i in range(n * n, n * n + n)]
        return _normalise_backward(d_mix, out, inverses, n, axis)

    def iterate(i, d_mix):
        t = num_iters - 1 - i
        d_mix = step_back(2 * t + 1, list(d_mix), "columns")
        return tuple(step_back(2 * t, d_mix, "rows"))

    d_mix = list(jax.lax.fori_loop(0, num_iters - 1, iterate, tuple(d_mix)))
    d_mix = step_back(1, d_mix, "columns")
    softmax = [kept_ref[0, i : i + 1, :] for i in range(n * n)]
    # d_logits = p (d - sum(d p)): a normalisation whose inverse is p.
    d_logits = list(d_mix)
    for line in _lines(n, "rows"):
        along = total([d_mix[i] * softmax[i] for i in line])
        for i in line:
            d_logits[i] = softmax[i] * (d_mix[i] - along)
    return d_logits
