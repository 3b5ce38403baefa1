"""Public entry points of the family: contracts, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.arithmetic import cdiv, round_up
from pallas_kernels.block_matmul import kernel_tpu, reference, tuning
from pallas_kernels.low_precision import BLOCK

Implementation = Literal["pallas", "reference"]


def block_matmul(
    x: Float[Array, "T I"],
    weight: Float[Array, "O I"],
    scale: UInt8[Array, "O_blocks I_blocks"],
    *,
    impl: Implementation = "pallas",
    blocks: tuning.MatmulBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "T O"]:
    """Rows times an FP8 weight that is decoded tile by tile on its way to the matrix unit.

    Equation (DeepSeek-V4 report, section 3.4: FP8 weights with 128 x 128 block scales):
        y_to = sum_i x_ti W_oi,   W_oi = weight_oi * 2^(scale[o div 128, i div 128] - 127)

    Args:
        x: [T, I] bf16 or f32.
        weight: float8_e4m3fn [O, I] as in checkpoints, no NaN codes (I 1024 .. 16384 in V4).
        scale: u8[ceil(O/128), ceil(I/128)] E8M0 codes 1 .. 254.
        impl: "reference" runs plain XLA. There is no silent fallback.
        blocks: tile sizes of the kernels, in multiples of 128; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        [T, O] in the dtype of x.

    Numerics: W is formed exactly (bfloat16 holds it) and multiplied in the dtype of x; sums are float32,
        rounded once. Within 1e-5, relative to max |y|, of the reference in float32 and within one rounding
        of the result in bf16: only the order of sums differs.
    Gradients: w.r.t. x, by the same kernel with the weight's other axis summed. The weight gets none (zeros):
        FP8 weights are not trained; train a float master weight through `numerics.qat` instead.
    Cost: 2 T O I FLOP. HBM bytes, with (bt, bn, bk) the blocks and b bytes a number of x:
        O I (1 + 1/32) ceil(T / bt)  +  T I b ceil(O / bn) (once if bk = I)  +  T O b
        (1/32: scales, spread to float32 rows). Up to `tuning.FEW_ROWS` bf16 rows the matrix unit takes FP8 as
        it is, 128 inputs at a time, and T O ceil(I / 128) sums are scaled; beyond, and for f32, the vector
        unit decodes O I numbers for each block of rows. VMEM: `tuning.MatmulBlocks.vmem_bytes`. Sizes that
        are no multiple of 128 cost a padded copy of the weight; released models have none.
    Sharding: T may be split freely. O may be split at multiples of 128. I may be split at multiples of 128
        if the results are summed. Wrap in `shard_map`.
    Raises:
        ValueError: for shapes or dtypes that do not fit; all problems at once.
    """
    if problems := _matmul_problems(x, weight, scale, impl):
        raise ValueError("block_matmul: " + "; ".join(problems))
    if impl == "reference":
        return reference.block_matmul_reference(x, weight, scale)
    rows, columns = weight.shape
    more_rows, more_columns = -rows % BLOCK, -columns % BLOCK
    if more_rows or more_columns:
        weight = jnp.pad(weight, [(0, more_rows), (0, more_columns)])
        x = jnp.pad(x, [(0, 0), (0, more_columns)])
    return _block_matmul((blocks, interpret), x, weight, scale)[:, :rows]


def block_cast(
    x: Float[Array, "T C"],
    *,
    impl: Implementation = "pallas",
    rows: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T C"], UInt8[Array, "T groups"]]:
    """Activations rounded to FP8 with one scale for every 128 channels.

    Equation (DeepSeek-V4 report, section 3.4: FP8 activations with 1 x 128 scales):
        s_tg = 2^ceil(log2(max(max_c |x_tc|, 1e-4) / 448)),   q_tc = E4M3(clip(x_tc / s_tg, -448, 448))

    Args:
        x: [T, C] bf16 or f32, finite; C a multiple of 128 (D, Q and F of V4 are).
        impl: "reference" runs plain XLA. There is no silent fallback.
        rows: of a tile; None lets `tuning.choose_rows` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        float8_e4m3fn [T, C] and u8[T, C / 128] E8M0 codes.

    Numerics: bit-exact against the reference: a scale is found from the bits of a float32, the quotient by a
        power of two is exact, and the cast rounds to nearest even.
    Gradients: none; callers that train pass the gradient straight through (`numerics.qat`).
    Cost: HBM bytes T C (b + 1) + T C / 128, b bytes a number of x. VMEM about 2 rows C (b + 1 + 4).
    Sharding: T may be split freely, C at multiples of 128.
    Raises:
        ValueError: for shapes or dtypes that do not fit; all problems at once.
    """
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"x {x.shape} must be [T, C], not empty, with C a multiple of {BLOCK}": x.ndim == 2
        and x.size > 0
        and x.shape[-1] % BLOCK == 0,
        f"x {x.dtype} must be bfloat16 or float32": x.dtype in (jnp.bfloat16, jnp.float32),
    }
    if problems := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("block_cast: " + "; ".join(problems))
    if impl == "reference":
        return reference.block_cast_reference(x)
    rows = tuning.choose_rows(*x.shape, x.dtype.itemsize) if rows is None else rows
    return kernel_tpu.block_cast_forward(x, rows=rows, interpret=interpret)


def _matmul_problems(x: jax.Array, weight: jax.Array, scale: jax.Array, impl: str) -> list[str]:
    """Every rule the arguments break."""
    grid = tuple(cdiv(size, BLOCK) for size in weight.shape)
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"weight {weight.shape} must be [O, I], not empty": weight.ndim == 2 and weight.size > 0,
        f"x {x.shape} must be [T, I], not empty, with I of weight {weight.shape}": x.ndim == 2
        and x.size > 0
        and x.shape[-1:] == weight.shape[-1:],
        f"scale {scale.shape} must be {grid}, one for every {BLOCK} x {BLOCK} block": scale.shape == grid,
        f"x {x.dtype} must be bfloat16 or float32": x.dtype in (jnp.bfloat16, jnp.float32),
        f"weight {weight.dtype} must be float8_e4m3fn": weight.dtype == jnp.float8_e4m3fn,
        f"scale {scale.dtype} must be uint8": scale.dtype == jnp.uint8,
    }
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_matmul(static, x, weight, scale):
    return _run("output", static, x, weight, scale)


def _save(static, x, weight, scale):
    return _block_matmul(static, x, weight, scale), (weight, scale)


def _pull(static, saved, dy):
    weight, scale = saved
    return _run("input", static, dy, weight, scale), jnp.zeros_like(weight), None


_block_matmul.defvjp(_save, _pull)


def _run(axis: kernel_tpu.Axis, static, x, weight, scale):
    blocks, interpret = static
    if blocks is None:
        outer, summed = weight.shape if axis == "output" else weight.shape[::-1]
        blocks = tuning.choose_blocks(round_up(x.shape[0], 8), outer, summed, x.dtype.itemsize)
    if axis == "output" and x.dtype == jnp.bfloat16 and x.shape[0] <= tuning.FEW_ROWS:
        return kernel_tpu.block_matmul_few_rows(x, weight, scale, blocks=blocks, interpret=interpret)
    return kernel_tpu.block_matmul_forward(x, weight, scale, axis=axis, blocks=blocks, interpret=interpret)
