"""Public entry points of the family: contracts, dispatch, custom VJP. No tiling here."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.arithmetic import cdiv, round_up
from pallas_kernels.block_matmul import kernel_tpu, reference, tuning
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.formats.sizes import FP8_BLOCK
from pallas_kernels.splits import Splits

Implementation = Literal["pallas", "reference"]


def block_matmul(
    x: Float[Array, "T GI"],
    weight: Fp8Blocks,
    *,
    groups: int = 1,
    repeat: Int32[Array, ""] | int | None = None,
    impl: Implementation = "pallas",
    blocks: tuning.MatmulBlocks | None = None,
    interpret: Any = False,
) -> Float[Array, "T GO"]:
    """Rows times an FP8 weight that is decoded tile by tile on its way to the matrix unit.

    Equation (DeepSeek-V4 report, section 3.4: FP8 weights with 128 x 128 block scales), for each group g:
        y_tgo = sum_i x_tgi W_goi,   W_oi = weight_oi * 2^(scale[o div 128, i div 128] - 127)

    Args:
        x: [T, G I] bf16 or f32; the channels of a group lie together.
        weight: as in checkpoints, elements float8_e4m3fn [G O, I] without NaN codes (I 1024 .. 16384 in V4)
            and scales u8[ceil(G O/128), ceil(I/128)] of E8M0 codes 1 .. 254, or with `repeat` a stack of such
            matrices, [R, G O, I] and [R, ...].
        groups: G, 1 but for the output projection `wo_a` (8 or 16), whose groups do not mix (section 2.3).
            With more than one, O must be a multiple or a divisor of 128.
        repeat: which matrix of the stack to use, 0 .. R - 1. The kernel reads that one where it lies; slicing
            it out of the stack would copy it.
        impl: "reference" runs plain XLA. There is no silent fallback.
        blocks: tile sizes of the kernels, in multiples of 128; None lets `tuning.choose_blocks` pick.
        interpret: passed to `pl.pallas_call`; tests set it, callers leave it alone.

    Returns:
        [T, G O] in the dtype of x. T may be 0.

    Numerics: W is formed exactly (bfloat16 holds it) and multiplied in the dtype of x; sums are float32,
        rounded once. Within 1e-5, relative to max |y|, of the reference in float32 and within one rounding
        of the result in bf16: only the order of sums differs.
    Gradients: w.r.t. x, by the same kernel with the weight's other axis summed. The weight gets none (zeros):
        FP8 weights are not trained; train a float master weight through `numerics.qat` instead.
    Cost (one group): 2 T O I FLOP. HBM bytes, with (bt, bn, bk) the blocks and b bytes a number of x:
        O I (1 + 1/32) ceil(T / bt)  +  T I b ceil(O / bn) (once if bk = I)  +  T O b
        (1/32: scales, spread to float32 rows). Up to `tuning.FEW_ROWS` bf16 rows the matrix unit takes FP8 as
        it is, 128 inputs at a time, and T O ceil(I / 128) sums are scaled; beyond, and for f32, the vector
        unit decodes O I numbers for each block of rows. VMEM: `tuning.MatmulBlocks.vmem_bytes`. Sizes that
        are no multiple of 128 cost a padded copy of the weight; released models have none.
    Sharding: `SPLITS`; G where there are groups, else O and I. Wrap in `shard_map`.
    Raises:
        ValueError: for shapes or dtypes that do not fit; all problems at once.
    """
    if problems := _matmul_problems(x, weight, groups, repeat, impl):
        raise ValueError("block_matmul: " + "; ".join(problems))
    if len(x) == 0:
        return jnp.zeros((0, weight.shape[-2]), x.dtype)
    if impl == "reference":
        if repeat is not None:
            weight = jax.tree.map(lambda stack: stack[repeat], weight)
        return reference.block_matmul_reference(x, weight, groups)
    weight, scale = weight.elements, weight.scale
    rows, columns = weight.shape[-2] // groups, weight.shape[-1]
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        if repeat is not None:  # the copy is padded, so it may as well be of one matrix
            weight, scale, repeat = weight[repeat], scale[repeat], None
        x, weight, scale = _padded(x, weight, scale, groups)
    if repeat is None:
        weight, scale, repeat = weight[None], scale[None], 0
    y = _block_matmul((groups, blocks, interpret), x, weight, scale, jnp.asarray(repeat, jnp.int32))
    return y.reshape(len(x), groups, -1)[:, :, :rows].reshape(len(x), -1)


def _padded(
    x: Float[Array, "T GI"], weight: Float[Array, "GO I"], scale: UInt8[Array, "m n"], groups: int
) -> tuple[Float[Array, "T GI"], Float[Array, "GO I"], UInt8[Array, "m n"]]:
    """The same product with O, in a group, and I filled with zeros up to multiples of 128."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    more_rows, more_columns = -rows % FP8_BLOCK, -columns % FP8_BLOCK
    weight = jnp.pad(weight.reshape(groups, rows, columns), [(0, 0), (0, more_rows), (0, more_columns)])
    x = jnp.pad(x.reshape(len(x), groups, columns), [(0, 0), (0, 0), (0, more_columns)])
    if groups > 1 and more_rows:  # several groups shared a row of scales; now each has its own
        scale = scale[np.arange(groups) * rows // FP8_BLOCK]
    return x.reshape(len(x), -1), weight.reshape(-1, columns + more_columns), scale


def _matmul_problems(x: jax.Array, blocks: Fp8Blocks, groups: int, repeat: object, impl: str) -> list[str]:
    """Every rule the arguments break."""
    weight, scale = blocks.elements, blocks.scale
    lead = () if repeat is None else weight.shape[:1]
    matrix = weight.shape[len(lead) :]
    grid = (*lead, *(cdiv(size, FP8_BLOCK) for size in matrix))
    shape = "[O, I]" if repeat is None else "a stack [R, O, I] for a repeat"
    rows = matrix[0] // groups if matrix and groups > 0 else 0
    times = "" if groups == 1 else f"{groups} "
    parts = f"into multiples or divisors of {FP8_BLOCK}"
    divides = groups == 1 or (
        rows > 0 and rows * groups == matrix[0] and 0 in (rows % FP8_BLOCK, FP8_BLOCK % rows)
    )
    rules = {
        f"impl={impl!r} must be 'pallas' or 'reference'": impl in ("pallas", "reference"),
        f"weight {weight.shape} must be {shape}, not empty": len(matrix) == 2 and weight.size > 0,
        f"groups={groups} must divide the outputs of weight {weight.shape} {parts}": divides,
        f"x {x.shape} must be [T, {times}I] with I of weight {weight.shape}": x.ndim == 2
        and x.shape[1] == groups * weight.shape[-1],
        f"scale {scale.shape} must be {grid}, one for every {FP8_BLOCK} x {FP8_BLOCK} block": scale.shape
        == grid,
        f"x {x.dtype} must be bfloat16 or float32": x.dtype in (jnp.bfloat16, jnp.float32),
        f"weight {weight.dtype} must be float8_e4m3fn": weight.dtype == jnp.float8_e4m3fn,
        f"scale {scale.dtype} must be uint8": scale.dtype == jnp.uint8,
    }
    return [rule for rule, holds in rules.items() if not holds]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_matmul(static, x, weight, scale, repeat):
    return _run("output", static, x, weight, scale, repeat)


def _save(static, x, weight, scale, repeat):
    return _block_matmul(static, x, weight, scale, repeat), (weight, scale, repeat)


def _pull(static, saved, dy):
    weight, scale, repeat = saved
    return _run("input", static, dy, weight, scale, repeat), jnp.zeros_like(weight), None, None


_block_matmul.defvjp(_save, _pull)


def _run(axis: kernel_tpu.Axis, static, x, weight, scale, repeat):
    groups, blocks, interpret = static
    if blocks is None:
        sizes = weight.shape[1] // groups, weight.shape[2]
        outer, summed = sizes if axis == "output" else sizes[::-1]
        blocks = tuning.choose_blocks(round_up(x.shape[0], 8), outer, summed, x.dtype.itemsize)
    operands = (
        x,
        weight,
        scale[repeat],
        repeat,
    )  # scales are 1/16384 of the weight: slicing them costs nothing
    how = {"groups": groups, "blocks": blocks, "interpret": interpret}
    if axis == "output" and x.dtype == jnp.bfloat16 and x.shape[0] <= tuning.FEW_ROWS:
        return kernel_tpu.block_matmul_few_rows(*operands, **how)
    return kernel_tpu.block_matmul_forward(*operands, axis=axis, **how)


SPLITS = {
    "block_matmul": Splits(
        arguments={"x": "T G*I", "weight": "*R G*O I", "repeat": ""},
        results=("T G*O",),
        free="T G O",
        summed="I",
        multiples={"O": 128, "I": 128},
    ),
}
