"""`expert_ffn` on TPU kernels: values, gradients, odd routings, lowering, compiling at V4's shapes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.chips import CHIPS
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.grouped_matmul.kernel_tpu import formulation_of
from pallas_kernels.grouped_matmul.stored import Stack, decoded
from pallas_kernels.grouped_matmul.tuning_tpu import VMEM_LIMIT, ItemBlocks, choose_blocks, choose_rows
from pallas_kernels.grouped_matmul.work_items import most_items, work_items
from tests.kernels.ahead_of_time import compile_for
from tests.kernels.checks import STRICT, assert_close
from tests.kernels.test_grouped_matmul_quantised import draw

LIMIT = 1.5
SMALL = ItemBlocks(rows=8, outer=128, inner=128)
MANY_ROWS = ItemBlocks(rows=24, outer=128, inner=128)  # FP4 weights are decoded
# float32: only the order of sums differs. bfloat16: a hidden value may round to its other neighbour.
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
FORMS = ("plain", "fp8", "mxfp4")


def routing(kind: str, tokens: int, experts: int, top_k: int = 2):
    """i32[T, Ke]"""
    rng = np.random.default_rng(0)
    if kind == "even":
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    elif kind == "one expert":
        ids = np.full((tokens, 1), experts - 2)
    elif kind == "few experts":  # most have no rows, the first and the last among them
        ids = rng.integers(1, 3, (tokens, top_k))
    elif kind == "foreign":  # ids of other devices' experts, twice the same, and any number
        ids = rng.choice([-1, 0, 2, 2, experts, 2**30, -(2**31)], (tokens, top_k))
    return jnp.asarray(ids, jnp.int32)


def operands(form, dtype, tokens=5, *, experts=4, hidden=256, width=256, layers=1, kind="even"):
    """(x, gate_up, down, ids, weights)"""
    rng, stack = np.random.default_rng(1), experts * layers
    ids = routing(kind, tokens, experts)
    form = dtype if form == "plain" else form
    return (
        jnp.asarray(rng.standard_normal((tokens, hidden)), dtype),
        draw(rng, form, stack, 2, width, hidden),
        draw(rng, form, stack, hidden, width),
        ids,
        jnp.asarray(rng.random(ids.shape), jnp.float32),
    )


def layered(*stacks, layers=3):
    """The experts of all layers, behind one another, with an axis of layers in front."""
    return jax.tree.map(lambda a: a.reshape(layers, -1, *a.shape[1:]), stacks)


def run(x, gate_up, down, ids, weights, **options):
    return expert_ffn(
        x, gate_up.matrices, down.matrices, ids, weights, swiglu_limit=LIMIT, **options,
    )  # fmt: skip


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(run, **options))


def kernel(*arguments, blocks=SMALL, **options):
    return jitted(impl="pallas", interpret=True, blocks=blocks)(*arguments, **options)


def reference(*arguments, **options):
    return jitted(impl="reference")(*arguments, **options)


def check(got, want, bound):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert_close(got, want, bound)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(form, dtype):
    """Tiles that are a part of each matrix; an item that is full and one that is not."""
    arguments = operands(form, dtype, 13)
    want = reference(*arguments)
    assert np.abs(want).max() > 0.1
    check(kernel(*arguments), want, BOUND[dtype])


@pytest.mark.parametrize(
    ("form", "dtype", "tokens", "sizes", "blocks"),
    [
        ("plain", "float32", 1, dict(hidden=37, width=19), SMALL),  # whole matrices where 128 does not divide
        ("fp8", "float32", 5, dict(hidden=160, width=300), SMALL),  # blocks of scales that stick out
        pytest.param("fp8", "bfloat16", 37, dict(hidden=384, width=128), MANY_ROWS, marks=pytest.mark.slow),
        pytest.param("mxfp4", "float32", 1, dict(hidden=160, width=96), SMALL, marks=pytest.mark.slow),
        ("mxfp4", "bfloat16", 37, {}, MANY_ROWS),
        ("mxfp4", "bfloat16", 7, dict(hidden=4096, width=32), ItemBlocks(8, 2048)),  # scales as they lie
        pytest.param("mxfp4", "float32", 3, dict(hidden=4096, width=256), SMALL, marks=pytest.mark.slow),
        pytest.param("plain", "bfloat16", 37, {}, ItemBlocks(16, 256), marks=pytest.mark.slow),
        pytest.param("mxfp4", "bfloat16", 7, {}, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_awkward_sizes(form, dtype, tokens, sizes, blocks):
    arguments = operands(form, dtype, tokens, **sizes)
    check(kernel(*arguments, blocks=blocks), reference(*arguments), BOUND[dtype])


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("mxfp4", "one expert"),
        ("plain", "foreign"),
        *(
            pytest.param(form, kind, marks=pytest.mark.slow)
            for form, kind in [("plain", "one expert"), ("mxfp4", "foreign"), ("fp8", "few experts")]
        ),
    ],
)
def test_routings(form, kind):
    x, gate_up, down, ids, weights = operands(form, "bfloat16", 21, kind=kind)
    counted = jnp.where((ids >= 0) & (ids < 4), weights, 0)
    want = reference(x, gate_up, down, ids.clip(0, 3), counted)
    check(kernel(x, gate_up, down, ids, weights), want, BOUND["bfloat16"])


@pytest.mark.parametrize("form", ["plain", pytest.param("fp8", marks=pytest.mark.slow), "mxfp4"])
def test_layer_of_a_stack_and_padding(form):
    """Other layers' weights, and whatever padding holds, change no bit."""
    x, gate_up, down, ids, weights = operands(form, "bfloat16", 5, layers=3, width=128)
    own = lambda a: a[8:12]  # noqa: E731
    want = kernel(x, *jax.tree.map(own, (gate_up, down)), ids, weights)
    valid = jnp.arange(5) < 3
    stacks = layered(gate_up, down)
    got = kernel(x.at[3:].set(jnp.nan), *stacks, ids, weights, repeat=jnp.int32(2), valid=valid)
    np.testing.assert_array_equal(got[:3], want[:3])
    assert not np.any(got[3:])
    options = dict(repeat=jnp.int32(2), valid=valid & False)
    assert not np.any(kernel(x.at[3:].set(jnp.nan), *stacks, ids, weights, **options))


@pytest.mark.parametrize("blocks", [SMALL, pytest.param(MANY_ROWS, marks=pytest.mark.slow)], ids=str)
def test_not_a_number_stays_with_its_token(blocks):
    x, gate_up, down, ids, weights = operands("mxfp4", "bfloat16", 5)
    want = kernel(x, gate_up, down, ids, weights, blocks=blocks)
    got = kernel(x.at[2].set(jnp.nan), gate_up, down, ids, weights, blocks=blocks)
    assert np.isnan(got[2]).all()
    others = np.array([0, 1, 3, 4])
    np.testing.assert_array_equal(got[others], want[others])


@pytest.mark.parametrize("form", ["fp8", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_decoded_tiles_give_the_bits_of_the_numbers(form):
    x, gate_up, down, ids, weights = operands(form, "float32", 5)
    plain = [Stack(decoded(stack)) for stack in (gate_up, down)]
    want, got = kernel(x, *plain, ids, weights), kernel(x, gate_up, down, ids, weights)
    # FP4 adds even columns first, FP8 in the order of the columns.
    check(got, want, 1e-6 if form == "mxfp4" else 0)


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "mxfp4"])
def test_nothing_uninitialised_is_read(form):
    arguments = operands(form, "bfloat16", 1, width=128)
    got = run(*arguments, impl="pallas", interpret=STRICT, blocks=SMALL)
    check(got, reference(*arguments), BOUND["bfloat16"])


def halved(hidden):
    """A rounding with a gradient of its own, and sums over the last axis in it."""
    return hidden * jnp.asarray(0.5, hidden.dtype) + hidden.mean(axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("options",))
def pulled(x, gate_up, down, ids, weights, dy, valid, options):
    """(y, gradients of x, weights and of plain matrices)"""
    plain = gate_up.scale is None

    def call(x, weights, *matrices):
        stacks = [Stack(m) for m in matrices] if plain else (gate_up, down)
        return run(x, *stacks, ids, weights, valid=valid, **dict(options))

    matrices = (gate_up.values, down.values) if plain else ()
    y, pull = jax.vjp(call, x, weights, *matrices)
    return y, *pull(dy)


@pytest.mark.parametrize(
    ("form", "dtype", "kind", "rounding"),
    [
        ("plain", "float32", "even", None),
        ("plain", "float32", "few experts", halved),
        pytest.param("plain", "bfloat16", "even", None, marks=pytest.mark.slow),
        pytest.param("fp8", "float32", "even", None, marks=pytest.mark.slow),
        ("mxfp4", "float32", "even", halved),
        pytest.param("mxfp4", "bfloat16", "even", None, marks=pytest.mark.slow),
        pytest.param("fp8", "bfloat16", "few experts", halved, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # a function's text holds its address
)
def test_gradients(form, dtype, kind, rounding):
    """Of the second of three layers; padding gets none, nor do experts without rows."""
    x, gate_up, down, ids, weights = operands(form, dtype, 21, layers=3, kind=kind)
    dy = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape), jnp.float32)
    valid = jnp.arange(21) % 5 != 3
    layer = (("repeat", 1), ("round_hidden", rounding))
    arguments = *layered(gate_up, down), ids, weights
    want = pulled(x, *arguments, dy, valid, (*layer, ("impl", "reference")))
    own = (*layer, ("impl", "pallas"), ("interpret", True), ("blocks", SMALL))
    poison = jnp.where(valid[:, None], x, jnp.nan), jnp.where(valid[:, None], dy, jnp.nan)
    got = pulled(poison[0], *arguments, poison[1], valid, own)
    assert len(got) == (5 if form == "plain" else 3)
    for ours, theirs in zip(got, want, strict=True):
        # The reference rounds gradients of bfloat16 hidden activations elsewhere.
        check(ours, theirs, BOUND[dtype] if dtype == "float32" else 3e-2)
    assert not np.any(got[1][~valid]) and not np.any(got[2][~valid])
    if form == "plain":
        without = np.setdiff1d(np.arange(12), 4 + np.asarray(ids))
        for gradient in got[3:]:
            of_experts = np.asarray(gradient, np.float32).reshape(12, -1)
            assert np.any(of_experts) and not np.any(of_experts[without])


@pytest.mark.slow
def test_weights_are_rounded_to_the_compute_dtype():
    x, gate_up, down, ids, weights = operands("plain", "float32", 5)
    x = x.astype(jnp.bfloat16)
    rounded = [Stack(stack.values.astype(x.dtype)) for stack in (gate_up, down)]
    np.testing.assert_array_equal(kernel(x, gate_up, down, ids, weights), kernel(x, *rounded, ids, weights))


@pytest.mark.parametrize(
    ("kind", "rows", "every_expert"),
    [("even", 8, False), ("one expert", 3, True), ("few experts", 1, True), ("foreign", 3, False)],
)
def test_work_items(kind, rows, every_expert):
    """Every pair once, at the place that says so; experts ascend; the list is long enough."""
    ids, valid = routing(kind, 11, 5), jnp.arange(11) != 4
    call = functools.partial(work_items, num_experts=5, rows=rows, every_expert=every_expert)
    items = jax.tree.map(np.asarray, jax.jit(call)(ids, valid))
    total, count = int(items.total[0]), np.asarray(items.count)
    assert len(count) == most_items(ids.size, 5, rows, every_expert=every_expert) > total
    ids = np.asarray(ids)
    routed = (ids >= 0) & (ids < 5) & np.asarray(valid)[:, None]
    np.testing.assert_array_equal(items.routed, routed)
    assert count.sum() == routed.sum() and not count[total:].any()
    assert every_expert or (count[:total] > 0).all()
    expert = np.asarray(items.expert)
    assert (np.diff(expert) >= 0).all() and set(expert) <= set(range(5))
    if every_expert:
        assert set(expert[:total]) == set(range(5))
    seen = []
    for i in range(total):
        for r in range(count[i]):
            token, k = divmod(int(items.pair[i, r]), ids.shape[1])
            assert ids[token, k] == expert[i] and items.place[token, k] == i * rows + r
            seen.append((token, k))
    assert len(set(seen)) == len(seen)


def stacks(form, experts, d, f):
    """Shapes of (gate_up, down)."""
    array = jax.ShapeDtypeStruct
    if form == "bfloat16":
        return Stack(array((experts, 2, f, d), form)), Stack(array((experts, d, f), form))
    if form == "fp8":
        return tuple(
            Stack(
                array((*lead, n, k), jnp.float8_e4m3fn),
                array((*lead, cdiv(n, 128), cdiv(k, 128)), jnp.uint8),
            )
            for lead, n, k in (((experts, 2), f, d), ((experts,), d, f))
        )
    return tuple(
        Stack(array((*lead, n, k // 2), jnp.uint8), array((*lead, n, k // 32), jnp.uint8))
        for lead, n, k in (((experts, 2), f, d), ((experts,), d, f))
    )


def whole(x, ids, weights, *leaves, backward=False):
    """The op, and its gradients, of flat arguments."""
    half = len(leaves) // 2
    if backward:
        call = lambda x, w, *m: run(x, Stack(m[0]), Stack(m[1]), ids, w, impl="pallas")  # noqa: E731
        y, pull = jax.vjp(call, x, weights, *leaves)
        return y, pull(y)
    return run(x, Stack(*leaves[:half]), Stack(*leaves[half:]), ids, weights, impl="pallas")


def shapes(form, tokens, experts, d, f, top_k=6):
    gate_up, down = stacks(form, experts, d, f)
    return (
        jax.ShapeDtypeStruct((tokens, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
        *(leaf for stack in (gate_up, down) for leaf in stack if leaf is not None),
    )


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "mxfp4"])
def test_lowers_to_mosaic(form):
    program = functools.partial(whole, backward=form == "bfloat16")
    exported = export.export(jax.jit(program), platforms=["tpu"])(*shapes(form, 64, 32, 512, 256))
    text = exported.mlir_module()
    assert "grouped_matmul_swiglu" in text and text.count("tpu_custom_call") == (
        2 if form != "bfloat16" else 7
    )


def test_compiles_for_v6e():
    compiled = compile_for("v6e", whole, *shapes("mxfp4", 8, 16, 512, 256))
    # Neither elements nor scales of a stack are copied.
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 512 * 256 // 2


FLASH, PRO = (256, 4096, 2048), (384, 7168, 3072)  # E, D, F
HBM_BYTES = {"v5e": 16 << 30, "v5p": 95 << 30, "v6e": 32 << 30, "tpu7x": 96 << 30}  # published, a JAX device


def experts_that_fit(chip, form, experts, d, f):
    """A layer's experts, or a device's share where they are divided over just enough devices to fit."""
    bytes_of = lambda shape: shape.size * shape.dtype.itemsize  # noqa: E731
    while sum(map(bytes_of, jax.tree.leaves(stacks(form, experts, d, f)))) > 0.9 * HBM_BYTES[chip]:
        experts //= 2
    return experts


def test_experts_of_v4_pro_are_divided_where_they_do_not_fit():
    assert experts_that_fit("tpu7x", "bfloat16", *PRO) == experts_that_fit("v5e", "mxfp4", *PRO) == 384
    assert experts_that_fit("v6e", "bfloat16", *PRO) == 192
    assert experts_that_fit("v5e", "bfloat16", *PRO) == 96


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [64, 2048])
@pytest.mark.parametrize("form", ["bfloat16", "fp8", "mxfp4"])
@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_chip(chip, sizes, form, tokens):
    sizes = experts_that_fit(chip, form, *sizes), *sizes[1:]
    compiled = compile_for(chip, whole, *shapes(form, tokens, *sizes))
    one_stack = sizes[0] * sizes[1] * sizes[2] // 2
    if tokens == 64:
        assert compiled.memory_analysis().temp_size_in_bytes < one_stack // 8


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("chip", CHIPS)
def test_gradients_compile_for_every_chip(chip, sizes):
    # A few experts: the gradients of all of one layer's would fill a chip.
    small = (16, *sizes[1:])
    compile_for(chip, functools.partial(whole, backward=True), *shapes("bfloat16", 128, *small))


@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("form", ["bfloat16", "fp8", "mxfp4"])
def test_chosen_blocks_divide_and_fit(form, sizes):
    for tokens in (1, 64, 2048, 65536):
        rows = choose_rows(6 * tokens, sizes[0])
        for stack in stacks(form, *sizes):
            if stack.values.ndim == 3:
                stack = Stack(
                    *(a and jax.ShapeDtypeStruct((a.shape[0], 1, *a.shape[1:]), a.dtype) for a in stack)
                )
            for name in ("output", "input", "weights"):
                blocks = choose_blocks(name, rows, stack, 2)
                assert stack.shape[2] % blocks.outer == 0
                assert name != "weights" or stack.shape[3] % blocks.inner == 0
                assert (
                    blocks.vmem_bytes(name, stack, 2)
                    <= VMEM_LIMIT
                    < min(c.vmem_bytes for c in CHIPS.values())
                )
    assert (
        formulation_of(stacks("mxfp4", *sizes)[0], jnp.bfloat16, choose_rows(384, 256), "output")
        == "masked rows"
    )


def test_problems_are_named_together():
    x, gate_up, down, ids, weights = operands("plain", "float32", 3)
    with pytest.raises(ValueError) as raised:
        run(x.astype(jnp.float16), gate_up, Stack(down.values.astype(jnp.float16)), ids, weights,
            impl="pallas", blocks="large")  # fmt: skip
    for part in ("x float16", "down float16", "blocks=large must be ItemBlocks"):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match="multiple of 32 outputs"):
        run(*operands("mxfp4", "float32", 3, width=32, hidden=64)[:1],
            Stack(jnp.zeros((4, 2, 40, 32), jnp.uint8), jnp.zeros((4, 2, 40, 2), jnp.uint8)),
            Stack(jnp.zeros((4, 64, 40))), ids, weights, impl="pallas")  # fmt: skip
    for wrong in (dict(rows=7), dict(outer=0)):
        with pytest.raises(ValueError, match=r"must be a positive multiple of 8|needs outer"):
            ItemBlocks(**(dict(rows=8, outer=128) | wrong))
