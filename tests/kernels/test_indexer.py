"""The lightning indexer: values, exact choice, gradients, race freedom, compiling for TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.indexer import index_scores, index_select
from pallas_kernels.indexer.reference import index_select_reference
from pallas_kernels.indexer.tuning import IndexerBlocks, choose_blocks
from tests.kernels.ahead_of_time import CHIPS, compile_for

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and blocks small enough for several steps along every axis."""

    batch: int
    length: int
    size: int
    blocks: IndexerBlocks
    heads: int = 3
    width: int = 16

    def operands(self, dtype="float32", seed=0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
        q = draw(self.batch, self.length, self.heads, self.width)
        weights = draw(self.batch, self.length, self.heads).astype(jnp.float32)
        keys = draw(self.batch, self.size, self.width)
        lo = rng.integers(0, self.size // 3 + 1, (self.batch, self.length))
        hi = np.minimum(lo + rng.integers(0, self.size + 1, lo.shape), self.size)
        hi[0, 0] = lo[0, 0]  # a query that sees nothing
        return q, weights, keys, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


CASES = {
    "chunk": Case(2, 19, 300, IndexerBlocks(1, 8, 128)),
    "decode": Case(11, 1, 200, IndexerBlocks(8, 1, 128)),
    "drafts": Case(5, 3, 130, IndexerBlocks(8, 3, 128)),
    "fewer keys than a tile": Case(1, 9, 5, IndexerBlocks(1, 16, 128)),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_reference_equals_torch(name):
    q, weights, keys, lo, hi = CASES[name].operands()
    tq, tw, tk = (torch.from_numpy(np.array(x)).double() for x in (q, weights, keys))
    want = torch.zeros(*lo.shape, keys.shape[1], dtype=torch.float64)
    for h in range(q.shape[2]):
        want += tw[:, :, h, None] * torch.matmul(tq[:, :, h], tk.transpose(1, 2)).clamp(min=0)
    s = np.arange(keys.shape[1])
    outside = (s < np.asarray(lo)[..., None]) | (s >= np.asarray(hi)[..., None])
    want[torch.from_numpy(outside)] = -torch.inf
    np.testing.assert_allclose(
        index_scores(q, weights, keys, lo, hi, impl="reference"), want.numpy(), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_scores_equal_the_reference(name, dtype):
    case = CASES[name]
    operands = case.operands(dtype)
    got = index_scores(*operands, blocks=case.blocks, interpret=True)
    want = index_scores(*operands, impl="reference")
    assert np.isneginf(want).any() and np.isfinite(want).any()
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def whole_numbers(operands):
    """The same operands rounded: sums are then exact in any order, and full of ties."""
    return *(jnp.round(x) for x in operands[:3]), *operands[3:]


@pytest.mark.parametrize("k", [1, 7, 64, 400])
@every_case
def test_choice_is_exact(name, k):
    case = CASES[name]
    operands = whole_numbers(case.operands())
    got = np.asarray(index_select(*operands, k, blocks=case.blocks, interpret=True))
    want = np.asarray(index_select(*operands, k, impl="reference"))
    np.testing.assert_array_equal(got, want)
    visible = np.maximum(np.asarray(operands[4]) - np.asarray(operands[3]), 0)
    np.testing.assert_array_equal(got.sum(-1), np.minimum(visible, k))


def test_reference_choice_by_hand():
    scores = np.array([[[1, 3, 3, -np.inf, 2, 3, np.nan, -0.0, 0.0]]], np.float32)
    best_first = [1, 2, 5, 4, 0, 7, 8]
    for k in range(1, 10):
        got = np.flatnonzero(index_select_reference(jnp.asarray(scores), k)[0, 0])
        np.testing.assert_array_equal(got, sorted(best_first[:k]))


def test_nan_and_infinite_scores():
    case = CASES["chunk"]
    q, weights, keys, lo, hi = whole_numbers(case.operands())
    keys = keys.at[0, 40:60].set(jnp.nan).at[1, 3].set(jnp.inf)
    lo, hi = jnp.zeros_like(lo), jnp.full_like(hi, case.size)
    got = index_select(q, weights, keys, lo, hi, 50, blocks=case.blocks, interpret=True)
    want = index_select(q, weights, keys, lo, hi, 50, impl="reference")
    np.testing.assert_array_equal(got, want)
    assert not np.asarray(got)[0, :, 40:60].any()


@pytest.mark.parametrize("name", ["chunk", "decode"])
def test_no_races_and_no_uninitialised_memory(name):
    case = CASES[name]
    operands = whole_numbers(case.operands())
    run = functools.partial(index_select, *operands, 20)
    np.testing.assert_array_equal(run(blocks=case.blocks, interpret=STRICT), run(impl="reference"))

    def loss(q, weights, keys, **how):
        scores = index_scores(q, weights, keys, *operands[3:], **how)
        return jnp.where(jnp.isfinite(scores), jnp.sin(scores), 0).sum()

    got = jax.grad(loss, (0, 1, 2))(*operands[:3], blocks=case.blocks, interpret=STRICT)
    want = jax.grad(loss, (0, 1, 2))(*operands[:3], impl="reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# bf16: a product's gradient is rounded to bf16 (2^-9 relative) before a sum of up to a few hundred terms.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@every_case
def test_gradients(name, dtype, tolerance):
    case = CASES[name]
    q, weights, keys, lo, hi = case.operands(dtype)
    pull = np.random.default_rng(1).standard_normal((case.batch, case.length, case.size), np.float32)

    def loss(q, weights, keys, **how):
        scores = index_scores(q, weights, keys, lo, hi, **how)
        return jnp.where(jnp.isfinite(scores), scores * pull, 0).sum()

    got = jax.grad(loss, (0, 1, 2))(q, weights, keys, blocks=case.blocks, interpret=True)
    want = jax.grad(loss, (0, 1, 2))(q, weights, keys, impl="reference")
    for a, b, operand in zip(got, want, (q, weights, keys), strict=True):
        assert a.dtype == operand.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_later_tokens_and_hidden_keys_change_no_bit():
    case = CASES["chunk"]
    q, weights, keys, lo, hi = case.operands()
    run = functools.partial(index_scores, blocks=case.blocks, interpret=True)
    before = np.asarray(run(q, weights, keys, lo, hi))
    first = int(hi[:, :7].max())
    after = run(q.at[:, 7:].set(9), weights.at[:, 7:].set(9), keys.at[:, first:].set(9), lo, hi)
    np.testing.assert_array_equal(before[:, :7], np.asarray(after)[:, :7])


def test_errors_name_every_problem():
    q, weights, keys, lo, hi = CASES["chunk"].operands()
    with pytest.raises(ValueError, match=r"k=0 .*; weights .*; lo .*dtype of q"):
        index_select(q, weights[:, 1:], keys.astype(jnp.bfloat16), lo[:1], hi, 0)
    with pytest.raises(ValueError, match="share a step only with all"):
        index_scores(q, weights, keys, lo, hi, blocks=IndexerBlocks(8, 1, 128), interpret=True)
    with pytest.raises(ValueError, match="multiple of 8.*multiple of 128"):
        IndexerBlocks(1, 3, 100)


def test_chosen_blocks_fit():
    for length, size in ((1, 1), (1, 2**18), (4, 2**14), (2048, 2**14), (2048, 2**18)):
        blocks = choose_blocks(length, 64, 128, size, 2, vmem_budget=24 * 2**20)
        assert blocks.vmem_bytes(64, 128, size, 2) <= 24 * 2**20
    with pytest.raises(ValueError, match="no legal block fits"):
        choose_blocks(2048, 64, 128, 2**22, 2, vmem_budget=24 * 2**20)


# ---- compiling for TPUs ------------------------------------------------------------------------------------

REAL = {
    "decode 64 at 64K": (64, 1, 2**14),
    "decode 64 at 1M": (64, 1, 2**18),
    "chunk 2048 at 8K": (1, 2048, 2**11),
    "chunk 2048 at 64K": (1, 2048, 2**14),
}
TOP_K = {"flash": 512, "pro": 1024}


def real_shapes(batch, length, size):
    of = jax.ShapeDtypeStruct
    return (
        of((batch, length, 64, 128), jnp.bfloat16),
        of((batch, length, 64), jnp.float32),
        of((batch, size, 128), jnp.bfloat16),
        of((batch, length), jnp.int32),
        of((batch, length), jnp.int32),
    )


def select(*operands, k=512):
    return index_select(*operands, k)


def gradients(q, weights, keys, lo, hi):
    def loss(*trained):
        scores = index_scores(*trained, lo, hi)
        return jnp.where(jnp.isfinite(scores), scores, 0).sum()

    return jax.grad(loss, (0, 1, 2))(q, weights, keys)


@pytest.mark.parametrize("function", [select, gradients])
def test_lowers_to_mosaic(function):
    module = export.export(jax.jit(function), platforms=["tpu"], disabled_checks=[MOSAIC_CALL])(
        *real_shapes(1, 100, 1000)
    )
    assert "tpu_custom_call" in module.mlir_module()


def test_compiles_for_a_tpu():
    compile_for("v6e", select, *real_shapes(*REAL["decode 64 at 64K"]))
    compile_for("v6e", gradients, *real_shapes(*REAL["chunk 2048 at 8K"]))


@pytest.mark.slow
@pytest.mark.parametrize("model", TOP_K)
@pytest.mark.parametrize("work", REAL)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_tpu(chip, work, model):
    compile_for(chip, functools.partial(select, k=TOP_K[model]), *real_shapes(*REAL[work]))
    if model == "flash" and "chunk" in work:  # both models have the same indexer but for k
        compile_for(chip, gradients, *real_shapes(*REAL[work]))
