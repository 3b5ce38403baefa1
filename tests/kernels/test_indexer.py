"""The lightning indexer: values, exact choice, gradients, race freedom, compiling for TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax import export
from jax.experimental import pallas as pl

from pallas_kernels.formats import e2m1
from pallas_kernels.formats.blocks import Mxfp4
from pallas_kernels.formats.index_keys import Fp8Keys, decoded
from pallas_kernels.indexer import (
    index_list,
    index_scores,
    index_select,
    kernel_tpu_select,
    key_tiles,
)
from pallas_kernels.indexer.reference import index_select_reference
from pallas_kernels.indexer.tuning import IndexerBlocks, choose_blocks
from tests.kernels.ahead_of_time import CHIPS, compile_for
from tests.kernels.checks import STRICT

HOW = ("impl", "blocks", "interpret")
run_scores = jax.jit(index_scores, static_argnames=HOW)
run_select = jax.jit(index_select, static_argnames=(*HOW, "k"))
MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and blocks small enough for several steps along every axis."""

    batch: int
    length: int
    size: int
    blocks: IndexerBlocks
    gradient_blocks: IndexerBlocks
    heads: int = 3
    width: int = 32

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
    "chunk": Case(2, 19, 300, IndexerBlocks(1, 8, 128), IndexerBlocks(1, 16, 128)),
    "heads first": Case(1, 33, 700, IndexerBlocks(1, 16, 512, 256), IndexerBlocks(1, 8, 256)),
    "decode": Case(11, 1, 200, IndexerBlocks(8, 1, 128), IndexerBlocks(8, 1, 128)),
    "two groups": Case(35, 1, 400, IndexerBlocks(32, 1, 256, 128), IndexerBlocks(8, 1, 256)),
    "drafts": Case(5, 3, 130, IndexerBlocks(8, 3, 128), IndexerBlocks(8, 3, 128)),
    "fewer keys than a tile": Case(1, 9, 5, IndexerBlocks(1, 16, 128), IndexerBlocks(1, 16, 128)),
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
        run_scores(q, weights, keys, lo, hi, impl="reference"), want.numpy(), atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES] + [("heads first", "bfloat16"), ("two groups", "bfloat16")],
)
def test_scores_equal_the_reference(name, dtype):
    case = CASES[name]
    operands = case.operands(dtype)
    got = run_scores(*operands, blocks=case.blocks, interpret=True)
    want = run_scores(*operands, impl="reference")
    assert np.isneginf(want).any() and np.isfinite(want).any()
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def whole_numbers(operands):
    """The same operands rounded: sums are then exact in any order, and full of ties."""
    return *(jnp.round(x) for x in operands[:3]), *operands[3:]


@pytest.mark.parametrize(
    ("name", "k"),
    [("chunk", 7), ("chunk", 400), ("heads first", 64), ("two groups", 20), ("drafts", 1)]
    + [("fewer keys than a tile", 3)],
)
def test_choice_is_exact(name, k):
    case = CASES[name]
    operands = whole_numbers(case.operands())
    got = np.asarray(run_select(*operands, k, blocks=case.blocks, interpret=True))
    want = np.asarray(run_select(*operands, k, impl="reference"))
    np.testing.assert_array_equal(got, want)
    visible = np.maximum(np.asarray(operands[4]) - np.asarray(operands[3]), 0)
    np.testing.assert_array_equal(got.sum(-1), np.minimum(visible, k))


def test_choice_among_close_scores():
    """Scores that agree in their upper 16 bits, of both signs: the lower halves decide."""
    case = CASES["two groups"]
    q, weights, keys, lo, hi = case.operands()
    keys = keys[:, :1] * (1 + 1e-4 * keys)
    q = jnp.abs(q) * jnp.sign(keys[:, :1, None])
    weights = jnp.abs(weights) * jnp.where(jnp.arange(case.batch)[:, None, None] % 2, 1, -1)
    operands = q, weights, keys, lo, hi
    scores = np.asarray(run_scores(*operands, blocks=case.blocks, interpret=True))
    upper = scores.view(np.int32)[np.isfinite(scores)] >> 16
    assert (scores[np.isfinite(scores)] < 0).any()
    assert len(np.unique(upper)) < len(np.unique(scores)) / 4
    got = run_select(*operands, 30, blocks=case.blocks, interpret=True)
    np.testing.assert_array_equal(got, index_select_reference(jnp.asarray(scores), 30))


def test_integers_have_the_order_of_scores():
    """And -0 is 0: a chip may sum nothing but -0, where the interpreter starts at 0. In a compiled program,
    because XLA takes `x + 0.0` for `x`."""
    scores = jnp.asarray([-np.inf, -3e38, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38, np.inf], jnp.float32)
    steps = np.diff(np.asarray(jax.jit(kernel_tpu_select.ordered)(scores), np.int64))
    assert steps[4] == 0 and (np.delete(steps, 4) > 0).all()


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
    got = run_select(q, weights, keys, lo, hi, 50, blocks=case.blocks, interpret=True)
    # Not compiled as one program: in a fusion XLA:CPU's maximum may make 0 of NaN.
    want = index_select(q, weights, keys, lo, hi, 50, impl="reference")
    np.testing.assert_array_equal(got, want)
    assert not np.asarray(got)[0, :, 40:60].any()


@pytest.mark.parametrize("name", ["chunk", "decode"])
def test_no_races_and_no_uninitialised_memory(name):
    case = CASES[name]
    operands = whole_numbers(case.operands())
    run = functools.partial(run_select, *operands, 20)
    np.testing.assert_array_equal(run(blocks=case.blocks, interpret=STRICT), run(impl="reference"))


def test_gradients_have_no_races_and_no_uninitialised_memory():
    case = CASES["decode"]
    operands = whole_numbers(case.operands())

    def loss(q, weights, keys, **how):
        scores = index_scores(q, weights, keys, *operands[3:], **how)
        return jnp.where(jnp.isfinite(scores), jnp.sin(scores), 0).sum()

    how = {"blocks": case.blocks, "gradient_blocks": case.gradient_blocks, "interpret": STRICT}
    gradients_of = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames=(*HOW, "gradient_blocks"))
    got, want = gradients_of(*operands[:3], **how), gradients_of(*operands[:3], impl="reference")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# bf16: a product's gradient is rounded to bf16 (2^-9 relative) before a sum of up to a few hundred terms.
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("chunk", "float32", 1e-5),
        ("heads first", "bfloat16", 2e-2),
        ("decode", "bfloat16", 2e-2),
        ("drafts", "float32", 1e-5),
        ("fewer keys than a tile", "float32", 1e-5),
    ],
)
def test_gradients(name, dtype, tolerance):
    case = CASES[name]
    q, weights, keys, lo, hi = case.operands(dtype)
    pull = np.random.default_rng(1).standard_normal((case.batch, case.length, case.size), np.float32)

    def loss(q, weights, keys, **how):
        scores = index_scores(q, weights, keys, lo, hi, **how)
        return jnp.where(jnp.isfinite(scores), scores * pull, 0).sum()

    how = {"blocks": case.blocks, "gradient_blocks": case.gradient_blocks, "interpret": True}
    gradients_of = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames=(*HOW, "gradient_blocks"))
    got, want = gradients_of(q, weights, keys, **how), gradients_of(q, weights, keys, impl="reference")
    for a, b, operand in zip(got, want, (q, weights, keys), strict=True):
        assert a.dtype == operand.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def test_later_tokens_and_hidden_keys_change_no_bit():
    case = CASES["chunk"]
    q, weights, keys, lo, hi = case.operands()
    run = functools.partial(run_scores, blocks=case.blocks, interpret=True)
    before = np.asarray(run(q, weights, keys, lo, hi))
    first = int(hi[:, :7].max())
    after = run(q.at[:, 7:].set(9), weights.at[:, 7:].set(9), keys.at[:, first:].set(9), lo, hi)
    np.testing.assert_array_equal(before[:, :7], np.asarray(after)[:, :7])


# ---- quantised keys, stacks of layers, lists ---------------------------------------------------------------


def quantised(keys, form):
    """The nearest keys of a format, made with ml_dtypes: scales are powers of two for mxfp4."""
    keys = np.asarray(keys, np.float32)
    if form == "fp8":
        scales = np.abs(keys).max(-1, keepdims=True) / 448
        return Fp8Keys(jnp.asarray((keys / scales).astype(ml_dtypes.float8_e4m3fn)), jnp.asarray(scales))
    groups = keys.reshape(*keys.shape[:-1], -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6))
    codes = (groups / 2 ** exponents[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes = codes.reshape(keys.shape)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return Mxfp4(jnp.asarray(packed), jnp.asarray((exponents + 127).astype(np.uint8)))


def in_format(operands, form):
    return *operands[:2], quantised(operands[2], form), *operands[3:]


def test_every_fp8_code_decodes():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(8, 32)
    scales = np.geomspace(1e-6, 10, 8, dtype=np.float32)[:, None]
    got = decoded(Fp8Keys(jnp.asarray(codes), jnp.asarray(scales)))
    np.testing.assert_array_equal(got, codes.astype(np.float32) * scales)
    # In the kernel the matrix unit decodes: pick one number at a time, NaN apart.
    keys = np.broadcast_to(codes.reshape(-1, 1), (256, 16))
    numbers = jnp.asarray(np.where(np.isnan(keys.astype(np.float32)), 0, keys).astype(codes.dtype))
    one_hot = jnp.zeros((8, 16), jnp.bfloat16).at[0, 3].set(1)
    got = key_tiles.products(one_hot, numbers)[0]
    np.testing.assert_array_equal(got, np.asarray(numbers[:, 3], np.float32))


def test_every_mxfp4_code_decodes():
    """All bytes (pairs of codes) with all scales that the kernel promises, and NaN."""
    exponents = np.array([*range(16, 253), 255], np.uint8)  # 2^-111 .. 2^125; NaN
    size = 128 * len(exponents)
    columns = np.arange(size)
    values = ((columns % 128)[:, None] * 2 + np.arange(16) // 8 + np.arange(16) * 16).astype(np.uint8)
    assert len(np.unique(values)) == 256
    scales = exponents[columns // 128][:, None]
    low, high = ((values & 15), (values >> 4))
    codes = np.stack([low, high], -1).reshape(size, 32).astype(np.uint8)
    want = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    want = (want.astype(np.float64) * scales.view(ml_dtypes.float8_e8m0fnu)).astype(np.float32)
    np.testing.assert_array_equal(decoded(Mxfp4(jnp.asarray(values), jnp.asarray(scales))), want)

    def body(values_ref, scales_ref, out_ref):
        out_ref[...] = key_tiles.unpack(values_ref[...], scales_ref[...])

    got = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((32, size), jnp.bfloat16), interpret=True)(
        jnp.asarray(values.T), jnp.asarray(scales.T)
    )
    got = np.asarray(got, np.float32) * e2m1.OF_PLACED
    np.testing.assert_array_equal(got, np.concatenate([want[:, 0::2], want[:, 1::2]], axis=1).T)


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
@pytest.mark.parametrize(("name", "dtype"), [("heads first", "bfloat16"), ("decode", "float32")])
def test_quantised_keys(name, dtype, form):
    case = CASES[name]
    operands = in_format(case.operands(dtype), form)
    got = run_scores(*operands, blocks=case.blocks, interpret=True)
    want = run_scores(*operands, impl="reference")
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(np.asarray(want)[np.isfinite(want)]).max())
    chosen = run_select(*operands, 20, blocks=case.blocks, interpret=True)
    np.testing.assert_array_equal(chosen, index_select_reference(got, 20))


@pytest.mark.parametrize("form", ["plain", "mxfp4"])
def test_a_layer_of_a_stack(form):
    case = CASES["decode"]
    q, weights, keys, lo, hi = whole_numbers(case.operands())
    stack = jnp.stack([jnp.full_like(keys, 100), keys, jnp.full_like(keys, -7)])
    if form != "plain":
        keys, stack = quantised(keys + 0.25, form), quantised(stack + 0.25, form)
    for how in ({"blocks": case.blocks, "interpret": True}, {"impl": "reference"}):
        run = functools.partial(run_scores, **how)
        got = run(q, weights, stack, lo, hi, repeat=jnp.int32(1))
        np.testing.assert_array_equal(got, run(q, weights, keys, lo, hi))


def test_no_gradients_for_quantised_keys_or_stacks():
    q, weights, keys, lo, hi = CASES["decode"].operands()
    how = {"blocks": CASES["decode"].blocks, "interpret": True}
    for keys, repeat in ((quantised(keys, "fp8"), None), (keys[None], 0)):  # noqa: B020
        with pytest.raises(ValueError, match="no gradients for (fp8|plain) keys"):
            jax.grad(lambda q: index_scores(q, weights, keys, lo, hi, repeat=repeat, **how).sum())(q)  # noqa: B023


@pytest.mark.parametrize(("size", "k"), [(1, 3), (128, 128), (300, 40), (5000, 512)])
def test_list_of_the_chosen(size, k):
    rng = np.random.default_rng(size)
    mask = rng.random((3, 25, size)) < rng.choice([0, 0.01, 0.1, 1], (3, 25, 1))
    got = np.asarray(index_list(jnp.asarray(mask), k))
    assert got.dtype == np.int32
    for row, listed in zip(mask.reshape(-1, size), got.reshape(-1, k), strict=True):
        want = np.flatnonzero(row)[:k]
        np.testing.assert_array_equal(listed, np.pad(want, (0, k - len(want)), constant_values=-1))


def test_list_refuses():
    with pytest.raises(ValueError, match="k=0 must be .*; mask float32"):
        index_list(jnp.zeros((1, 2)), 0)


def test_errors_name_every_problem():
    q, weights, keys, lo, hi = CASES["chunk"].operands()
    with pytest.raises(ValueError, match=r"k=0 .*; weights .*; lo .*dtype of q"):
        index_select(q, weights[:, 1:], keys.astype(jnp.bfloat16), lo[:1], hi, 0)
    with pytest.raises(ValueError, match="share a step only with all"):
        index_scores(q, weights, keys, lo, hi, blocks=IndexerBlocks(8, 1, 128), interpret=True)
    with pytest.raises(ValueError, match="multiple of 8.*multiple of 128"):
        IndexerBlocks(1, 3, 100)
    with pytest.raises(ValueError, match="keys must be a multiple of chunk"):
        IndexerBlocks(1, 8, 384, 256)
    fp8, mxfp4 = (quantised(keys, form) for form in ("fp8", "mxfp4"))
    with pytest.raises(ValueError, match=r"fp8 values uint8 .*; fp8 scales \(2, 300\)"):
        index_scores(q, weights, Fp8Keys(mxfp4.packed.repeat(2, -1), fp8.scales[..., 0]), lo, hi)
    with pytest.raises(ValueError, match=r"keys .*48\) must be .*; mxfp4 scales float32 must be uint8"):
        wide = jnp.pad(mxfp4.packed, ((0, 0), (0, 0), (0, 8)))
        index_scores(q, weights, Mxfp4(wide, fp8.scales), lo, hi)
    with pytest.raises(ValueError, match=r"keys .* must be \['R', 2, 'S', 32\]; repeat \(1,\)"):
        index_select(q, weights, keys, lo, hi, 1, repeat=jnp.zeros(1, jnp.int32))


def test_chosen_blocks_fit():
    for length, size in ((1, 1), (1, 2**18), (4, 2**14), (2048, 2**14), (2048, 2**18)):
        blocks = choose_blocks(64, length, 64, 128, size, 2, vmem_budget=48 * 2**20)
        assert blocks.vmem_bytes(64, 128, size, 2) <= 48 * 2**20
    assert choose_blocks(3, 1, 64, 128, 2**14, 2, vmem_budget=48 * 2**20).rows == 8
    with pytest.raises(ValueError, match="no legal block fits"):
        choose_blocks(1, 2048, 64, 128, 2**22, 2, vmem_budget=24 * 2**20)


# ---- compiling for TPUs ------------------------------------------------------------------------------------

REAL = {
    "decode 64 at 64K": (64, 1, 2**14),
    "decode 64 at 1M": (64, 1, 2**18),
    "chunk 2048 at 8K": (1, 2048, 2**11),
    "chunk 2048 at 64K": (1, 2048, 2**14),
    "chunk 2048 at 1M": (1, 2048, 2**18),
}


def real_keys(form, *lead):
    of = jax.ShapeDtypeStruct
    if form == "fp8":
        return Fp8Keys(of((*lead, 128), jnp.float8_e4m3fn), of((*lead, 1), jnp.float32))
    if form == "mxfp4":
        return Mxfp4(of((*lead, 64), jnp.uint8), of((*lead, 4), jnp.uint8))
    return of((*lead, 128), jnp.bfloat16)


def real_shapes(batch, length, size, form="plain"):
    of = jax.ShapeDtypeStruct
    return (
        of((batch, length, 64, 128), jnp.bfloat16),
        of((batch, length, 64), jnp.float32),
        real_keys(form, batch, size),
        of((batch, length), jnp.int32),
        of((batch, length), jnp.int32),
    )


def compile_keys_for(chip, function, *shapes):
    """`compile_for` with keys of any format among the arguments."""
    leaves, tree = jax.tree.flatten(shapes)
    return compile_for(chip, lambda *flat: function(*jax.tree.unflatten(tree, flat)), *leaves)


def select(*operands, k=512):
    return index_select(*operands, k)


def select_from_stack(repeat, *operands):
    return index_select(*operands, 512, repeat=repeat)


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


@pytest.mark.parametrize(
    "form", ["mxfp4", *(pytest.param(form, marks=pytest.mark.slow) for form in ("plain", "fp8"))]
)
def test_compiles_for_a_tpu_and_copies_no_keys(form):
    batch, length, size = REAL["decode 64 at 64K"]
    shapes = list(real_shapes(batch, length, size))
    shapes[2] = real_keys(form, 3, batch, size)
    program = compile_keys_for("v6e", select_from_stack, jax.ShapeDtypeStruct((), jnp.int32), *shapes)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 2**20


def test_gradients_compile_for_a_tpu():
    compile_for("v6e", gradients, *real_shapes(*REAL["chunk 2048 at 8K"]))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "k"), [("plain", 512), ("fp8", 512), ("mxfp4", 512), ("plain", 1024)])
@pytest.mark.parametrize("work", REAL)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_tpu(chip, work, form, k):
    compile_keys_for(chip, functools.partial(select, k=k), *real_shapes(*REAL[work], form))


@pytest.mark.slow
@pytest.mark.parametrize("work", ["chunk 2048 at 8K", "chunk 2048 at 64K"])
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_for_every_tpu(chip, work):
    compile_for(chip, gradients, *real_shapes(*REAL[work]))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_lists_and_float32_compile_for_every_tpu(chip):
    compile_for(chip, lambda mask: index_list(mask, 512), jax.ShapeDtypeStruct((64, 1, 2**14), bool))
    q, weights, keys, lo, hi = real_shapes(1, 100, 1000)
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, weights, keys)]
    compile_for(chip, select, *wide, lo, hi)
    compile_for(chip, select, *real_shapes(5, 3, 1000))  # drafts
