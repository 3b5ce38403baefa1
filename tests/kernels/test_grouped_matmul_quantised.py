"""`expert_ffn` with FP8 and FP4 weights: the bits of the numbers they stand for, and no stack decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats import e2m1
from pallas_kernels.formats.blocks import Fp8Blocks, Mxfp4, fp8_numbers, mxfp4_numbers
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.grouped_matmul.stored import Stack, decoded
from pallas_kernels.grouped_matmul.tuning import ExpertBlocks

# Bits are compared: products and sums must be contracted alike, which the quick code generator does not do.
pytestmark = pytest.mark.as_users_compile

LIMIT = 1.5
STREAMED = ExpertBlocks(1, streamed=True)


def draw(rng, form, *shape):
    """A stack of matrices with every element code, and scales that make activations of about one."""
    *lead, rows, width = shape
    if form == "mxfp4":
        scale = rng.integers(120, 126, (*lead, rows, width // 32))
        return Stack(
            jnp.asarray(rng.integers(0, 256, (*lead, rows, width // 2)), jnp.uint8),
            jnp.asarray(scale, jnp.uint8),
        )
    if form == "fp8":
        codes = rng.integers(0, 254, shape)
        codes += codes >= 127  # 127 and 255 are NaN
        scale = rng.integers(113, 118, (*lead, cdiv(rows, 128), cdiv(width, 128)))
        values = jax.lax.bitcast_convert_type(jnp.asarray(codes, jnp.uint8), jnp.float8_e4m3fn)
        return Stack(values, jnp.asarray(scale, jnp.uint8))
    return Stack(jnp.asarray(rng.standard_normal(shape) / width**0.5, form))


def operands(
    gate_up_form, down_form, *, tokens=5, top_k=2, experts=4, hidden=160, width=96, layers=1, dtype="float32"
):
    """(x, gate_up, down, ids, weights)"""
    rng = np.random.default_rng(0)
    stack = experts * layers
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    return (
        jnp.asarray(rng.standard_normal((tokens, hidden)), dtype),
        draw(rng, gate_up_form, stack, 2, width, hidden),
        draw(rng, down_form, stack, hidden, width),
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(rng.random((tokens, top_k)), jnp.float32),
    )


def layered(layers, *stacks):
    """The experts of all layers, behind one another, with an axis of layers in front."""
    return jax.tree.map(lambda a: a.reshape(layers, -1, *a.shape[1:]), stacks)


@functools.partial(jax.jit, static_argnames=("impl", "blocks"))
def run(x, gate_up, down, ids, weights, **options):
    return expert_ffn(
        x, gate_up.matrices, down.matrices, ids, weights, swiglu_limit=LIMIT, **options,
    )  # fmt: skip


def plain(stack, dtype):
    """The numbers a stack stands for, which the dtype must hold."""
    numbers = decoded(stack)
    assert np.all(np.isfinite(numbers)) and np.all(numbers.astype(dtype) == numbers)
    return Stack(numbers.astype(dtype))


def test_every_element_code():
    codes = np.arange(256, dtype=np.uint8)
    halves = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    np.testing.assert_array_equal(e2m1.value(jnp.arange(16)), halves)
    packed = jnp.tile(jnp.asarray(codes), (3, 1))
    scale = jnp.asarray(np.arange(48).reshape(3, 16) + 100, jnp.uint8)
    want = np.stack([halves[codes & 15], halves[codes >> 4]], axis=-1).reshape(-1)
    want = want * np.repeat(2.0 ** (np.arange(48).reshape(3, 16) - 27), 32, axis=1)
    np.testing.assert_array_equal(mxfp4_numbers(packed, scale), want)
    np.testing.assert_array_equal(decoded(Stack(packed, scale)), want)

    numbers = jax.lax.bitcast_convert_type(jnp.asarray(codes[:127]), jnp.float8_e4m3fn).astype(jnp.float32)
    both = jnp.asarray(np.concatenate([codes[:127], codes[128:255]]))[None]
    got = fp8_numbers(both, jnp.array([[130, 120]], jnp.uint8))[0]
    want = np.concatenate([numbers, -numbers]) * np.where(np.arange(254) < 128, 8.0, 2.0**-7)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


FORMATS = [("mxfp4", "mxfp4"), ("fp8", "fp8"), ("fp8", "mxfp4"), ("mxfp4", "float32")]


@pytest.mark.parametrize("forms", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [
        ("float32", ExpertBlocks(3)),
        ("bfloat16", STREAMED),
        pytest.param("bfloat16", ExpertBlocks(3), marks=pytest.mark.slow),
        pytest.param("float32", STREAMED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_bit_is_that_of_the_decoded_weights(forms, dtype, blocks):
    forms = [dtype if form == "float32" else form for form in forms]
    x, gate_up, down, ids, weights = operands(*forms, dtype=dtype)
    want = run(x, plain(gate_up, dtype), plain(down, dtype), ids, weights, blocks=blocks)
    np.testing.assert_array_equal(run(x, gate_up, down, ids, weights, blocks=blocks), want)
    scale = np.abs(want).max()
    reference = run(x, gate_up, down, ids, weights, impl="reference")
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(want, reference, rtol=0, atol=tolerance * scale)
    assert scale > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_streamed_over_several_loops_and_wide_terms(form):
    """Widths of more than one loop, of terms with several groups, and rows that are no whole block."""
    x, gate_up, down, ids, weights = operands(form, form, tokens=2, experts=3, hidden=4160, width=160)
    want = run(x, plain(gate_up, x.dtype), plain(down, x.dtype), ids, weights, blocks=STREAMED)
    np.testing.assert_array_equal(run(x, gate_up, down, ids, weights, blocks=STREAMED), want)


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_stack_of_layers_and_padding(form):
    x, gate_up, down, ids, weights = operands(form, form, layers=3)
    own = lambda a: a[8:12]  # noqa: E731
    want = run(x, *jax.tree.map(own, (gate_up, down)), ids, weights)
    options = dict(repeat=jnp.int32(2), valid=jnp.arange(5) < 3)
    got = run(x.at[3:].set(jnp.nan), *layered(3, gate_up, down), ids, weights, **options)
    np.testing.assert_array_equal(got[:3], want[:3])
    assert not np.any(got[3:])


@pytest.mark.parametrize("forms", [("fp8", "mxfp4"), ("mxfp4", "float32")], ids=str)
def test_gradients_of_what_is_not_quantised(forms):
    x, gate_up, down, ids, weights = operands(*forms)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def pull(gate_up, down, other_floats):
        _, back = jax.vjp(
            lambda x, weights, *floats: run(x, gate_up, Stack(*floats) if floats else down, ids, weights),
            x,
            weights,
            *other_floats,
        )
        return back(dy)

    floats = [down.values] if down.scale is None else []
    got = pull(gate_up, down, floats)
    want = pull(plain(gate_up, jnp.float32), plain(down, jnp.float32), floats)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.any(theirs)


def test_quantised_weights_have_no_gradient():
    """Zeros for floats; none of the float32 sums that weight gradients take is ever allocated."""
    x, gate_up, down, ids, weights = operands("fp8", "mxfp4", layers=8)

    def loss(x, values):
        stacks = layered(8, Stack(values, gate_up.scale), down)
        return run(x, *stacks, ids, weights, repeat=jnp.int32(0)).sum()

    d_x, d_values = jax.grad(loss, argnums=(0, 1))(x, gate_up.values)
    assert np.any(d_x) and not np.any(d_values.astype(jnp.float32))
    alone = jax.jit(jax.grad(loss)).lower(x, gate_up.values).compile().memory_analysis()
    if alone is None:
        pytest.skip("this backend reports no memory use")
    assert alone.temp_size_in_bytes < 4 * 2 * gate_up.values.size


@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_no_more_than_one_expert_is_decoded(form, tokens):
    """One matrix pair in float32, and activations: far from what the packed stack is, let alone decoded."""
    case = dict(tokens=tokens, experts=16, hidden=128, width=128, layers=4, dtype="bfloat16")
    x, gate_up, down, ids, weights = operands(form, form, **case)

    def deep(x, gate_up, down):
        def layer(x, index):
            y = run(x, *layered(4, gate_up, down), ids, weights, repeat=index)
            return (x + y).astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(4))[0]

    memory = jax.jit(deep).lower(x, gate_up, down).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory use")
    one_expert = 4 * 3 * 128 * 128
    rows = 4 * 6 * 128 * tokens * 2
    assert memory.temp_size_in_bytes < 2 * one_expert + rows < 0.5 * 4 * gate_up.values.size


def test_all_problems_of_formats_at_once():
    x, gate_up, down, ids, weights = operands("fp8", "mxfp4")
    with pytest.raises(ValueError) as error:
        wrong = Fp8Blocks(gate_up.values, gate_up.scale.astype(jnp.int32))
        of_other = Mxfp4(down.values, down.scale[..., :1])
        expert_ffn(x, wrong, of_other, ids, weights, swiglu_limit=LIMIT)
    for part in (
        "scale of gate_up int32[4, 2, 1, 2] must be uint8[4, 2, 1, 2]",
        "scale of down uint8[4, 160, 1]",
        "[4, 160, 3]",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"gate_up float32.* must be float8_e4m3fn in Fp8Blocks"):
        expert_ffn(x, Fp8Blocks(decoded(gate_up), gate_up.scale), down.matrices, ids, weights, swiglu_limit=1)
    with pytest.raises(ValueError, match=r"gate_up float8_e4m3fn.* must be float32"):
        expert_ffn(x, gate_up.values, down.matrices, ids, weights, swiglu_limit=LIMIT)
