"""Experts on a mesh: values and gradients of one device, for every transport and split; none is dropped."""

import dataclasses
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

from pallas_kernels.formats.blocks import Fp8Blocks, Mxfp4, quantize_fp8_blocks, quantize_mxfp4
from pallas_kernels.grouped_matmul import expert_ffn
from sharding.expert_parallel import over_mesh
from sharding.mesh import AXES
from tests.kernels.checks import assert_close

E, D, F, KE, T = 8, 64, 32, 3, 21  # T is no multiple of 8 devices
LIMIT = 1.5
WEIGHTS = {"E": "expert", "F": "tensor", "D": "fsdp"}
TOLERANCE = 1e-5  # float32, relative to the largest: only the order of sums differs
MESHES = [
    {"expert": 8},
    {"data": 2, "expert": 4},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"expert": 4, "tensor": 2},
    {"context": 2, "expert": 2, "tensor": 2},
    {},
]


def mesh_of(**sizes):
    own = [sizes.get(axis, 1) for axis in AXES]
    return jax.make_mesh(
        own, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5, devices=jax.devices()[: np.prod(own)]
    )


def operands(tokens=T, experts=E, hidden=D, width=F, layers=None, seed=0):
    """(x, gate_up, down, ids, weights) with distinct ids a token."""
    rng = np.random.default_rng(seed)
    front = () if layers is None else (layers,)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    ids = np.stack([rng.permutation(experts)[:KE] for _ in range(tokens)])
    return (
        draw(tokens, hidden),
        draw(*front, experts, 2, width, hidden) / hidden**0.5,
        draw(*front, experts, hidden, width) / width**0.5,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(rng.random((tokens, KE)), jnp.float32),
    )


def routings():
    """Name -> ids and valid of the same T tokens."""
    *_, ids, _ = operands()
    every, some = jnp.ones(T, bool), jnp.arange(T) % 3 != 1
    two_experts = jnp.where(ids == ids[:, :1], ids % 2 * 5, -1)  # on the first and the last half
    return {
        "distinct": (ids, every),
        "padding": (ids, some),
        "one expert": (jnp.where(jnp.arange(KE) == 1, 6, jnp.full_like(ids, -1)), every),
        "one expert in every pair": (jnp.full_like(ids, 6), every),
        "experts without tokens": (two_experts, some),
        "ids out of range": (ids.at[::2, 0].set(E).at[1::2, 2].set(-7), every),
        "nothing": (ids, ~every),
    }


def values_and_gradients(function):
    """(y, gradients of x, gate_up, down, weights) of a function like `expert_ffn`."""

    @jax.jit
    def run(x, gate_up, down, ids, weights, valid, dy):
        def call(x, gate_up, down, weights):
            return function(x, gate_up, down, ids, weights, swiglu_limit=LIMIT, valid=valid)

        y, pull = jax.vjp(call, x, gate_up, down, weights)
        return dict(zip(("y", "x", "gate_up", "down", "weights"), (y, *pull(dy)), strict=True))

    return run


def jitted(function):
    return jax.jit(lambda *operands, **more: function(*operands, swiglu_limit=LIMIT, **more))


# ---- in a process of its own: the number of host devices is fixed when JAX starts --------------------------


def compare(run, expected, x, *others):
    for name, (ids, valid) in routings().items():
        # Whatever stands in padding must reach nothing.
        rows = jnp.where(valid[:, None], x, jnp.nan)
        got, want = (f(rows, *others[:2], ids, others[2], valid, others[3]) for f in (run, expected))
        assert_close(got, want, TOLERANCE)
        assert float(jnp.abs(want["y"]).max()) > 0.1 or name == "nothing"
        assert not got["y"][~valid].any() and not got["x"][~valid].any()
        print("compared", name)


def every_axis():
    all_meshes([dict.fromkeys(AXES, 2)])


def all_meshes(meshes=MESHES):
    x, gate_up, down, _, weights = operands()
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    expected = values_and_gradients(expert_ffn)
    for sizes in meshes:
        mesh = mesh_of(**sizes)
        # Two rows at a time: lists of up to eighteen take as many rounds. Shared ones only where the mesh
        # is of another kind.
        exchanges = [{"transport": "all_to_all", "chunk": 2, "shared": shared} for shared in (False, True)]
        for how in ({"transport": "gather"}, *exchanges[: 1 if "data" in sizes or not sizes else 2]):
            split = over_mesh(expert_ffn, mesh, weight_axes=WEIGHTS, **how)
            compare(values_and_gradients(split), expected, x, gate_up, down, weights, dy)


def several_axes():
    """A letter over more than one axis, and an axis that goes to the first letter that can use it."""
    x, gate_up, down, _, weights = operands()
    dy, expected = jnp.ones_like(x), values_and_gradients(expert_ffn)
    exchange, gather = {"transport": "all_to_all", "chunk": 4}, {"transport": "gather"}
    for sizes, axes, how in (
        ({"data": 2, "expert": 4}, {"E": ("data", "expert")}, exchange),
        (
            {"data": 2, "expert": 2, "tensor": 2},
            {"E": "expert", "F": ("expert?", "data?", "tensor?")},
            gather,
        ),
    ):
        split = over_mesh(expert_ffn, mesh_of(**sizes), weight_axes=axes, **how)
        compare(values_and_gradients(split), expected, x, gate_up, down, weights, dy)


def quantised():
    """Stacks of layers in FP8 and FP4, read by number; parts of F and D are whole blocks of 128 and 32."""
    x, gate_up, down, ids, weights = operands(tokens=9, hidden=256, width=256, layers=2)
    forms = {
        "fp8": (quantize_fp8_blocks(gate_up), quantize_fp8_blocks(down)),
        "mxfp4": (quantize_mxfp4(gate_up), quantize_mxfp4(down)),
        "plain": (gate_up, down),
    }
    tensor, fsdp = {"expert": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2}
    gather, exchange = {"transport": "gather"}, {"transport": "all_to_all", "chunk": 2}
    some = [(tensor, exchange), (fsdp, gather)]
    cases = {"fp8": [*some, (tensor, gather), (fsdp, exchange)], "mxfp4": some, "plain": some}
    expected = jitted(expert_ffn)
    for name, stacks in forms.items():
        want = [expected(x, *stacks, ids, weights, repeat=jnp.int32(layer)) for layer in (0, 1)]
        assert np.abs(want[0] - want[1]).max() > 0.1
        for sizes, how in cases[name]:
            mesh = mesh_of(**sizes)
            split = over_mesh(expert_ffn, mesh, weight_axes=WEIGHTS, **how)
            cut = split.cut(*stacks)
            assert cut.experts == ("expert",)
            assert bool(cut.width) == ("tensor" in sizes)
            assert bool(cut.gate_up_hidden) == bool(cut.down_hidden) == ("fsdp" in sizes)
            placed = [
                jax.device_put(stack, NamedSharding(mesh, spec))
                for stack, spec in zip(stacks, cut.specs(layers=True), strict=True)
            ]
            got = jitted(split)(x, *placed, ids, weights, repeat=jnp.int32(1))
            assert_close(got, want[1], TOLERANCE)
            print("compared", name)


def quantised_gradients():
    """Of tokens and routing weights through FP8 gate_up, and of a plain down."""
    x, gate_up, down, ids, weights = operands(tokens=9, hidden=128, width=128)
    gate_up = quantize_fp8_blocks(gate_up)

    def gradients(function):
        def loss(x, down, weights):
            return (function(x, gate_up, down, ids, weights, swiglu_limit=LIMIT) * x).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, down, weights)

    want = gradients(expert_ffn)
    for how in ({"transport": "gather"}, {"transport": "all_to_all", "chunk": 1}):
        split = over_mesh(expert_ffn, mesh_of(data=2, expert=4), weight_axes=WEIGHTS, **how)
        assert_close(gradients(split), want, TOLERANCE)
        print("compared", how)


def bfloat16():
    """Gradients keep the dtypes of their operands, whatever number of chunks they are summed over."""
    x, gate_up, down, ids, weights = operands()
    halves = [a.astype(jnp.bfloat16) for a in (x, gate_up, down)]
    arguments = (*halves, ids, weights, jnp.ones(T, bool), jnp.ones_like(x))
    want = values_and_gradients(expert_ffn)(*arguments)
    exact = {"transport": "all_to_all", "chunk": 2}
    errors = []
    for how in ({"transport": "gather"}, exact, exact | {"narrow": True}):
        split = over_mesh(expert_ffn, mesh_of(data=2, expert=4), weight_axes=WEIGHTS, **how)
        got = values_and_gradients(split)(*arguments)
        errors.append(np.abs(got["y"] - want["y"]).max() / np.abs(want["y"]).max())
        assert jax.tree.map(jnp.dtype, got) == jax.tree.map(jnp.dtype, want)
        assert_close(got, want, 1e-2)
        print("compared", how)
    # Sums that come back in float32 differ by their order alone; narrow ones are rounded once.
    assert max(errors[:2]) < 1e-5 < errors[2]


def few_tokens():
    """Fewer tokens than devices, one, and none; and what is said and communicated in the program."""
    mesh = mesh_of(expert=8)
    for tokens in (5, 1, 0):
        x, gate_up, down, ids, weights = operands(tokens=max(tokens, 1))
        x, ids, weights = x[:tokens], ids[:tokens], weights[:tokens]
        want = expert_ffn(x, gate_up, down, ids, weights, swiglu_limit=LIMIT)
        for transport in ("auto", "all_to_all"):
            split = over_mesh(expert_ffn, mesh, transport=transport, weight_axes=WEIGHTS)
            got = jitted(split)(x, gate_up, down, ids, weights)
            assert got.shape == (tokens, D)
            assert_close(got, want, TOLERANCE)
            print("compared", tokens)


def traffic():
    """Whole arrays come in split, and nothing but tokens travels: no weights, and ids with their weights."""
    mesh, tokens = mesh_of(expert=8), 64
    x, gate_up, down, ids, weights = operands(tokens=tokens, layers=2)

    def text(**how):
        split = over_mesh(expert_ffn, mesh, weight_axes=WEIGHTS, **how)
        specs = (P(AXES), *split.cut(gate_up, down).specs(layers=True), P(AXES), P(AXES))
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip((x, gate_up, down, ids, weights), specs, strict=True)
        ]
        run = jax.jit(functools.partial(split, swiglu_limit=LIMIT))
        return run.lower(*placed, repeat=jnp.int32(1)).compile().as_text()

    def count(text, operation):
        return sum(f" {operation}(" in line for line in text.splitlines())

    gather, whole = text(transport="gather"), text(transport="all_to_all", chunk=8 * KE)
    assert count(gather, "all-gather") == 2 and count(gather, "all-to-all") == 1  # sums (`sharding.sums`)
    assert count(gather, "reduce-scatter") == count(gather, "all-reduce") == 0
    # Ids and weights, rows, sums.
    assert count(whole, "all-gather") == count(whole, "all-reduce") == 0 and count(whole, "all-to-all") == 3
    chunks = text(transport="all_to_all", chunk=4)
    assert count(chunks, "all-gather") == 0 and count(chunks, "all-to-all") == 2 * 3
    assert count(chunks, "all-reduce") == 1  # how many chunks there are
    print("compared")


# ---- tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cases", "compared"),
    [
        (all_meshes, (6 * 2 + 3) * 7),
        (several_axes, 2 * 7),
        (quantised, 8),
        (quantised_gradients, 2),
        (bfloat16, 3),
        (few_tokens, 3 * 2),
        (traffic, 1),
    ],
)
def test_eight_devices_compute_what_one_does(cases, compared):
    assert on_eight_devices(cases) == compared


def on_eight_devices(cases, devices=8):
    """Runs a function of a test module; how many comparisons it printed."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in the other tests
    }
    ran = subprocess.run(
        [sys.executable, "-c", f"from {cases.__module__} import {cases.__name__} as cases; cases()"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.count("compared")


@pytest.mark.slow
def test_no_axis_of_size_one():
    assert on_eight_devices(every_axis, devices=32) == 2 * 7


def test_equal_choices_are_one_function():
    """They are part of what compiled programs are keyed by."""
    one, same = (over_mesh(expert_ffn, mesh_of(), weight_axes=WEIGHTS) for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != over_mesh(expert_ffn, mesh_of(), weight_axes={})


def test_what_cannot_be_cut_is_whole():
    """An uneven part, and a part of a quantisation block, of either matrix."""
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2, 1), AXES)
    split = over_mesh(expert_ffn, mesh_of(), weight_axes=WEIGHTS)
    split = dataclasses.replace(split, mesh=mesh)
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731

    def cut(hidden, width, form="plain", experts=4, **more):
        dtype = {"plain": jnp.float32, "fp8": jnp.float8_e4m3fn, "mxfp4": jnp.uint8}[form]
        per_byte = 2 if form == "mxfp4" else 1
        matrices = (
            of(dtype, experts, 2, width, hidden // per_byte),
            of(dtype, experts, hidden, width // per_byte),
        )
        kind = {"fp8": Fp8Blocks, "mxfp4": Mxfp4}.get(form)
        return split.cut(*(kind(m, None) if kind else m for m in matrices), **more)

    even = cut(64, 32)
    assert (even.experts, even.width, even.gate_up_hidden) == (("expert",), ("tensor",), ("fsdp",))
    assert even.specs(layers=True)[0] == P(None, ("expert",), None, ("tensor",), ("fsdp",))
    assert even.specs(layers=False)[1] == P(("expert",), ("fsdp",), ("tensor",))
    odd = cut(63, 31, experts=3)
    assert odd.experts == odd.width == odd.gate_up_hidden == odd.down_hidden == ()
    assert cut(128, 256, "fp8").width and not cut(128, 128, "fp8").width
    assert cut(256, 128, "fp8").down_hidden and not cut(128, 128, "fp8").down_hidden
    assert cut(64, 64, "mxfp4").width and not cut(64, 32, "mxfp4").width
    # One scale for 32 inputs: rows of down, which are outputs, are cut anywhere.
    assert cut(32, 64, "mxfp4").down_hidden and not cut(32, 64, "mxfp4").gate_up_hidden
    # Axes as in the tables of rules: the first letter that can use one has it.
    greedy = dataclasses.replace(split, weight_axes=(("E", ("expert",)), ("F", ("expert", "tensor"))))
    shapes = of(jnp.float32, 4, 2, 32, 8), of(jnp.float32, 4, 8, 32)
    assert greedy.cut(*shapes).width == ("tensor",)
    shapes = of(jnp.float32, 3, 2, 32, 8), of(jnp.float32, 3, 8, 32)
    assert greedy.cut(*shapes).width == ("expert", "tensor") and greedy.cut(*shapes).experts == ()
    optional = over_mesh(expert_ffn, mesh_of(), weight_axes={"E": "expert", "F": ("expert?", "tensor?")})
    assert optional.weight_axes == greedy.weight_axes
    # Groups of the hidden activation are rounded together.
    assert cut(64, 256, rounded=True).width and not cut(64, 128, rounded=True).width


@pytest.mark.parametrize("transport", ["gather", "all_to_all"])
def test_a_device_expects_its_share_of_the_pairs(transport):
    """Blocks are chosen for them: not for all that its operation has places for."""
    expected = []

    def experts(x, *operands, expected_pairs, **more):
        expected.append(expected_pairs)
        return expert_ffn(x, *operands, **more)

    split = over_mesh(experts, mesh_of(data=2, expert=4), transport=transport, weight_axes=WEIGHTS)
    jax.eval_shape(lambda *a: split(*a, swiglu_limit=LIMIT), *operands(tokens=64))
    assert expected[0] == 64 * KE // 8


def test_errors_name_every_problem():
    with pytest.raises(ValueError, match=r"axes \('x',\).*transport='b'.*waves=0.*chunk=0.*only E, F and D"):
        over_mesh(
            expert_ffn, jax.make_mesh((1,), ("x",)), transport="b", waves=0, chunk=0, weight_axes={"T": "x"}
        )
    with pytest.raises(ValueError, match="the mesh has only"):
        over_mesh(expert_ffn, mesh_of(), weight_axes={"E": ("rows", "expert")})
    with pytest.raises(ValueError, match="transport='ragged' .*'cpu' has not; use 'all_to_all'"):
        over_mesh(expert_ffn, mesh_of(), transport="ragged", weight_axes=WEIGHTS)
    split = over_mesh(expert_ffn, mesh_of(), weight_axes=WEIGHTS)
    x, gate_up, down, ids, weights = operands()
    with pytest.raises(ValueError, match=r"x .*T = 20; gate_up .*\[R, E, 2, F, D\]; down .*; valid"):
        split(
            x,
            gate_up,
            down,
            ids[1:],
            weights[1:],
            swiglu_limit=0,
            valid=jnp.ones(3, bool),
            repeat=jnp.int32(0),
        )
    with pytest.raises(ValueError, match="swiglu_limit=-1"):  # of the operation itself
        split(x, gate_up, down, ids, weights, swiglu_limit=-1)
