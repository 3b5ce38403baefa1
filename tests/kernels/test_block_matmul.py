"""`block_matmul`: values, gradients, ragged sizes, lowering, compiling at V4's shapes."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.block_matmul import (
    block_matmul,
)
from pallas_kernels.block_matmul.tuning import FEW_ROWS, VMEM_BUDGET, MatmulBlocks, choose_blocks
from pallas_kernels.chips import CHIPS
from pallas_kernels.formats.blocks import Fp8Blocks
from tests.kernels.ahead_of_time import compile_for
from tests.kernels.checks import STRICT, assert_close

run = jax.jit(block_matmul, static_argnames=("groups", "impl", "blocks", "interpret"))
SMALL = MatmulBlocks(rows=8, outer=128, summed=128)
# T, O, I; bfloat16 rows beyond FEW_ROWS take another kernel.
SIZES = [(1, 1, 1), (3, 130, 100), (17, 256, 384), (24, 300, 129), (FEW_ROWS + 3, 256, 384)]
BOUND = {"float32": 1e-5, "bfloat16": 2.0**-8}  # the order of sums; one rounding of the result

# O, I of the FP8 layers: wq_a, wq_b, wo_b, indexer wq_b, shared gate and up, shared down.
FLASH = [(1024, 4096), (32768, 1024), (4096, 8192), (8192, 1024), (4096, 4096), (4096, 2048)]
PRO = [(1536, 7168), (65536, 1536), (7168, 16384), (8192, 1536), (6144, 7168), (7168, 3072)]


def operands(tokens, outputs, inputs, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((tokens, inputs)), dtype)
    codes = rng.integers(0, 0x7F, (outputs, inputs)) | rng.integers(0, 2, (outputs, inputs)) << 7
    weight = jnp.asarray(codes, jnp.uint8).view(jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.integers(110, 124, (cdiv(outputs, 128), cdiv(inputs, 128))), jnp.uint8)
    return x, weight, scale


def check(got, want, dtype):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert_close(got, want, BOUND[dtype])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_matches_torch(size):
    x, weight, scale = operands(*size)
    plain = torch.tensor(np.asarray(weight).view(np.uint8)).view(torch.float8_e4m3fn).double()
    factor = torch.tensor(2.0 ** (np.asarray(scale, np.float64) - 127))
    factor = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)[: size[1], : size[2]]
    want = torch.tensor(np.asarray(x, np.float64)) @ (plain * factor).T
    check(
        run(x, Fp8Blocks(weight, scale), impl="reference"), jnp.asarray(want.numpy(), jnp.float32), "float32"
    )


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(size, dtype):
    x, weight, scale = operands(*size, dtype)
    call = functools.partial(run, x, Fp8Blocks(weight, scale))
    check(call(blocks=SMALL, interpret=True), call(impl="reference"), dtype)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("blocks", [MatmulBlocks(16, 256, 128), MatmulBlocks(8, 128, 384), None], ids=str)
def test_blocks_need_not_be_square(blocks, dtype):
    """Several scales of a weight in one step, along outputs and along inputs; bfloat16 takes few rows."""
    x, weight, scale = operands(17, 256, 384, dtype)
    call = functools.partial(run, x, Fp8Blocks(weight, scale))
    check(call(blocks=blocks, interpret=True), call(impl="reference"), dtype)


def test_nothing_uninitialised_is_read():
    x, weight, scale = operands(17, 300, 129)
    check(run(x, Fp8Blocks(weight, scale), blocks=SMALL, interpret=STRICT),
          run(x, Fp8Blocks(weight, scale), impl="reference"), "float32")  # fmt: skip


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_of_the_rows(size, dtype):
    x, weight, scale = operands(*size, dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((size[0], size[1])), dtype)

    @functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
    def pulled(x, dy, weight, **options):
        return jax.vjp(lambda x: block_matmul(x, weight, **options), x)[1](dy)[0]

    given = x, dy, Fp8Blocks(weight, scale)
    check(pulled(*given, blocks=SMALL, interpret=True), pulled(*given, impl="reference"), dtype)


# T, G, O and I of a group: one tile a group, several tiles, and groups that share a row of scales.
GROUPED = [(5, 3, 128, 128), (17, 2, 256, 384), (9, 6, 64, 100), (FEW_ROWS + 3, 2, 128, 256)]


def stacked(tokens, groups, outputs, inputs, dtype, repeats=3):
    """x [T, G I], and a stack of weights and scales that all differ."""
    parts = [operands(1, groups * outputs, inputs, dtype, seed) for seed in range(repeats)]
    x = operands(tokens, 1, groups * inputs, dtype, 9)[0]
    return x, *(jnp.stack(arrays) for arrays in list(zip(*parts, strict=True))[1:])


@pytest.mark.parametrize("size", GROUPED, ids=str)
def test_grouped_reference_matches_torch(size):
    tokens, groups, outputs, inputs = size
    x, weight, scale = (a[1] if a.ndim == 3 else a for a in stacked(*size, "float32"))
    plain = torch.tensor(np.asarray(weight).view(np.uint8)).view(torch.float8_e4m3fn).double()
    factor = torch.tensor(2.0 ** (np.asarray(scale, np.float64) - 127))
    factor = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)[: groups * outputs, :inputs]
    by_group = torch.tensor(np.asarray(x, np.float64)).reshape(tokens, groups, inputs)
    parts = zip(by_group.unbind(1), (plain * factor).chunk(groups), strict=True)
    want = torch.cat([mine @ matrix.T for mine, matrix in parts], dim=1)
    got = run(x, Fp8Blocks(weight, scale), groups=groups, impl="reference")
    check(got, jnp.asarray(want.numpy(), jnp.float32), "float32")


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", GROUPED, ids=str)
def test_groups_and_stacks_match_the_reference_forward_and_backward(size, dtype):
    x, weight, scale = stacked(*size, dtype)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal((size[0], size[1] * size[2])), dtype)

    @functools.partial(jax.jit, static_argnames=("impl", "blocks", "interpret"))
    def both(x, repeat, **options):
        call = functools.partial(block_matmul, groups=size[1], repeat=repeat, **options)
        y, pull = jax.vjp(lambda x: call(x, Fp8Blocks(weight, scale)), x)
        return y, pull(dy)[0]

    for repeat in (2, 0):
        got = both(x, jnp.int32(repeat), blocks=SMALL, interpret=True)
        for mine, theirs in zip(got, both(x, jnp.int32(repeat), impl="reference"), strict=True):
            check(mine, theirs, dtype)


def test_a_grouped_stack_reads_nothing_uninitialised():
    x, weight, scale = stacked(9, 2, 128, 256, "bfloat16")
    how = {"groups": 2, "repeat": 1}
    check(run(x, Fp8Blocks(weight, scale), blocks=SMALL, interpret=STRICT, **how),
          run(x, Fp8Blocks(weight, scale), impl="reference", **how), "bfloat16")  # fmt: skip


def test_problems_are_named_together():
    x, weight, scale = operands(4, 256, 256)
    with pytest.raises(ValueError) as raised:
        block_matmul(x[:, :5].astype(jnp.int32), Fp8Blocks(weight, scale[:1]), impl="xla")
    for part in ("impl='xla'", "must be [T, I]", "one for every 128 x 128", "x int32"):
        assert part in str(raised.value)
    for groups, outputs in ((3, 256), (2, 96), (0, 256)):
        with pytest.raises(ValueError, match=f"groups={groups} must divide"):
            block_matmul(x, Fp8Blocks(weight[:outputs], scale[: cdiv(outputs, 128)]), groups=groups)
    with pytest.raises(ValueError, match=r"must be a stack \[R, O, I\] for a repeat"):
        block_matmul(x, Fp8Blocks(weight, scale), repeat=0)
    for wrong in (dict(rows=7), dict(outer=64), dict(summed=0)):
        with pytest.raises(ValueError, match="must be a positive multiple"):
            MatmulBlocks(**(dict(rows=8, outer=128, summed=128) | wrong))


@pytest.mark.parametrize("tokens", [8, 64, 2048])
def test_chosen_blocks_fit_every_chip(tokens):
    for outputs, inputs in FLASH + PRO:
        for outer, summed in ((outputs, inputs), (inputs, outputs)):
            blocks = choose_blocks(tokens, outer, summed, 2)
            assert outer % blocks.outer == summed % blocks.summed == 0
            assert blocks.vmem_bytes(2) <= VMEM_BUDGET < min(chip.vmem_bytes for chip in CHIPS.values())
            assert blocks.rows <= max(8, tokens)


def shapes(tokens, outputs, inputs, dtype="bfloat16"):
    return (
        jax.ShapeDtypeStruct((tokens, inputs), dtype),
        jax.ShapeDtypeStruct((outputs, inputs), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((outputs // 128, inputs // 128), jnp.uint8),
    )


def wo_a(x, weight, scale, repeat):
    return block_matmul(x, Fp8Blocks(weight, scale), groups=8, repeat=repeat)


def stack_shapes(tokens, repeats=4):
    """V4-Flash's wo_a: 8 groups of [1024, 4096]."""
    x, weight, scale = shapes(tokens, 8192, 4096)
    x = jax.ShapeDtypeStruct((tokens, 8 * 4096), x.dtype)
    stacks = (jax.ShapeDtypeStruct((repeats, *a.shape), a.dtype) for a in (weight, scale))
    return x, *stacks, jax.ShapeDtypeStruct((), jnp.int32)


def both(x, weight, scale):
    y, pull = jax.vjp(lambda x: block_matmul(x, Fp8Blocks(weight, scale)), x)
    return y, pull(y)


@pytest.mark.parametrize("dtype", BOUND)
def test_lowers_to_mosaic(dtype):
    exported = export.export(jax.jit(both), platforms=["tpu"])(*shapes(64, 512, 1024, dtype))
    text = exported.mlir_module()
    assert text.count("tpu_custom_call") == 2 and "block_matmul_input" in text


def test_compiles_for_v6e():
    compile_for("v6e", both, *shapes(64, *FLASH[1]))
    program = compile_for("v6e", wo_a, *stack_shapes(64)).as_text()
    # The matrix is read where it lies: nothing that holds one in FP8 is made.
    assert not re.search(r"= f8e4m3fn\[(1,)?8192,4096\]", program)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_chip(chip, model, tokens):
    for size in {"flash": FLASH, "pro": PRO}[model]:
        compile_for(chip, both, *shapes(tokens, *size))
