"""Exchanges of rows: the ragged one emulated, waves, and both compiled for TPUs that nobody here has."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.formats.blocks import Mxfp4
from pallas_kernels.grouped_matmul import expert_ffn
from sharding.dispatch_cost import ASYNCHRONOUS
from sharding.expert_parallel import over_mesh
from sharding.mesh import AXES
from tests.kernels.ahead_of_time import compile_on, devices
from tests.sharding.test_expert_parallel import (
    KE,
    WEIGHTS,
    T,
    compare,
    mesh_of,
    on_eight_devices,
    operands,
    values_and_gradients,
)

# ---- in a process of its own -------------------------------------------------------------------------------


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `ragged_all_to_all` is documented to do, where it does not exist; a wrong size spoils all."""
    me = lax.axis_index(axis_name)
    every = functools.partial(lax.all_gather, axis_name=axis_name)
    rows, starts, sizes, places = map(every, (operand, input_offsets, send_sizes, output_offsets))
    output = output + jnp.where((recv_sizes == sizes[:, me]).all(), 0, jnp.nan)
    for source in range(len(rows)):
        place = jnp.arange(len(output)) - places[source, me]
        coming = (place >= 0) & (place < sizes[source, me])
        row = rows[source].at[starts[source, me] + place].get(mode="clip")
        output = jnp.where(coming.reshape(-1, *[1] * (output.ndim - 1)), row, output)
    return output


def emulated_ragged():
    """Lists, offsets and masks of the ragged transport, in memory that holds NaN until it is written."""
    lax.ragged_all_to_all = emulated
    lax.empty = lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
    x, gate_up, down, _, weights = operands(hidden=128)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    expected = values_and_gradients(expert_ffn)
    for sizes, chunk, shared in (
        ({"expert": 4, "tensor": 2}, 18, False),
        ({"data": 2, "expert": 4}, 3, True),
    ):
        split = over_mesh(expert_ffn, mesh_of(**sizes), weight_axes=WEIGHTS, chunk=chunk, shared=shared)
        split = dataclasses.replace(split, transport="ragged")
        compare(values_and_gradients(split), expected, x, gate_up, down, weights, dy)


def waves():
    """Groups of experts one after the other, with and without further chunks, give the same sums."""
    x, gate_up, down, _, weights = operands()
    dy = jnp.ones_like(x)
    expected = values_and_gradients(expert_ffn)
    for chunk, shared in ((2, True), (3, False), (KE * T, False)):
        split = over_mesh(
            expert_ffn,
            mesh_of(data=4, expert=2),
            transport="all_to_all",
            waves=2,
            chunk=chunk,
            shared=shared,
            weight_axes=WEIGHTS,
        )
        compare(values_and_gradients(split), expected, x, gate_up, down, weights, dy)


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cases", "compared"), [(emulated_ragged, 2 * 7), (waves, 3 * 7)])
def test_eight_devices_compute_what_one_does(cases, compared):
    assert on_eight_devices(cases) == compared


def described(**sizes):
    own = [sizes.get(axis, 1) for axis in AXES]
    return jax.sharding.Mesh(np.array(devices("v6e")[: np.prod(own)]).reshape(own), AXES)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "ragged"])
def test_compiles_for_a_slice(transport):
    """Forward and backward, kernels included, with rows laid out in lanes and nothing cleared before."""
    mesh = described(expert=2, tensor=2)
    split = over_mesh(
        functools.partial(expert_ffn, impl="pallas"), mesh, transport=transport, chunk=64, weight_axes=WEIGHTS
    )
    of = jax.ShapeDtypeStruct
    shapes = (
        of((512, 256), jnp.bfloat16),
        of((8, 2, 256, 256), jnp.bfloat16),
        of((8, 256, 256), jnp.bfloat16),
        of((512, 4), jnp.int32),
        of((512, 4), jnp.float32),
    )
    cut = split.cut(*shapes[1:3])
    specs = (P(AXES), *cut.specs(layers=False), P(AXES), P(AXES))

    def loss(x, gate_up, down, ids, weights):
        return split(x, gate_up, down, ids, weights, swiglu_limit=10.0).sum()

    gradients = jax.value_and_grad(loss, (0, 1, 2, 4))
    text = compile_on(gradients, shapes, [NamedSharding(mesh, spec) for spec in specs]).as_text()
    assert "tpu_custom_call" in text
    assert ("ragged-all-to-all" in text) == (transport == "ragged")
    if transport == "ragged":
        assert "bf16[128,2,128]" in text  # two chunks of 64 rows, in lanes


def kernels_between(text):
    """Kernels of the experts that the compiled program runs while an exchange of rows is under way."""
    under_way, found = set(), set()
    for line in text[text.index("ENTRY") :].splitlines():
        made = re.match(r"\s*(?:ROOT )?%([\w.-]+) = .*?\b([a-z][\w-]*)\((%?)([\w.-]+)", line)
        if made is None:
            continue
        name, operation, _, operand = made.groups()
        if operation in ("all-to-all-start", "ragged-all-to-all-start"):
            under_way.add(name)
        elif operation in ("all-to-all-done", "ragged-all-to-all-done"):
            under_way.discard(operand)
        elif operation == "custom-call" and name.startswith("grouped_matmul") and under_way:
            found.add(name.split(".")[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "ragged"])
def test_waves_overlap_on_a_slice(transport):
    """With the compiler's options, both products of a wave run while rows of another one travel."""
    mesh = described(expert=4)
    experts = functools.partial(expert_ffn, impl="pallas")
    split = over_mesh(experts, mesh, transport=transport, waves=2, chunk=1024 * 4, weight_axes=WEIGHTS)
    of = jax.ShapeDtypeStruct
    shapes = (
        of((4096, 1024), jnp.bfloat16),
        of((16, 2, 1024, 1024), jnp.bfloat16),
        of((16, 1024, 1024), jnp.bfloat16),
        of((4096, 4), jnp.int32),
        of((4096, 4), jnp.float32),
    )
    specs = (P(AXES), *split.cut(*shapes[1:3]).specs(layers=False), P(AXES), P(AXES))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    run = functools.partial(split, swiglu_limit=10.0)
    assert kernels_between(compile_on(run, shapes, shardings).as_text()) == set()  # synchronous by default
    with_options = jax.jit(run, in_shardings=shardings).lower(*shapes)
    jax.config.update("jax_enable_compilation_cache", False)  # as in `compile_on`
    try:
        text = with_options.compile(compiler_options=ASYNCHRONOUS).as_text()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert kernels_between(text) == {"grouped_matmul_swiglu", "grouped_matmul_output"}


@pytest.mark.slow
def test_decode_reads_its_stacks_in_place():
    """Two gathers of few tokens and one sum; FP4 experts of two layers are neither copied nor moved."""
    mesh = described(expert=2, tensor=2)
    split = over_mesh(functools.partial(expert_ffn, impl="pallas"), mesh, weight_axes=WEIGHTS)
    of = jax.ShapeDtypeStruct
    layers, experts, hidden, width = 2, 16, 4096, 2048
    gate_up = (layers, experts, 2, width, hidden)
    down = (layers, experts, hidden, width)

    def mxfp4(*front, columns):
        return Mxfp4(of((*front, columns // 2), jnp.uint8), of((*front, columns // 32), jnp.uint8))

    stacks = mxfp4(*gate_up[:-1], columns=hidden), mxfp4(*down[:-1], columns=width)
    tokens = of((32, hidden), jnp.bfloat16), of((32, 6), jnp.int32), of((32, 6), jnp.float32)
    travel = split.travel(*stacks, tokens[0], 6)
    assert travel.transport == "gather" and travel.cut.width
    specs = travel.cut.specs(layers=True)
    leaves = [
        (leaf, spec) for stack, spec in zip(stacks, specs, strict=True) for leaf in jax.tree.leaves(stack)
    ]
    shapes = (*tokens, of((), jnp.int32), *(leaf for leaf, _ in leaves))
    specs = (P(AXES), P(AXES), P(AXES), P(), *(spec for _, spec in leaves))

    def run(x, ids, weights, repeat, a, b, c, d):
        return split(x, Mxfp4(a, b), Mxfp4(c, d), ids, weights, swiglu_limit=10.0, repeat=repeat)

    compiled = compile_on(run, shapes, [NamedSharding(mesh, spec) for spec in specs])
    text, memory = compiled.as_text(), compiled.memory_analysis()
    count = lambda operation: len(re.findall(rf" {operation}\(", text))  # noqa: E731
    assert count("all-gather") == 2 and count("all-to-all") == 1
    assert count("collective-permute") == count("reduce-scatter") == count("all-reduce") == 0
    # One layer is half of the arguments.
    assert memory.argument_size_in_bytes > 10 * memory.temp_size_in_bytes
