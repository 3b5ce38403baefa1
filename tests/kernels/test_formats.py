"""Number formats, bit for bit: against ml_dtypes, torch's float8 and the specification's own vectors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.checkpoint.dequantize import dequantize_into
from pallas_kernels.formats import blocks, e2m1, e4m3, e8m0, on_host

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
VECTOR = (0.3, -1.0, 5.1, 0.02, 7.0, -2.4, 0.9, 3.3)


# One program each: an operation at a time would be compiled a dozen times for every shape.
quantize_mxfp4 = jax.jit(blocks.quantize_mxfp4)
quantize_fp8_blocks = jax.jit(blocks.quantize_fp8_blocks)
quantize_fp8_groups = jax.jit(blocks.quantize_fp8_groups, static_argnums=1)
dequantized = jax.jit(lambda stored: stored.dequantize())


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def padded_vector(channels):
    """The specification's example as one group: zeros do not change its largest magnitude."""
    return jnp.asarray([*VECTOR, *(0.0,) * (channels - len(VECTOR))], jnp.float32)


def test_the_specified_vectors():
    fp4 = quantize_mxfp4(padded_vector(32))
    assert e8m0.value(fp4.scale).tolist() == [2.0]
    assert dequantized(fp4)[:8].tolist() == [0, -1, 6, 0, 8, -2, 1, 3]
    fp8 = quantize_fp8_groups(padded_vector(8), 8)
    assert e8m0.value(fp8.scale).tolist() == [2.0**-6]
    assert dequantized(fp8).tolist() == [0.3125, -1, 5, 0.01953125, 7, -2.5, 0.875, 3.25]


@pytest.mark.parametrize("code", [0, 1, 127, 246])
def test_products_with_a_scale_are_those_of_the_form_for_loops(code):
    """Code 0 too: XLA takes the subnormal 2^-127 for 0, numpy does not."""
    numbers = np.concatenate([e4m3.VALUES[~np.isnan(e4m3.VALUES)], e2m1.VALUES])
    scale = jnp.full(numbers.shape, code, jnp.uint8)
    by_rule, by_shift = (
        np.asarray(jax.jit(lambda code, x, value=value: value(code) * x)(scale, numbers))
        for value in (e8m0.value, e8m0.normal_value)
    )
    np.testing.assert_array_equal(bits(by_rule), bits(by_shift))
    on_host = numbers * e8m0.VALUES[code]
    normal = np.abs(on_host) >= np.finfo(np.float32).tiny
    if code == 0:
        assert not by_rule.any() and normal.any()
    else:
        np.testing.assert_array_equal(by_rule[normal], on_host[normal])


def test_every_scale_byte_in_every_form():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(bits(jax.jit(e8m0.value)(codes)[:255]), bits(e8m0.VALUES[:255]))
    assert np.isnan(e8m0.VALUES[255])
    np.testing.assert_array_equal(bits(jax.jit(e8m0.normal_value)(codes)[1:255]), bits(e8m0.VALUES[1:255]))
    assert e8m0.normal_value(codes)[np.array([0, 255])].tolist() == [0, np.inf]
    np.testing.assert_array_equal(e8m0.values_on_host(codes.view(ml_dtypes.float8_e8m0fnu)), e8m0.VALUES)
    np.testing.assert_array_equal(jax.jit(e8m0.code_above)(e8m0.VALUES[1:255]), codes[1:255])


def test_every_fp8_byte_in_every_form():
    codes = np.arange(256, dtype=np.uint8)
    number = ~np.isnan(e4m3.VALUES)
    np.testing.assert_array_equal(np.flatnonzero(~number), [0x7F, 0xFF])
    for got in (
        jax.jit(e4m3.value)(codes),
        jax.jit(e4m3.value_of)(codes.view(ml_dtypes.float8_e4m3fn)),
        jax.jit(e4m3.halves)(codes).astype(jnp.float32) * e4m3.OF_HALF,
        jax.jit(e4m3.value_in_word)(jnp.asarray(codes, jnp.int32) | 0x5A00),
    ):
        np.testing.assert_array_equal(bits(got)[number], bits(e4m3.VALUES)[number])
    np.testing.assert_array_equal(jax.jit(e4m3.value)(codes), e4m3.VALUES)  # NaN equals NaN
    np.testing.assert_array_equal(
        np.asarray(jax.jit(e4m3.rounded)(e4m3.VALUES[number])).view(np.uint8), codes[number]
    )
    assert np.asarray(e4m3.rounded(jnp.float32([1e9, -1e9]))).astype(np.float32).tolist() == [448, -448]


def test_every_fp4_byte_in_every_form():
    packed = np.arange(256, dtype=np.uint8)
    even, odd = e2m1.VALUES[packed & 15], e2m1.VALUES[packed >> 4]
    np.testing.assert_array_equal(bits(e2m1.value(np.arange(16, dtype=np.uint8))), bits(e2m1.VALUES))
    np.testing.assert_array_equal(e2m1.PAIRS[:, None].view(np.float32), np.stack([even, odd], axis=1))
    for got, want in zip(jax.jit(e2m1.halves)(packed), (even, odd), strict=True):
        np.testing.assert_array_equal(bits(got.astype(jnp.float32) * e2m1.OF_PLACED), bits(want))
    both = jax.jit(e2m1.interleaved_halves)(packed[:, None]).astype(jnp.float32) * e2m1.OF_PLACED
    np.testing.assert_array_equal(bits(both), bits(np.stack([even, odd], axis=1)))
    words = jnp.asarray(packed.view(np.int32))
    for got, want in zip(jax.jit(e2m1.e5m2_words)(words), (even, odd), strict=True):
        placed = np.asarray(got).view(ml_dtypes.float8_e5m2).astype(np.float32)
        np.testing.assert_array_equal(bits(placed * np.float32(e2m1.OF_PLACED)), bits(want))


@pytest.mark.parametrize("rows", [1, 127, 130])
def test_blocks_are_decoded_alike_in_loops_and_on_the_host(rows):
    rng = np.random.default_rng(rows)
    shape = (rows, 160)
    codes = rng.integers(0, 0x7F, shape, np.uint8)
    scale = rng.integers(1, 240, on_host.fp8_scale_shape(shape), np.uint8)
    fp8 = blocks.Fp8Blocks(codes.view(ml_dtypes.float8_e4m3fn), scale)
    packed = rng.integers(0, 256, on_host.fp4_packed_shape(shape), np.uint8)
    fp4 = blocks.Mxfp4(packed, rng.integers(8, 240, on_host.fp4_scale_shape(shape), np.uint8))
    assert fp8.shape == fp4.shape == shape
    for weight, loop, by_rows in (
        (fp8, blocks.fp8_numbers(jnp.asarray(codes), jnp.asarray(scale)), on_host.fp8_rows),
        (fp4, blocks.mxfp4_numbers(jnp.asarray(packed), jnp.asarray(fp4.scale)), on_host.fp4_rows),
    ):
        want = np.concatenate([piece for _, piece in by_rows(weight.data, weight.scale)])
        want = np.where(np.abs(want) < np.finfo(np.float32).tiny, 0 * want, want)  # XLA flushes these
        np.testing.assert_array_equal(bits(dequantized(weight)), bits(want))
        np.testing.assert_array_equal(bits(loop), bits(want))
        if weight is fp4:
            even, odd = weight.halves(jnp.float32)
            np.testing.assert_array_equal(np.stack([even, odd], axis=-1).reshape(shape), want)


@QUICK
@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_the_scale_is_the_next_power_of_two(ratio):
    code = int(e8m0.code_above(jnp.float32(ratio)))
    assert 2.0 ** (code - 128) < ratio <= 2.0 ** (code - 127)


@pytest.mark.parametrize("exponent", [-126, -13, -1, 0, 1, 5, 126])
def test_the_scale_of_a_power_of_two_is_itself(exponent):
    exact = np.float32(2.0**exponent)
    above = np.nextafter(exact, np.float32(np.inf))
    codes = np.asarray(e8m0.code_above(jnp.asarray([exact, above])))
    assert codes.tolist() == [exponent + 127, exponent + 128]


def test_every_fp4_code():
    codes = np.arange(16, dtype=np.uint8)
    want = codes.view(np.uint8).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(bits(e2m1.value(codes)), bits(want))
    np.testing.assert_array_equal(e2m1.code(jnp.asarray(want)), codes)


def test_fp4_rounding_equals_ml_dtypes_everywhere():
    grid = np.linspace(-8, 8, 4097, dtype=np.float32)  # every tie among them
    beside = [np.nextafter(grid, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([grid, *beside, np.float32([1e-30, -1e-30, 3e38, -3e38, -0.0])])
    want = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(jax.jit(e2m1.code)(x), want)


def test_every_fp8_code_survives():
    codes = np.arange(256, dtype=np.uint8)
    elements = codes.view(ml_dtypes.float8_e4m3fn)
    usable = ~np.isnan(elements.astype(np.float32))
    groups = blocks.Fp8Groups(jnp.asarray(elements), jnp.asarray([127], jnp.uint8))
    values = np.asarray(dequantized(groups))
    np.testing.assert_array_equal(
        values[usable], torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()[usable]
    )
    again = quantize_fp8_groups(jnp.asarray(values[usable]), int(usable.sum()))
    np.testing.assert_array_equal(np.asarray(again.elements).view(np.uint8), codes[usable])


@QUICK
@given(st.integers(0, 2**31), st.integers(-100, 100), st.integers(0, 40))
def test_fp8_equals_torch(seed, exponent, spread):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(64) * 2.0 ** (exponent - rng.integers(0, spread + 1, 64))
    x = x.astype(np.float32)
    got = quantize_fp8_groups(jnp.asarray(x), 64)
    scale = 2.0 ** (float(got.scale[0]) - 127)
    largest = max(np.abs(x).max(), np.float32(1e-4))
    assert largest / scale <= 448 < 2 * np.nextafter(np.float32(largest), np.float32(np.inf)) / scale
    want = torch.clamp(torch.from_numpy(x) / scale, -448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(np.asarray(got.elements).view(np.uint8), want.numpy())


@pytest.mark.parametrize("scale", [2.0**-120, 1.0, 2.0**100])
def test_quantising_what_is_on_the_grid_changes_nothing(scale):
    rng = np.random.default_rng(0)
    values = np.array(e2m1.value(rng.integers(0, 16, (3, 64), dtype=np.uint8)))
    values[:, ::32] = 6  # the largest of each group
    x = jnp.asarray(values * np.float32(scale))
    np.testing.assert_array_equal(bits(dequantized(quantize_mxfp4(x))), bits(x))
    elements = rng.integers(0, 120, (2, 130, 200), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    values = elements.astype(np.float32)
    values[:, ::128, ::128] = 448
    if scale >= e4m3.SMALLEST_MAX:
        x = jnp.asarray(values * np.float32(scale))
        np.testing.assert_array_equal(dequantized(quantize_fp8_blocks(x)), x)


def test_small_and_zero_groups_stop_at_the_floor():
    zero = jnp.zeros((2, 128))
    assert set(np.asarray(quantize_fp8_groups(zero, 128).scale).flat) == {127 - 22}
    assert set(np.asarray(quantize_mxfp4(zero).scale).flat) == {1}
    assert not np.asarray(dequantized(quantize_mxfp4(zero))).any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (129, 127), (300, 5), (7, 385)])
def test_blocks_of_awkward_matrices(rows, columns):
    x = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    quantised = quantize_fp8_blocks(jnp.asarray(x))
    assert quantised.scale.shape == (-(-rows // 128), -(-columns // 128))
    got = np.asarray(dequantized(quantised))
    target = np.empty_like(x)
    assert dequantize_into(
        target, np.asarray(quantised.elements), np.asarray(quantised.scale).view(ml_dtypes.float8_e8m0fnu)
    )
    np.testing.assert_array_equal(got, target)  # the loader's own decoder
    assert np.abs(got - x).max() <= np.abs(x).max() * 2.0**-4


def test_nibbles_are_low_first():
    packed = e2m1.pack(jnp.asarray([[1, 2, 3, 15]], jnp.uint8))
    assert np.asarray(packed).tolist() == [[0x21, 0xF3]]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(e2m1.pack(e2m1.unpack(every)), every)


@pytest.mark.parametrize("shape", [(128, 128), (130, 160), (2, 1, 32)])
def test_fp4_fits_fp8_without_loss(shape):
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
    scale = rng.integers(100, 115, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)  # 2^14 apart
    fp4 = blocks.Mxfp4(jnp.asarray(packed), jnp.asarray(scale))
    np.testing.assert_array_equal(bits(dequantized(blocks.fp4_as_fp8(fp4))), bits(dequantized(fp4)))


@pytest.mark.parametrize(("low", "high"), [(100, 115), (0, 5)])
def test_fp4_too_far_apart_for_fp8(low, high):
    scale = jnp.full((256, 4), low, jnp.uint8).at[200, 2].set(high)
    nonzero = jnp.full((256, 64), 0x11, jnp.uint8)
    if low == 0:
        with pytest.raises(ValueError, match=r"2 blocks .* \(0, 0\), \(1, 0\)"):
            blocks.fp4_as_fp8(blocks.Mxfp4(nonzero, scale))
        return
    with pytest.raises(ValueError, match=r"1 blocks .* \(1, 0\)"):
        blocks.fp4_as_fp8(blocks.Mxfp4(nonzero, scale.at[200, 2].add(1)))
    zeros_elsewhere = jnp.zeros_like(nonzero).at[200, 32:48].set(0x11)
    recast = blocks.fp4_as_fp8(blocks.Mxfp4(zeros_elsewhere, scale.at[200, 2].add(1)))
    assert float(jnp.abs(dequantized(recast)).sum()) > 0


def test_channels_must_be_whole_groups():
    with pytest.raises(ValueError, match="100 channels are not whole groups of 32"):
        blocks.quantize_mxfp4(jnp.zeros((1, 100)))


def test_formats_are_pytrees_of_their_own_size():
    key = quantize_mxfp4(jnp.ones((5, 128)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(key)) == 5 * 68
    sliced = jax.tree.map(lambda leaf: leaf[2], key)
    assert sliced.dequantize().shape == (128,)
