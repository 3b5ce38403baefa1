"""Block-scaled formats against scalar arithmetic written out once more."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.checkpoint.dequantize import dequantize_into, fp4_scale_shape, fp8_scale_shape

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]


def e4m3(code: int) -> float:
    """One E4M3FN code by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def e8m0(codes: np.ndarray) -> np.ndarray:
    """Scale bytes as float64."""
    return 2.0 ** (codes.astype(np.float64) - 127)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (130, 260), (2, 3, 200, 40)])
def test_fp8_blocks(shape, dtype):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 0x7F, shape, dtype=np.uint8)
    codes |= rng.integers(0, 2, shape, dtype=np.uint8) << 7
    scales = rng.integers(100, 140, fp8_scale_shape(shape), dtype=np.uint8)
    target = np.full(shape, np.nan, dtype)
    weight, scale = codes.view(ml_dtypes.float8_e4m3fn), scales.view(ml_dtypes.float8_e8m0fnu)
    assert dequantize_into(target, weight, scale)
    values = np.vectorize(e4m3)(codes)
    blocks = np.repeat(np.repeat(e8m0(scales), 128, -2), 128, -1)[..., : shape[-2], : shape[-1]]
    np.testing.assert_array_equal(target.astype(np.float64), values * blocks)
    zeros = values == 0
    assert (np.signbit(target.astype(np.float32))[zeros] == np.signbit(values)[zeros]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [np.int8, np.uint8])
@pytest.mark.parametrize("shape", [(1, 32), (130, 96), (3, 5, 64)])
def test_fp4_groups(shape, packed, dtype):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)  # one code a value, 8 is negative zero
    packed_codes = (codes[..., 0::2] | codes[..., 1::2] << 4).view(packed)
    scales = rng.integers(0, 250, fp4_scale_shape(shape), dtype=np.uint8)
    scales = np.clip(scales, 10, 240)
    target = np.full(shape, np.nan, dtype)
    assert dequantize_into(target, packed_codes, scales.view(ml_dtypes.float8_e8m0fnu))
    signs = np.where(codes & 8, -1.0, 1.0)
    values = signs * np.array(FP4_VALUES)[codes & 7]
    np.testing.assert_array_equal(target.astype(np.float64), values * np.repeat(e8m0(scales), 32, -1))
    assert (np.signbit(target.astype(np.float32)) == (codes >= 8)).all()


def test_byte_a3_is_plus_1_5_then_minus_1():
    weight = np.zeros((1, 16), np.int8)
    weight[0, 0] = np.uint8(0xA3).view(np.int8)
    target = np.empty((1, 32), np.float32)
    assert dequantize_into(target, weight, np.ones((1, 1), np.float32))
    assert target[0, :3].tolist() == [1.5, -1.0, 0.0]


def test_scale_byte_zero_is_a_subnormal_and_not_zero():
    scale = np.zeros((1, 1), np.uint8).view(ml_dtypes.float8_e8m0fnu)
    weight = np.array([[0x38, 0x01]], np.uint8).view(ml_dtypes.float8_e4m3fn)  # 1 and 2^-9
    target = np.empty((1, 2), np.float32)
    assert dequantize_into(target, weight, scale)
    assert target.tolist() == [[2.0**-127, 2.0**-136]]
    narrow = np.empty((1, 2), ml_dtypes.bfloat16)
    assert dequantize_into(narrow, weight, scale)
    assert float(narrow[0, 0]) == 2.0**-127


def test_float32_scales_of_any_value():
    weight = np.array([[0x38] * 3], np.uint8).view(ml_dtypes.float8_e4m3fn)
    target = np.empty((1, 3), np.float32)
    assert dequantize_into(target, weight, np.array([[0.3]], np.float32))
    assert (target == np.float32(0.3)).all()


@pytest.mark.parametrize(("code", "scale"), [(0x7F, 127), (0xFF, 127), (0x38, 255), (0x7E, 254)], ids=hex)
def test_results_that_are_not_finite_are_told(code, scale):
    weight = np.full((130, 4), 0x38, np.uint8)
    weight[129, 3] = code
    scales = np.full((2, 1), 127, np.uint8)
    scales[1] = scale
    target = np.empty((130, 4), ml_dtypes.bfloat16)
    weight, scales = weight.view(ml_dtypes.float8_e4m3fn), scales.view(ml_dtypes.float8_e8m0fnu)
    assert not dequantize_into(target, weight, scales)
    assert dequantize_into(target[:128], weight[:128], scales[:1])


@pytest.mark.parametrize(
    ("weight", "scale", "target"),
    [
        ((128, 128), (1, 2), (128, 128)),
        ((128, 128), (4, 4), (128, 128)),
        ((128, 64), (1, 1), (128, 128)),
    ],
)
def test_shapes_must_belong_together(weight, scale, target):
    with pytest.raises(ValueError, match="does not fill"):
        dequantize_into(
            np.empty(target, np.float32),
            np.zeros(weight, ml_dtypes.float8_e4m3fn),
            np.ones(scale, np.float32),
        )
    with pytest.raises(ValueError, match="does not fill"):  # FP4 rows of 48: no whole groups
        dequantize_into(
            np.empty((2, 48), np.float32), np.zeros((2, 24), np.int8), np.ones((2, 1), np.float32)
        )
