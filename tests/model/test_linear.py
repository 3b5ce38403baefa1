"""Products with weights: one row against bfloat16 takes another way on a CPU, to the same numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model.linear import project_float32
from pallas_kernels.block_matmul import linear

project = functools.partial(linear, impl="xla")


def operands(shape, width, dtype, tokens=1):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, 1, width)), dtype)
    return x, jnp.asarray(rng.standard_normal((*shape, width)), jnp.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (37,), (3, 5)], ids=str)
@pytest.mark.parametrize("width", [16, 80, 512, 24, 1])  # the last two are not whole vectors
@pytest.mark.parametrize("product", [project, project_float32])
def test_one_row_of_bfloat16(product, shape, width):
    dtype = jnp.bfloat16 if product is project else jnp.float32
    x, weight = operands(shape, width, dtype)
    got = jax.jit(product)(x, weight)
    want = np.einsum("...d,od->...o", np.float64(x), np.float64(weight).reshape(-1, width))
    assert got.dtype == dtype and got.shape == (1, 1, *shape)
    bound = 2.0**-8 if product is project else 1e-6  # one rounding of the result
    got = np.float64(got).reshape(1, 1, -1)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


@pytest.mark.parametrize(("tokens", "platform"), [(1, "cpu"), (2, "cpu"), (1, "tpu"), (1, "cuda")])
def test_only_one_row_on_a_cpu_is_streamed(tokens, platform):
    traced = jax.jit(project).trace(*operands((300,), 512, jnp.bfloat16, tokens))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo.dot_general.*: \(tensor<\d+x512xbf16>", program)
    assert len(products) == (tokens > 1 or platform != "cpu")
