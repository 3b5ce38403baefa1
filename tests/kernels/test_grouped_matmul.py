"""`expert_ffn`: values, gradients, padding, stacks of layers, memory; awkward sizes and small blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.grouped_matmul.routing import key_bits
from pallas_kernels.grouped_matmul.tuning import ExpertBlocks, choose_blocks
from tests.kernels.checks import assert_close

LIMIT = 1.5  # small enough that many activations are clamped
STREAMED = ExpertBlocks(1, streamed=True)
# float32: only the order of sums differs. bfloat16: a hidden value may round to its other neighbour.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
FLOAT32 = TOLERANCE["float32"]


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    experts: int
    hidden: int = 32
    width: int = 16
    layers: int = 1
    dtype: str = "float32"
    seed: int = 0

    def operands(self):
        """(x, gate_up, down, ids, weights) with distinct ids a token, and activations of both signs."""
        rng = np.random.default_rng(self.seed)
        stack = self.layers * self.experts
        draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
        ids = np.stack([rng.permutation(self.experts)[: self.top_k] for _ in range(self.tokens)])
        return (
            draw(self.tokens, self.hidden).astype(self.dtype),
            (draw(stack, 2, self.width, self.hidden) / self.hidden**0.5).astype(self.dtype),
            (draw(stack, self.hidden, self.width) / self.width**0.5).astype(self.dtype),
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(rng.random((self.tokens, self.top_k)), jnp.float32),
        )


def layered(layers, *stacks):
    """The experts of all layers, behind one another, with an axis of layers in front."""
    return jax.tree.map(lambda a: a.reshape(layers, -1, *a.shape[1:]), stacks)


@functools.partial(jax.jit, static_argnames=("impl", "blocks"))
def run(*operands, **options):
    return expert_ffn(*operands, swiglu_limit=LIMIT, **options)


@functools.partial(jax.jit, static_argnames=("impl", "blocks"))
def run_and_pull(x, gate_up, down, ids, weights, dy, **options):
    """(y, gradients of x, gate_up, down, weights)."""
    call = lambda *floats: run(*floats[:3], ids, floats[3], **options)  # noqa: E731
    y, pull = jax.vjp(call, x, gate_up, down, weights)
    return y, *pull(dy)


reference = functools.partial(run, impl="reference")


CASES = [
    (Case(1, 6, 32), None),  # decode
    (Case(5, 1, 1, hidden=7, width=3), None),  # one expert; odd widths: nothing to stream
    (Case(2, 3, 40, hidden=48), ExpertBlocks(1)),  # most experts have no token
    (Case(9, 4, 4), ExpertBlocks(4)),  # every expert for every token
    (Case(33, 3, 8, hidden=20, width=12), ExpertBlocks(3)),
    (Case(70, 2, 5, hidden=16, width=48), ExpertBlocks(64)),
]


@pytest.mark.parametrize(("case", "blocks"), CASES, ids=str)
def test_values_and_gradients_match_the_reference(case, blocks):
    operands = case.operands()
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(operands[0].shape), jnp.float32)
    want = run_and_pull(*operands, dy, impl="reference")
    got = run_and_pull(*operands, dy, blocks=blocks)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, FLOAT32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed(dtype):
    """Widths of more than one loop, with a rest."""
    operands = Case(2, 3, 5, hidden=144, width=272, dtype=dtype).operands()
    assert_close(run(*operands, blocks=STREAMED), reference(*operands), TOLERANCE[dtype])


def test_bfloat16():
    operands = Case(33, 3, 8, dtype="bfloat16").operands()
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(operands[0].shape), jnp.float32)
    want = run_and_pull(*operands, dy, impl="reference")
    got = run_and_pull(*operands, dy, blocks=ExpertBlocks(8))
    assert got[0].dtype == jnp.float32
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, 2 * TOLERANCE["bfloat16"])


def test_weights_are_rounded_to_the_compute_dtype():
    x, gate_up, down, ids, weights = Case(6, 2, 4).operands()
    x = x.astype(jnp.bfloat16)
    rounded = run(x, gate_up.astype(x.dtype), down.astype(x.dtype), ids, weights)
    assert_close(run(x, gate_up, down, ids, weights), rounded, 1e-6)


def test_reference_is_the_equation():
    """Token by token and expert by expert, in float64."""
    x, gate_up, down, ids, weights = (np.asarray(a) for a in Case(21, 3, 8).operands())
    want = np.zeros(x.shape)
    for t, k in np.ndindex(ids.shape):
        w1, w3 = gate_up[ids[t, k]].astype(np.float64)
        gate, up = np.minimum(w1 @ x[t], LIMIT), np.clip(w3 @ x[t], -LIMIT, LIMIT)
        want[t] += weights[t, k] * (down[ids[t, k]] @ (gate / (1 + np.exp(-gate)) * up))
    assert_close(reference(x, gate_up, down, ids, weights), want, FLOAT32)


def test_clamp_acts_on_both_branches():
    """One feature: gate g and up u are the numbers themselves."""

    def ffn(gate, up, limit):
        gate_up = jnp.array([[[[gate]], [[up]]]], jnp.float32)
        ones = jnp.ones((1, 1))
        out = expert_ffn(
            ones, gate_up, jnp.ones((1, 1, 1)), jnp.zeros((1, 1), jnp.int32), ones, swiglu_limit=limit
        )
        return float(out[0, 0])

    silu = lambda g: g / (1 + np.exp(-g))  # noqa: E731
    for gate, up, want in [
        (20.0, 3.0, silu(10) * 3),  # gate: bounded above
        (-20.0, 3.0, silu(-20) * 3),  # and not below
        (2.0, 30.0, silu(2) * 10),
        (2.0, -30.0, silu(2) * -10),
    ]:
        np.testing.assert_allclose(ffn(gate, up, 10.0), want, rtol=1e-5)
        np.testing.assert_allclose(ffn(gate, up, 0.0), silu(gate) * up, rtol=1e-5)


def test_padding_gives_zero_and_is_never_read():
    x, gate_up, down, ids, weights = Case(19, 3, 6).operands()
    valid = jnp.arange(19) % 3 != 1
    poison = jnp.where(valid[:, None], x, jnp.nan)
    lost = jnp.where(valid[:, None], ids, 12345)  # ids of padding may be anything
    dy = jnp.where(valid[:, None], jnp.ones_like(x), jnp.nan)
    operands = poison, gate_up, down, lost, weights
    got = run_and_pull(*operands, dy, valid=valid, blocks=ExpertBlocks(8))
    want = run_and_pull(x[valid], gate_up, down, ids[valid], weights[valid], dy[valid], impl="reference")
    names = ("y", "x", "gate_up", "down", "weights")
    for name, ours, theirs in zip(names, got, want, strict=True):
        if name in ("y", "x", "weights"):
            assert not np.any(ours[~valid])
            ours = ours[valid]
        assert_close(ours, theirs, FLOAT32)
    streamed = run(*operands, valid=valid, blocks=STREAMED)
    assert_close(streamed[valid], want[0], FLOAT32)
    assert not np.any(streamed[~valid])


def test_nothing_but_padding():
    x, gate_up, down, ids, weights = Case(4, 2, 3).operands()
    assert not np.any(run(x, gate_up, down, ids, weights, valid=jnp.zeros(4, bool)))


def test_all_tokens_to_one_expert():
    x, gate_up, down, _, weights = Case(21, 1, 7).operands()
    ids = jnp.full((21, 1), 5, jnp.int32)
    blocks = ExpertBlocks(4)
    y, _, d_gate_up, _, _ = run_and_pull(x, gate_up, down, ids, weights, jnp.ones_like(x), blocks=blocks)
    assert_close(y, reference(x, gate_up, down, ids, weights), FLOAT32)
    assert np.flatnonzero(np.abs(d_gate_up).sum((1, 2, 3))).tolist() == [5]


def test_experts_split_over_devices_sum_to_the_whole():
    x, gate_up, down, ids, weights = Case(17, 3, 8).operands()
    whole = run(x, gate_up, down, ids, weights)
    parts = [run(x, gate_up[low : low + 4], down[low : low + 4], ids - low, weights) for low in (0, 4)]
    assert_close(parts[0] + parts[1], whole, FLOAT32)


@pytest.mark.parametrize("blocks", [STREAMED, ExpertBlocks(4)])
def test_stack_of_layers_under_scan(blocks):
    """A traced layer index into the whole stack gives each layer's values, and the stack's gradients."""
    x, gate_up, down, ids, weights = Case(13, 2, 5, layers=3).operands()

    def deep(x, gate_up, down):
        def layer(x, index):
            options = dict(repeat=index, blocks=blocks)
            return x + run(x, *layered(3, gate_up, down), ids, weights, **options), None

        return jax.lax.scan(layer, x, jnp.arange(3))[0]

    def plain(x, gate_up, down):
        for low in (0, 5, 10):
            x = x + reference(x, gate_up[low : low + 5], down[low : low + 5], ids, weights)
        return x

    def value_and_pull(function):
        y, pull = jax.vjp(function, x, gate_up, down)
        return y, *pull(jnp.ones_like(y))

    results = [jax.jit(functools.partial(value_and_pull, f))() for f in (deep, plain)]
    assert_close(*results, FLOAT32)


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float32"), (1, "bfloat16"), (40, "bfloat16")])
def test_a_stack_is_never_copied_or_converted(tokens, dtype):
    """XLA:CPU likes to move bfloat16 -> float32 conversions of loop operands out of the loop, whole."""
    case = Case(tokens, 2, 16, hidden=64, width=64, layers=8, dtype=dtype)
    x, gate_up, down, ids, weights = case.operands()

    def deep(x, gate_up, down):
        def layer(x, index):
            y = run(x, *layered(8, gate_up, down), ids, weights, repeat=index)
            return (x + y).astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(8))[0]

    memory = jax.jit(deep).lower(x, gate_up, down).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend reports no memory use")
    one_layer = 16 * 3 * 64 * 64 * gate_up.dtype.itemsize
    assert memory.temp_size_in_bytes < one_layer


@pytest.mark.parametrize("blocks", [STREAMED, ExpertBlocks(4)])
def test_later_tokens_change_no_bit_of_earlier_ones(blocks):
    """Other activations and other routing behind token 10: what a causal model rests on."""
    x, gate_up, down, ids, weights = Case(24, 3, 6).operands()
    other = Case(24, 3, 6, seed=1).operands()
    change = lambda a, b: jnp.concatenate([a[:10], b[10:]])  # noqa: E731
    first = run(x, gate_up, down, ids, weights, blocks=blocks)
    second = run(
        change(x, other[0]), gate_up, down, change(ids, other[3]), change(weights, other[4]),
        blocks=blocks,
    )  # fmt: skip
    np.testing.assert_array_equal(first[:10], second[:10])
    assert np.any(first[10:] != second[10:])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([*range(-1, 7), 2**30, -(2**31)]), min_size=18, max_size=18),
    st.lists(st.booleans(), min_size=9, max_size=9),
    st.sampled_from([STREAMED, ExpertBlocks(3)]),
)
def test_any_routing(ids, valid, blocks):
    """Repeated ids within a token, experts without tokens, ids out of range, any padding."""
    x, gate_up, down, _, weights = Case(9, 2, 5).operands()
    ids, valid = jnp.array(ids, jnp.int32).reshape(9, 2), jnp.array(valid)
    got = run(x, gate_up, down, ids, weights, valid=valid, blocks=blocks)
    counted = jnp.where((ids >= 0) & (ids < 5) & valid[:, None], weights, 0)
    assert_close(got, reference(x, gate_up, down, ids.clip(0, 4), counted), FLOAT32)


def test_choice_of_blocks():
    assert choose_blocks(6, 32, streamable=True) == STREAMED
    assert choose_blocks(6, 32) == ExpertBlocks(1)
    previous = 1
    for num_pairs in (6, 48, 96, 192, 384, 768, 3072, 24576, 10**6):
        rows = choose_blocks(num_pairs, 32).rows
        assert previous <= rows <= 128
        assert not choose_blocks(num_pairs, 32, backward=True, streamable=True).streamed
        previous = rows
    with pytest.raises(ValueError, match="rows=2"):
        ExpertBlocks(2, streamed=True)
    with pytest.raises(ValueError, match="rows=0"):
        ExpertBlocks(0)


def test_all_problems_are_reported_at_once():
    x, gate_up, down, ids, weights = Case(4, 2, 3).operands()
    with pytest.raises(ValueError) as error:
        run(x[:3], gate_up, down[:, :5], ids, weights[:, :1], impl="triton")
    for part in ("'triton'", "down (3, 5, 16)", "weights (4, 1)", "x (3, 32)"):
        assert part in str(error.value)
    with pytest.raises(
        ValueError, match=r"gate_up .* must be a stack .*; down .*; repeat \(1,\) must be a sc"
    ):
        run(x, gate_up, down, ids, weights, repeat=jnp.zeros(1, jnp.int32))


def test_too_many_pairs_for_the_sort_keys():
    assert key_bits(2**20 * 6, 256) > 31
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in Case(1, 1, 256).operands()[1:3]]
    big = 2**20
    x = jax.ShapeDtypeStruct((big, 32), jnp.float32)
    ids = jax.ShapeDtypeStruct((big, 6), jnp.int32)
    weights = jax.ShapeDtypeStruct((big, 6), jnp.float32)
    with pytest.raises(ValueError, match="sort keys"):
        jax.eval_shape(run, x, *shapes, ids, weights)


@pytest.mark.parametrize("impl", ["xla", "pallas"])
def test_expected_pairs_change_blocks_and_no_sum(impl):
    """Far too few are expected, and all are right: also of the gradients."""
    operands = Case(64, 4, 8, hidden=128, width=128).operands()
    how = {"impl": impl, "interpret": True} if impl == "pallas" else {"impl": impl}

    def results(**more):
        loss = lambda x, *rest: expert_ffn(x, *rest, swiglu_limit=LIMIT, **how, **more).sum()  # noqa: E731
        run = lambda *a: (expert_ffn(*a, swiglu_limit=LIMIT, **how, **more), jax.grad(loss)(*a))  # noqa: E731
        return jax.jit(run)(*operands), str(jax.make_jaxpr(run)(*operands))

    wanted, text = results()
    got, other = results(expected_pairs=2)
    assert text != other
    assert results(expected_pairs=64 * 4)[1] == results(expected_pairs=10**6)[1] == text
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, FLOAT32)
    with pytest.raises(ValueError, match="expected_pairs=0 must be at least 1"):
        results(expected_pairs=0)
