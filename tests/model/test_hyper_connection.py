"""Stream mixing: values and hand-written gradients against plain einsums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hyper_connection import StreamMaps
from pallas_kernels.hyper_connection.xla import combine, expand


def operands(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (2, 5, 4, 7)  # B, T, N, D
    x = jax.random.normal(keys[0], shape).astype(dtype)
    y = jax.random.normal(keys[1], (2, 5, 7)).astype(dtype)
    pre, post = (jax.random.uniform(key, (4, 2, 5), jnp.float32) for key in keys[2:4])
    # Not symmetric, not stochastic: orientation shows.
    comb = jax.random.uniform(keys[4], (4, 4, 2, 5), jnp.float32)
    return x, y, pre, post, comb


def plain_combine(x, pre):
    return jnp.einsum("nbt,btnd->btd", pre, x.astype(jnp.float32)).astype(x.dtype)


def plain_expand(x, y, post, comb):
    mixed = jnp.einsum("jkbt,btjd->btkd", comb, x.astype(jnp.float32))
    return (mixed + jnp.einsum("kbt,btd->btkd", post, y.astype(jnp.float32))).astype(x.dtype)


def fused_expand(x, y, post, comb):
    return expand(x, y, StreamMaps(post, post, comb))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("which", ["combine", "expand"])
def test_values_and_gradients(which, dtype, tolerance):
    x, y, pre, post, comb = operands(dtype)
    args = (x, pre) if which == "combine" else (x, y, post, comb)
    ours, plain = (combine, plain_combine) if which == "combine" else (fused_expand, plain_expand)
    waves = jnp.sin(jnp.arange(7, dtype=jnp.float32))
    weigh = lambda f: lambda *args: (waves * f(*args).astype(jnp.float32)).sum()  # noqa: E731
    np.testing.assert_allclose(*(f(*args).astype(jnp.float32) for f in (ours, plain)), atol=tolerance)
    got, want = (jax.grad(weigh(f), tuple(range(len(args))))(*args) for f in (ours, plain))
    for mine, reference in zip(got, want, strict=True):
        assert mine.dtype == reference.dtype
        scale = np.abs(np.asarray(reference, np.float32)).max()
        difference = np.abs(np.asarray(mine, np.float32) - np.asarray(reference, np.float32)).max()
        assert difference <= tolerance * scale
