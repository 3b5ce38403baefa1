"""Operations of which every device has some rows: the results of one device, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv4_jax.model.entries import Entries
from dsv4_jax.model.operations import Queries, operations
from dsv4_jax.numerics import cache_storage
from dsv4_jax.numerics.cache_formats import store_entries, store_keys
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.core_attention.op import SPLITS
from pallas_kernels.hybrid_attention import hybrid_attention
from pallas_kernels.hybrid_attention.op import SPLITS as HYBRID
from pallas_kernels.hyper_connection.tuning import HyperConnectionBlocks
from sharding.activations import Placement
from sharding.by_device import ByDevice
from sharding.mesh import mesh_of
from sharding.rules import DECODE, TRAIN
from tests.kernels.ahead_of_time import compile_on, devices

RNG = np.random.default_rng(0)
PLACEMENT = Placement(mesh_of("data=2,expert=2"), DECODE)
SMALL = HyperConnectionBlocks(16, 128)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def both(policy, placement=PLACEMENT):
    """The operations on one device and on the mesh."""
    return operations(policy, SMALL), operations(policy, SMALL, placement)


def equal(name, policy, *operands, placement=PLACEMENT, tolerance=0.0, **more):
    one, spread = (getattr(each, name) for each in both(policy, placement))
    want = jax.jit(lambda *a: one(*a, **more))(*operands)
    got = jax.jit(lambda *a: spread(*a, **more))(*operands)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=tolerance
        )
    return got


KERNELS = pytest.mark.parametrize("kernels", ["xla", "pallas-interpret"])


@KERNELS
def test_hyper_connections(kernels):
    policy = Policy.of("float32", kernels=kernels)
    n, d, rows = 2, 128, 8
    streams, update = normal(4, 3, n, d), normal(4, 3, d)
    weights = normal(rows, n, d) * 0.1, normal(rows), jnp.full(3, 0.1, jnp.float32), normal(d)
    how = {"num_iters": 3, "hc_eps": 1e-6, "norm_eps": 1e-6}
    # The order of sums is the compiler's choice, by the number of rows.
    _, maps = equal("enter", policy, streams, *weights, tolerance=2e-6, **how)
    equal("leave", policy, streams, update, maps, tolerance=2e-6)
    equal("advance", policy, streams, update, maps, *weights, tolerance=5e-6, **how)
    last = normal(n, n, d) * 0.1, normal(n), jnp.full(1, 0.1, jnp.float32)
    equal("collapse", policy, streams, *last, tolerance=2e-6, hc_eps=1e-6, norm_eps=1e-6)


@KERNELS
@pytest.mark.parametrize("format", ["plain", "fp8+mxfp4"])
def test_writing_entries_and_rings(kernels, format):
    policy = Policy.of("float32", kernels=kernels, cache=format)
    bits = operations(policy).cache_of_bits
    store = lambda x: store_keys(x, format)  # noqa: E731
    stack = cache_storage.empty_stack((2, 4, 128, 128), store, np.dtype("float32"), bits)
    first, count = jnp.asarray([0, 3, 120, 5], jnp.int32), jnp.asarray([2, 0, 1, 2], jnp.int32)
    equal("store", policy, stack, jnp.int32(1), store(normal(4, 2, 128)), first, count)
    store = lambda x: store_entries(x, format, 64)  # noqa: E731
    ring = cache_storage.empty((2, 4, 12, 512), store, np.dtype("float32"), bits)
    equal("keep", policy, ring, jnp.int32(0), store(normal(4, 3, 512)), first, count)


def attention(placement, policy, tolerance):
    heads, width = 4, 128
    batch, length, window = 4, 3, 8
    queries = Queries(
        normal(batch, length, heads, width),
        jnp.broadcast_to(jnp.arange(20, 20 + length, dtype=jnp.int32), (batch, length)),
        jnp.zeros((batch, length), jnp.int32),
        jnp.full((batch, length), 5, jnp.int32),
        None,
        None,
    )
    line = normal(batch, window - 1 + length, width)
    entries = Entries(normal(1, batch, 16, width), jnp.int32(0))
    sizes = {"window": window, "top_k": 4, "rounded_scores": False, "forward_only": True}
    operands = (queries, line, entries, None, normal(heads))
    return equal("attend", policy, *operands, placement=placement, tolerance=tolerance, **sizes)


@KERNELS
def test_attention(kernels):
    policy = Policy.of("float32", kernels=kernels)
    out = attention(PLACEMENT, policy, 1e-6)
    assert out.sharding.spec[0] == ("data", "expert")
    out = attention(Placement(mesh_of("data=2,tensor=2"), TRAIN), policy, 1e-6)
    assert out.sharding.spec[0] == "data" and out.sharding.spec[2] == "tensor"


@KERNELS
def test_compressor(kernels):
    policy = Policy.of("float32", kernels=kernels)
    m, w, width, blocks = 4, 2, 128, 2
    rows = normal(4, 8, w, width), normal(4, 8, w, width)
    weights = normal(m, w, width), normal(width)
    angles = normal(4, blocks, 32)
    source = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32).reshape(blocks, m), (4, blocks, m))
    more = {
        "is_first": jnp.broadcast_to(jnp.arange(blocks) == 0, (4, blocks)),
        "source": source,
        "previous": jnp.maximum(source - m, 0),
    }
    one, spread = both(policy)
    operands = (*rows, *weights, jnp.cos(angles), jnp.sin(angles))
    want = jax.jit(lambda *a, **k: one.compress(*a, **k, eps=1e-6, dtype=jnp.float32))(*operands, **more)
    got = jax.jit(lambda *a, **k: spread.compress(*a, **k, eps=1e-6, dtype=jnp.float32))(*operands, **more)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    assert got.sharding.spec == P(("data", "expert"))


def test_nothing_moves_between_devices():
    """Rows that lie where they are wanted: no collective stands in the program."""
    policy = Policy.of("float32")
    spread = both(policy)[1]
    ring = PLACEMENT.put(np.zeros((2, 4, 12, 128), np.float32), "R B")
    new, start = (
        PLACEMENT.put(np.ones((4, 3, 128), np.float32), "B"),
        PLACEMENT.put(np.zeros(4, np.int32), "B"),
    )

    def step(ring, new, start):
        return spread.keep(ring, jnp.int32(1), new, start, start + 3)

    text = jax.jit(step).lower(ring, new, start).compile().as_text()
    assert not any(
        f"{name}(" in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    )


def test_a_table_is_a_key():
    same = SPLITS["attend"]._replace(arguments=dict(SPLITS["attend"].arguments))
    assert hash(same) == hash(SPLITS["attend"]) and same == SPLITS["attend"]
    assert len({SPLITS["attend"], SPLITS["attend_cached"], same}) == 2


def test_what_is_refused():
    with pytest.raises(ValueError, match="K, T must be whole on every device; B H may be split"):
        ByDevice(hybrid_attention, PLACEMENT, HYBRID["hybrid_attention"], "T", "K")
    over = ByDevice(hybrid_attention, PLACEMENT, HYBRID["hybrid_attention"], "B", "H")
    with pytest.raises(ValueError, match="no operand has a dim H"):
        over(line=normal(4, 9, 128))


# Rows over data, heads over tensor: the keys are whole on every device of a row.
WINDOW = 16


def window_attention(placement=None, **how):
    """A function of q, line, position and sink, on a mesh or on one device."""
    run = functools.partial(hybrid_attention, window=WINDOW, **how)
    over = run if placement is None else ByDevice(run, placement, HYBRID["hybrid_attention"], "B", "H")
    return lambda *operands: over(*operands)[0]


def test_gradients_of_what_is_whole_on_several_devices():
    batch, length, heads, width = 2, 24, 4, 128
    q, line, sink = (
        normal(batch, length, heads, width),
        normal(batch, WINDOW - 1 + length, width),
        normal(heads),
    )
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    pull = normal(*q.shape)
    placement = Placement(mesh_of("data=2,tensor=2"), TRAIN)

    def results(run):
        loss = lambda q, line, sink: (run(q, line, position, sink) * pull).sum()  # noqa: E731
        return jax.jit(lambda *operands: (run(q, line, position, sink), jax.grad(loss, (0, 1, 2))(*operands)))

    got = results(window_attention(placement, interpret=True))(q, line, sink)
    want = results(window_attention(impl="reference"))(q, line, sink)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


def test_each_chip_of_a_slice_runs_the_kernel_on_its_part():
    mesh = mesh_of("data=2,tensor=2", devices("v6e"))
    of = jax.ShapeDtypeStruct
    shapes = (
        of((4, 64, 16, 128), jnp.bfloat16),
        of((4, WINDOW - 1 + 64, 128), jnp.bfloat16),
        of((4, 64), jnp.int32),
        of((16,), jnp.float32),
    )
    specs = (P("data", None, "tensor"), P("data"), P("data"), P("tensor"))
    placed = [NamedSharding(mesh, spec) for spec in specs]
    split = window_attention(Placement(mesh, TRAIN))
    forward = compile_on(split, shapes, placed).as_text()
    assert "tpu_custom_call" in forward
    assert "bf16[2,64,8,128]" in forward  # half of the rows, half of the heads
    assert not any(word in forward for word in ("all-gather", "all-reduce", "all-to-all"))
    loss = lambda *operands: split(*operands).astype(jnp.float32).sum()  # noqa: E731
    backward = compile_on(jax.grad(loss, argnums=(0, 1, 3)), shapes, placed).as_text()
    assert "all-reduce" in backward and "all-gather" not in backward
    with pytest.raises(NotImplementedError, match="shard_map"):  # the compiler does not split kernels itself
        compile_on(window_attention(), shapes, placed)
