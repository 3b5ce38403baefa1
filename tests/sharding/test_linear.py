"""Products with split weights: the numbers and gradients of one device, and no weight that moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_matmul
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.formats.weights import QuantizedWeight
from sharding.activations import Placement
from sharding.linear import LinearOverMesh
from sharding.mesh import mesh_of
from sharding.rules import DECODE, TRAIN

RNG = np.random.default_rng(0)


def linear(x, weight):
    return block_matmul.linear(x, weight, impl="xla")


def kernel(x, weight):
    return block_matmul.linear(x, weight, impl="pallas", interpret=True)


def grouped(x, weight):
    return block_matmul.grouped_linear(x, weight, impl="xla")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def fp8(*shape, dims, stack=None):
    """An FP8 weight [*leading, O, I] whose plain dims are `dims`; `stack` repeats, of which one is used."""
    front = shape if stack is None else (stack, *shape)
    elements = jnp.asarray(RNG.integers(-8, 8, front), jnp.float8_e4m3fn)
    scale = RNG.integers(124, 128, (*front[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))).astype(np.uint8)
    weight = QuantizedWeight(Fp8Blocks(elements, jnp.asarray(scale)), dims)
    return weight if stack is None else weight.at(jnp.int32(1))


def compare(mesh, table, function, x, weight, is_grouped=False, gradients=True, **letters):
    placement = Placement(mesh_of(mesh), table)
    over = LinearOverMesh(function, placement, is_grouped, by_device=True)
    want = function(x, weight)
    for by_rows in (False, True):
        got = jax.jit(lambda x, w, by_rows=by_rows: over(x, w, **letters, by_rows=by_rows))(x, weight)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    if gradients:
        dy = normal(*want.shape)
        pull = [
            jax.jit(jax.grad(lambda x, w, f=f: (f(x, w) * dy).sum(), (0, 1)))
            for f in (lambda x, w: over(x, w, **letters), function)
        ]
        for a, b in zip(pull[0](x, weight), pull[1](x, weight), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    return over


@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "data=2,expert=2", "data=1"])
@pytest.mark.parametrize("batch", [8, 3])
def test_outputs_sums_and_groups(mesh, batch):
    """Three rows are no multiple of any axis: they are whole on every device."""
    compare(mesh, DECODE, linear, normal(batch, 2, 16), normal(8, 3, 5, 16), out=(("G", 0),))
    compare(mesh, DECODE, linear, normal(batch, 16), normal(2, 24, 16), out=(("F", 1),))
    compare(mesh, DECODE, linear, normal(batch, 2, 24), normal(7, 24), over=(("G", 8),))
    compare(mesh, DECODE, grouped, normal(batch, 2, 8, 6), normal(8, 4, 6), True, out=(("G", 0),))
    compare(mesh, DECODE, linear, normal(batch, 2, 16), normal(9, 16))
    # Groups of one head each on their devices, whose heads are split further; one letter alone could not be.
    compare(mesh, DECODE, linear, normal(batch, 2, 16), normal(4, 6, 3, 16), out=(("G", 0), ("J", 1)))
    compare(mesh, DECODE, grouped, normal(batch, 2, 4, 6), normal(4, 8, 6), True, out=(("G", 0), ("O", 1)))
    compare(mesh, DECODE, linear, normal(batch, 2, 24), normal(7, 24), over=(("G", 4), ("O", 6)))


def test_rows_stay_split_over_tokens():
    compare("context=2,tensor=2", TRAIN, linear, normal(2, 4, 16), normal(4, 3, 16), out=(("G", 0),))
    compare("context=2,tensor=2", TRAIN, linear, normal(2, 4, 3, 16), normal(5, 16))


@pytest.mark.parametrize("function", [linear, kernel])
def test_quantised_weights_are_cut_with_their_scales(function):
    mesh = "expert=2,tensor=2,data=2"
    held = fp8(512, 128, dims=(4, 1, 128, 128), stack=2)
    over = compare(mesh, DECODE, function, normal(8, 1, 128), held, gradients=False, out=(("G", 0),))
    assert over.axes(held, (("G", 0),)) == [("expert", "tensor")]
    heads = fp8(512, 128, dims=(2, 2, 128, 128))
    over = compare(mesh, DECODE, function, normal(8, 128), heads, gradients=False, out=(("G", 0), ("J", 1)))
    assert over.axes(heads, (("G", 0), ("J", 1))) == [("expert",), ("tensor",)]
    more = fp8(1024, 128, dims=(4, 2, 128, 128))  # four groups on two devices: their heads are not one range
    assert over.axes(more, (("G", 0), ("J", 1))) == [("expert", "tensor"), ()]
    both = fp8(2, 256, 128, dims=(256, 128))
    over = compare(mesh, DECODE, function, normal(8, 128), both, gradients=False, out=(("F", 1),))
    assert over.axes(both, (("F", 1),)) == [("expert",)]  # four parts would cut a block of 128
    down = fp8(128, 256, dims=(128, 256))
    over = compare(mesh, DECODE, function, normal(8, 256), down, gradients=False, over=(("F", 256),))
    assert over.axes(down, over=(("F", 256),)) == [("expert",)]


def test_what_is_moved_is_rows():
    """No collective is as large as a device's part of the weight, whose bytes are counted."""
    placement = Placement(mesh_of("expert=4,tensor=2"), DECODE)
    over = LinearOverMesh(linear, placement, False, by_device=False)
    mesh = placement.mesh
    x = jax.device_put(normal(8, 1, 64), jax.NamedSharding(mesh, jax.P(("expert", "tensor"))))
    weight = jax.device_put(normal(8, 4, 32, 64), jax.NamedSharding(mesh, jax.P(("expert", "tensor"))))

    def step(x, weight):
        return placement.pinned(over(x, weight, out=(("G", 0), ("J", 1)), by_rows=True), "B T")

    text = jax.jit(step).lower(x, weight).compile().as_text()
    moved = [line for line in text.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert moved and "all-reduce(" not in text and "all-gather" in text
    for line in moved:
        sizes = [int(n) for n in line.split("[")[1].split("]")[0].split(",")]
        assert np.prod(sizes) <= max(8 * 64, 8 * 4 * 32), line
