"""Public entry points of the family: contracts, dispatch, custom VJP. No tiling here.

One sublayer is `pre`, the sublayer itself, `post`; between two sublayers `post_pre` does both in one sweep
over the streams. `collapse` ends the model. All four share one forward and one backward kernel.
Token axes may be empty; nothing is what the reference, too, makes of no tokens.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.hyper_connection import kernel_tpu, kernel_tpu_backward, reference, tuning
from pallas_kernels.hyper_connection.kernel_tpu import Variant
from pallas_kernels.hyper_connection.maps import scale_index
from pallas_kernels.hyper_connection.stream_maps import StreamMaps, columns, of_columns
from pallas_kernels.sizes import not_empty
from pallas_kernels.splits import Splits

Impl = Literal["pallas", "reference"]


def pre(
    streams: Float[Array, "*tokens N D"],
    fn: Float32[Array, "rows N D"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    norm_weight: Float32[Array, "D"],
    *,
    num_iters: int,
    hc_eps: float,
    norm_eps: float,
    impl: Impl = "pallas",
    blocks: tuning.HyperConnectionBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "*tokens D"], StreamMaps]:
    """The normalised input of a sublayer and its per-token maps, from the residual streams.

    Equation (DeepSeek-V4 report, section 2.2, with the eps terms of the released model):
        z    = (v fn^T) / sqrt(mean(v^2) + norm_eps),   v = X[0], ..., X[N - 1] behind one another
        a    = z scale + base,   scale[0] for the N rows of pre, [1] of post, [2] for the N^2 of comb
        pre  = sigmoid(a) + hc_eps,   post = 2 sigmoid(a)
        comb = (columns rows)^(num_iters - 1) columns (softmax_rows(a) + hc_eps)
        rows(C)[j, k] = C[j, k] / (sum_k C[j, k] + hc_eps),   columns likewise over j
        x    = norm_weight RMSNorm(sum_j pre[j] X[j])

    Args:
        streams: [..., N, D] in the compute dtype, bfloat16 or float32; N = 4, D = 4096 or 7168 in V4.
        fn: f32[rows, N, D], rows = 2 N + N^2 (24): pre, post, comb row-major in [j, k].
        base: f32[rows].
        scale: f32[3].
        norm_weight: f32[D] of the sublayer's RMSNorm.
        num_iters: column normalisations in total, >= 1 (20 in V4).
        hc_eps: dimensionless, > 0 (1e-6 in V4).
        norm_eps: dimensionless, in both RMS (1e-6 in V4).
        impl: "pallas" (TPU) or "reference". There is no silent fallback.
        blocks: tile sizes; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        x [..., D] in the dtype of `streams`, and the maps for `post`.

    Numerics: float32 throughout; the weighted sum is rounded to the dtype of the streams before its RMSNorm,
        as in the model. With bfloat16 streams the projection is exact up to the order of its float32 sum
        (`fn` is split into three bfloat16 parts). Sinkhorn multiplies by one reciprocal a line instead of
        dividing every entry. Maps are within 1e-5 of the reference, x within 1e-5 (float32) or one rounding
        of h and one of x (bfloat16).
    Gradients: w.r.t. all arrays; float32 sums, rounded once. Saves the operands and f32[tokens, 128] (maps,
        scores, RMS); Sinkhorn's iterates are recomputed. Gradients of weights are summed over the tokens in
        order: deterministic. With bfloat16 streams the scores' gradient enters d_streams with 16 bits.
    Cost: per token 2 N D (rows + 2) + 6 D FLOP and (N + 1) D s bytes of HBM (s the item size; 10 D in V4) and
        4 rows; backward N D (4 rows + 14) FLOP and (2 N + 1) D s bytes. Once a call fn: 4 rows N D bytes,
        twice in the backward pass. VMEM: `tuning.HyperConnectionBlocks.vmem_bytes`.
    Sharding: `SPLITS`. Sum the gradients of the weights over the devices.
    Raises:
        ValueError: for shapes that do not fit, D no multiple of 128 or N > 6 with "pallas", num_iters < 1, an
            unknown impl; all problems at once.
    """
    weights = dict(fn=fn, base=base, scale=scale, norm_weight=norm_weight)
    settings = dict(num_iters=num_iters, hc_eps=hc_eps, norm_eps=norm_eps)
    _check("pre", dict(streams=streams, **weights), impl=impl, num_iters=num_iters)
    if impl == "reference" or streams.size == 0:
        return reference.pre_reference(streams, *weights.values(), **settings)
    variant = Variant(post=False, pre=True, norm=True, **settings)
    out = _run(variant, dict(streams=streams, **weights), blocks, interpret)
    return out["sublayer"], of_columns(out["next_maps"], streams.shape[-2])


def post(
    streams: Float[Array, "*tokens N D"],
    update: Float[Array, "*tokens D"],
    maps: StreamMaps,
    *,
    impl: Impl = "pallas",
    blocks: tuning.HyperConnectionBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "*tokens N D"]:
    """Writes a sublayer's output into the residual streams and mixes them.

    Equation (DeepSeek-V4 report, section 2.2):
        X'[k] = post[k] y + sum_j comb[j, k] X[j]

    Args:
        streams: [..., N, D] X, the streams that `pre` saw.
        update: [..., D] y, the sublayer's output, in the dtype of the streams.
        maps: from `pre`; post and comb are read.
        impl: "pallas" (TPU) or "reference". There is no silent fallback.
        blocks: tile sizes; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        [..., N, D] X' in the dtype of `streams`.

    Numerics: float32 sum, one rounding; within 1e-6 (float32) or one rounding (bfloat16) of the reference.
    Gradients: w.r.t. all arrays; saves the operands only. The gradient of pre is zero.
    Cost: per token N D (2 N + 2) FLOP and (2 N + 1) D s bytes of HBM (s the item size; 18 D in V4); backward
        N D (6 N + 6) FLOP and (3 N + 2) D s bytes. VMEM: `tuning.HyperConnectionBlocks.vmem_bytes`.
    Sharding: `SPLITS`.
    Raises:
        ValueError: as `pre`.
    """
    operands = dict(streams=streams, update=update, maps=maps)
    _check("post", operands, impl=impl)
    if impl == "reference" or streams.size == 0:
        return reference.post_reference(**operands)
    variant = Variant(post=True, pre=False, norm=False)
    return _run(variant, operands, blocks, interpret)["next_streams"]


def post_pre(
    streams: Float[Array, "*tokens N D"],
    update: Float[Array, "*tokens D"],
    maps: StreamMaps,
    fn: Float32[Array, "rows N D"],
    base: Float32[Array, " rows"],
    scale: Float32[Array, "3"],
    norm_weight: Float32[Array, "D"],
    *,
    num_iters: int,
    hc_eps: float,
    norm_eps: float,
    impl: Impl = "pallas",
    blocks: tuning.HyperConnectionBlocks | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "*tokens N D"], Float[Array, "*tokens D"], StreamMaps]:
    """`post` of one sublayer and `pre` of the next, with one sweep over the streams.

    Equation (DeepSeek-V4 report, section 2.2):
        X' = post(X, y, maps);   x, maps' = pre(X', fn, base, scale, norm_weight)

    Args:
        streams: as in `post`.
        update: as in `post`.
        maps: as in `post`: those of the sublayer that gave `update`.
        fn: as in `pre`, as the rest: those of the sublayer that follows.
        base: as in `pre`.
        scale: as in `pre`.
        norm_weight: as in `pre`.
        num_iters: as in `pre`.
        hc_eps: as in `pre`.
        norm_eps: as in `pre`.
        impl: as in `pre`.
        blocks: as in `pre`.
        interpret: as in `pre`.

    Returns:
        X' [..., N, D] and x [..., D] in the dtype of `streams`, and maps'.

    Numerics: as `post`, then `pre` of the rounded X'.
    Gradients: as `pre` and `post`. X' is recomputed, not read: the backward pass reads X, y and the gradients
        of X' and x, and writes those of X and y.
    Cost: the FLOP of both; per token (2 N + 2) D s bytes of HBM (20 D in V4, against 28 D apart); backward
        (3 N + 3) D s (30 D against 54 D and the sum of two gradients of X'). VMEM:
        `tuning.HyperConnectionBlocks.vmem_bytes`.
    Sharding: `SPLITS`.
    Raises:
        ValueError: as `pre`.
    """
    operands = dict(
        streams=streams, update=update, maps=maps, fn=fn, base=base, scale=scale, norm_weight=norm_weight
    )
    settings = dict(num_iters=num_iters, hc_eps=hc_eps, norm_eps=norm_eps)
    _check("post_pre", operands, impl=impl, num_iters=num_iters)
    if impl == "reference" or streams.size == 0:
        return reference.post_pre_reference(**operands, **settings)
    out = _run(Variant(post=True, pre=True, norm=True, **settings), operands, blocks, interpret)
    return out["next_streams"], out["sublayer"], of_columns(out["next_maps"], streams.shape[-2])


def collapse(
    streams: Float[Array, "*tokens N D"],
    fn: Float32[Array, "N N D"],
    base: Float32[Array, "N"],
    scale: Float32[Array, "1"],
    *,
    hc_eps: float,
    norm_eps: float,
    impl: Impl = "pallas",
    blocks: tuning.HyperConnectionBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "*tokens D"]:
    """The head's weighted sum of the streams.

    Equation (DeepSeek-V4 report, section 2.2):
        h = sum_j (sigmoid(z_j scale + base_j) + hc_eps) X[j],   z as in `pre`

    Args:
        streams: [..., N, D] in the compute dtype, bfloat16 or float32.
        fn: f32[N, N, D], first axis j.
        base: f32[N].
        scale: f32[1].
        hc_eps: dimensionless (1e-6 in V4).
        norm_eps: dimensionless (1e-6 in V4).
        impl: "pallas" (TPU) or "reference". There is no silent fallback.
        blocks: tile sizes; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        [..., D] h in the dtype of `streams`; not normalised.

    Numerics: as `pre`.
    Gradients: as `pre`.
    Cost: per token 2 N D (N + 2) FLOP and (N + 1) D s bytes of HBM (s the item size); backward N D (4 N + 14)
        FLOP and (2 N + 1) D s bytes. VMEM: `tuning.HyperConnectionBlocks.vmem_bytes`.
    Sharding: `SPLITS`.
    Raises:
        ValueError: as `pre`.
    """
    operands = dict(streams=streams, fn=fn, base=base, scale=scale)
    _check("collapse", operands, impl=impl)
    settings = dict(hc_eps=hc_eps, norm_eps=norm_eps)
    if impl == "reference" or streams.size == 0:
        return reference.collapse_reference(**operands, **settings)
    variant = Variant(post=False, pre=True, norm=False, **settings)
    return _run(variant, operands, blocks, interpret)["sublayer"]


def _check(name: str, operands: dict, *, impl: str, num_iters: int = 1) -> None:
    """Raises with every rule the arguments break."""
    streams = operands["streams"]
    *tokens, n, hidden = streams.shape if streams.ndim >= 2 else (0, 0)
    rows = n if name == "collapse" else 2 * n + n * n
    shapes = {
        "update": (*tokens, hidden),
        "maps.pre": (n, *tokens),
        "maps.post": (n, *tokens),
        "maps.comb": (n, n, *tokens),
        "fn": (rows, n, hidden),
        "base": (rows,),
        "scale": (1,) if name == "collapse" else (3,),
        "norm_weight": (hidden,),
    }
    dtypes = dict.fromkeys(shapes, jnp.dtype("float32")) | {"update": streams.dtype}
    problems = []
    given_arrays = {key: operand for key, operand in operands.items() if key not in ("streams", "maps")}
    if "maps" in operands:
        given_arrays |= {f"maps.{key}": part for key, part in operands["maps"]._asdict().items()}
    for key, operand in given_arrays.items():
        if operand.shape != shapes[key] or operand.dtype != dtypes[key]:
            given = f"{operand.dtype}{list(operand.shape)}"
            problems.append(f"{key} {given} must be {dtypes[key]}{list(shapes[key])}")
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"num_iters={num_iters} must be at least 1": num_iters >= 1,
        f"streams {streams.shape} must be [..., N, D]": streams.ndim >= 2,
        f"streams {streams.dtype} must be bfloat16 or float32": streams.dtype in (jnp.bfloat16, jnp.float32),
        f"D={hidden} must be a multiple of {tuning.LANES}": impl != "pallas" or hidden % tuning.LANES == 0,
        f"N={n} must be at most {tuning.MAX_STREAMS}": impl != "pallas" or n <= tuning.MAX_STREAMS,
    }
    if streams.ndim >= 2:
        rules |= not_empty(N=n, D=hidden)
    problems += [rule for rule, holds in rules.items() if not holds]
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))


def _run(variant: Variant, operands: dict, blocks, interpret) -> dict:
    """Calls the kernel with one axis of tokens, streams outside of it, and undoes both."""
    *tokens, n, hidden = operands["streams"].shape
    count = 1
    for size in tokens:
        count *= size
    arranged = {
        "streams": lambda a: jnp.moveaxis(a.reshape(count, n, hidden), 1, 0),
        "update": lambda a: a.reshape(count, hidden),
        "maps": lambda maps: columns(maps).reshape(count, -1),
        "fn": lambda a: a.reshape(-1, n * hidden),
        "norm_weight": lambda a: a[None],
    }
    operands = {name: arranged.get(name, lambda a: a)(a) for name, a in operands.items()}
    out = _kernel((variant, blocks, interpret), operands)
    if "next_streams" in out:
        out["next_streams"] = jnp.moveaxis(out["next_streams"], 0, 1)
    return {name: a.reshape(*tokens, *a.shape[1:]) for name, a in out.items()}


def _blocks(static, operands: dict, *, backward: bool) -> tuning.HyperConnectionBlocks:
    variant, blocks, _ = static
    n, num_tokens, hidden = operands["streams"].shape
    rows = operands["fn"].shape[0] if variant.pre else operands["maps"].shape[1]
    itemsize = operands["streams"].dtype.itemsize
    return blocks or tuning.choose_blocks(
        num_tokens, streams=n, hidden=hidden, rows=rows, itemsize=itemsize, backward=backward
    )


def _forward(static, operands: dict, *, save: bool) -> dict:
    variant, _, interpret = static
    blocks = _blocks(static, operands, backward=False)
    return kernel_tpu.forward(operands, variant=variant, save=save, blocks=blocks, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(static, operands: dict) -> dict:
    return _forward(static, operands, save=False)


def _save(static, operands: dict):
    out = _forward(static, operands, save=static[0].pre)
    saved = {"saved": out.pop("saved")} if static[0].pre else {}
    return out, (operands, saved)


def _pull(static, residuals, d_out: dict):
    variant, _, interpret = static
    operands, saved = residuals
    blocks = _blocks(static, operands, backward=True)
    d_out = {f"d_{name}": a for name, a in d_out.items()}
    grads = kernel_tpu_backward.backward(
        operands | saved | d_out, variant=variant, blocks=blocks, interpret=interpret
    )
    if variant.pre:
        n, rows = operands["streams"].shape[0], operands["fn"].shape[0]
        d_affine = grads.pop("d_affine")
        scores = saved["saved"][:, kernel_tpu.score_rows(rows)]
        parts = jnp.array([scale_index(i, n) for i in range(rows)], jnp.int32)
        grads["d_base"] = d_affine.sum(axis=0)
        d_scale = jnp.zeros_like(operands["scale"])
        grads["d_scale"] = d_scale.at[parts].add((d_affine * scores).sum(axis=0))
    if variant.norm:
        grads["d_norm_weight"] = grads["d_norm_weight"].sum(axis=0, keepdims=True)
    return ({name: grads[f"d_{name}"] for name in operands},)


_kernel.defvjp(_save, _pull)


_WEIGHTS = {"fn": "rows N D", "base": "rows", "scale": "3"}
_STREAMS = "*tokens N D"
_MAPS = StreamMaps("N *tokens", "N *tokens", "N N *tokens")
SPLITS = {
    "pre": Splits({"streams": _STREAMS, **_WEIGHTS, "norm_weight": "D"}, ("*tokens D", _MAPS), free="tokens"),
    "post": Splits({"streams": _STREAMS, "update": "*tokens D", "maps": _MAPS}, (_STREAMS,), free="tokens"),
    "post_pre": Splits(
        {"streams": _STREAMS, "update": "*tokens D", "maps": _MAPS, **_WEIGHTS, "norm_weight": "D"},
        (_STREAMS, "*tokens D", _MAPS),
        free="tokens",
    ),
    "collapse": Splits(
        {"streams": _STREAMS, "fn": "N N D", "base": "N", "scale": "1"}, ("*tokens D",), free="tokens"
    ),
}
