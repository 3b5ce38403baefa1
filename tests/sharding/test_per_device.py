"""Kernels on a mesh: each device gets its own part, and gradients of shared operands are summed."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.hybrid_attention import hybrid_attention
from sharding.per_device import per_device
from tests.kernels.ahead_of_time import compile_on, devices

# Rows over "data", heads over "model": the keys are whole on every device of a row.
IN_SPECS = (P("data", None, "model"), P("data"), P("data"), P("model"))
OUT_SPECS = P("data", None, "model")
WINDOW = 16


def attention(q, line, position, sink, **how):
    return hybrid_attention(q, line, position, sink, window=WINDOW, **how)[0]


def shapes(batch=4, length=64, heads=16, width=128):
    of = jax.ShapeDtypeStruct
    return (
        of((batch, length, heads, width), jnp.bfloat16),
        of((batch, WINDOW - 1 + length, width), jnp.bfloat16),
        of((batch, length), jnp.int32),
        of((heads,), jnp.float32),
    )


def described_mesh():
    return jax.sharding.Mesh(np.array(devices("v6e")).reshape(2, 2), ("data", "model"))


def loss(function, *operands):
    return function(*operands).astype(jnp.float32).sum()


def test_each_device_of_a_slice_runs_the_kernel_on_its_part():
    mesh = described_mesh()
    split = per_device(attention, mesh, IN_SPECS, OUT_SPECS)
    placed = [NamedSharding(mesh, spec) for spec in IN_SPECS]
    forward = compile_on(split, shapes(), placed).as_text()
    assert "tpu_custom_call" in forward
    assert "bf16[2,64,8,128]" in forward  # half of the rows, half of the heads
    assert not any(word in forward for word in ("all-gather", "all-reduce", "all-to-all"))
    gradients = jax.grad(functools.partial(loss, split), argnums=(0, 1, 3))
    backward = compile_on(gradients, shapes(), placed).as_text()
    assert "all-reduce" in backward and "all-gather" not in backward


def test_the_compiler_does_not_split_kernels_itself():
    placed = [NamedSharding(described_mesh(), spec) for spec in IN_SPECS]
    with pytest.raises(NotImplementedError, match="shard_map"):
        compile_on(attention, shapes(), placed)


def test_errors_name_every_problem():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
    with pytest.raises(ValueError, match=r"\['heads', 'rows'\] are not in the mesh"):
        per_device(attention, mesh, (P("rows"),), P("data", "heads"))
    with pytest.raises(ValueError, match=r"1 arguments, but 4 specs"):
        per_device(attention, mesh, IN_SPECS, OUT_SPECS)(1)
    operands = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes(batch=3, heads=5)]
    with pytest.raises(ValueError, match=r"argument 0: dim 0 .*; argument 0: dim 2 .*; argument 3: dim 0"):
        per_device(attention, mesh, IN_SPECS, OUT_SPECS)(*operands)


# A process of its own: the number of host devices is fixed when JAX starts.
ON_FOUR_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from sharding.per_device import per_device
from tests.sharding.test_per_device import IN_SPECS, OUT_SPECS, attention, shapes

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
q, line, position, sink = shapes(batch=2, length=24, heads=4, width=128)
draw = lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32)
operands = (draw(q), draw(line), jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24)), draw(sink))
split = per_device(functools.partial(attention, interpret=True), mesh, IN_SPECS, OUT_SPECS)
whole = functools.partial(attention, impl="reference")
pull = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)


def values(f):
    return [f(*operands)]


def gradients(f):
    loss = lambda q, line, sink: (f(q, line, operands[2], sink) * pull).sum()
    return jax.grad(loss, (0, 1, 2))(*operands[:2], operands[3])


for results in (values, gradients):
    for got, want in zip(jax.jit(lambda: results(split))(), results(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
        print("compared", got.shape)
"""


def test_values_and_gradients_on_four_devices():
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as other tests
    ran = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("compared") == 4
