"""Fake quantisation: values on the grid, gradients untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.errors import ConfigError
from dsv4_jax.numerics import qat
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.blocks import quantize_fp8_groups, quantize_mxfp4
from pallas_kernels.grouped_matmul import expert_ffn

ROUNDINGS = {
    name: jax.jit(rounding)
    for name, rounding in {
        "fake_fp8": lambda x: qat.fake_fp8(x, 64),
        "fake_mxfp4": qat.fake_mxfp4,
        "fake_activation": qat.fake_activation,
        "fake_entry": lambda x: qat.fake_entry(x, 16),
        "to_bfloat16": qat.to_bfloat16,
    }.items()
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_gradient_is_the_cotangent_bit_for_bit(name):
    x, pull = draw(3, 100), draw(3, 100, seed=1) * jnp.float32(1e-3)
    y, back = jax.vjp(ROUNDINGS[name], x)
    assert np.asarray(y != x).any()
    np.testing.assert_array_equal(back(pull)[0], pull)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding_twice_is_rounding_once(name):
    once = ROUNDINGS[name](draw(4, 100))
    np.testing.assert_array_equal(ROUNDINGS[name](once), once)


def test_whole_groups_are_the_stored_format():
    x = draw(2, 256)
    stored = jax.jit(lambda x: quantize_fp8_groups(x, 64).dequantize())
    fake_fp8 = ROUNDINGS["fake_fp8"]
    np.testing.assert_array_equal(fake_fp8(x), stored(x))
    stored = jax.jit(lambda x: quantize_mxfp4(x).dequantize())
    np.testing.assert_array_equal(ROUNDINGS["fake_mxfp4"](x), stored(x))
    entry = jax.jit(lambda x: qat.fake_entry(x, 64))(x)
    np.testing.assert_array_equal(entry[:, 192:], x[:, 192:])
    np.testing.assert_array_equal(entry[:, :192], fake_fp8(x[:, :192]))


def test_a_broken_last_group_has_its_own_scale():
    x = jnp.concatenate([draw(64) * 1000, draw(8)])
    alone = jax.jit(lambda x: qat.fake_fp8(x, 8))
    np.testing.assert_array_equal(ROUNDINGS["fake_fp8"](x)[64:], alone(x[64:]))


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_its_own_inverse(n):
    x = qat.to_bfloat16(draw(5, n))
    y = qat.hadamard(x)
    np.testing.assert_array_equal(y, qat.to_bfloat16(y))
    np.testing.assert_allclose(qat.hadamard(y), x, atol=2e-2)
    np.testing.assert_allclose((y * y).sum(-1), (x * x).sum(-1), rtol=1e-2)
    first = np.zeros(n, np.float32)
    first[0] = 1
    np.testing.assert_allclose(qat.hadamard(jnp.asarray(first)), np.full(n, n**-0.5), rtol=4e-3)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_no_rows_are_no_problem(name):
    """A prompt shorter than a block has no entries."""
    assert ROUNDINGS[name](jnp.zeros((2, 0, 100))).shape == (2, 0, 100)
    assert jax.eval_shape(qat.fake_index_vector, jnp.zeros((2, 0, 64))).shape == (2, 0, 64)


def test_hadamard_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two of channels, not 24"):
        qat.hadamard(jnp.zeros((1, 24)))


def test_experts_with_rounding_equal_the_reference_forward_and_backward():
    tokens, experts, hidden, width, top_k = 21, 5, 40, 24, 2
    rng = np.random.default_rng(3)
    operands = (draw(tokens, hidden), draw(experts, 2, width, hidden) / 6, draw(experts, hidden, width) / 5)
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k], jnp.int32)
    weights = jnp.asarray(rng.uniform(0.2, 2, (tokens, top_k)), jnp.float32)
    pull = draw(tokens, hidden, seed=9)

    @functools.partial(jax.jit, static_argnames="impl")
    def run(x, gate_up, down, weights, impl):
        return expert_ffn(
            x, gate_up, down, ids, weights, swiglu_limit=10.0, impl=impl, round_hidden=qat.fake_activation
        )

    def grads(impl):
        loss = lambda *trained: (run(*trained, impl) * pull).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*operands, weights)

    want = run(*operands, weights, "reference")
    np.testing.assert_allclose(run(*operands, weights, "xla"), want, atol=1e-5 * np.abs(want).max())
    plain = expert_ffn(*operands, ids, weights, swiglu_limit=10.0)
    assert np.abs(plain - want).max() > 1e-3 * np.abs(want).max()
    for got, expected in zip(grads("xla"), grads("reference"), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_policy_names_every_problem():
    with pytest.raises(ConfigError) as raised:
        more = {"master": "float64", "weights": "int4"}
        Policy.of("float16", "int8", kernels="cuda", switches={"act_fp8", "act_fp4"}, **more)
    text = str(raised.value)
    for word in ("float16", "int8", "cuda", "need numerics='qat'", "act_fp4", "float64", "int4"):
        assert word in text
    with pytest.raises(ConfigError, match="cannot compute idx_score_bf16"):
        Policy.of("float32", "qat", kernels="pallas")
    assert Policy.of("bfloat16", "qat").row_dtype == np.float32
    assert Policy.of("bfloat16").row_dtype == jnp.bfloat16
