"""Nothing to compute is no fault: axes of a batch, tokens and entries may be 0, axes of the model may not."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    block_matmul,
    compressor,
    core_attention,
    decode_attention,
    entry_write,
    grouped_matmul,
    hybrid_attention,
    hyper_connection,
    indexer,
    linear_cross_entropy,
    topk_mask,
)
from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.formats.columns import Columns
from tests.kernels.held_arrays import HeldArray

SIZES = dict(B=2, T=3, S=8, K=4, H=2, D=128, P=2, V=16, E=3)
"""An axis of every kind; each case sets one of them to 0, so that no kernel runs."""


def f32(*shape):
    return jnp.ones(shape, jnp.float32)


def i32(*shape):
    return jnp.zeros(shape, jnp.int32)


def _block_matmul(impl, *, B, T, D, V, **_):
    scale = jnp.full((-(-V // 128), -(-D // 128)), 127, jnp.uint8)
    weight = Fp8Blocks(jnp.ones((V, D), jnp.float8_e4m3fn), scale)
    return block_matmul.block_matmul(f32(T, D), weight, impl=impl)


def _compressor(impl, *, B, P, D, **_):
    kv = f32(B, 4 * P, 1, D)
    angles = f32(B, P, 32)
    return compressor.compressor(kv, kv, f32(4, 1, D), f32(D), angles, angles, eps=1e-6, impl=impl)


def _decode_attention(impl, *, B, T, S, K, H, D, **_):
    ring, entries = f32(1, B, 16, D), f32(1, B, S, D)
    operands = (f32(B, T, H, D), ring, i32(B, T), f32(H), entries, None, i32(B, T, K))
    return decode_attention.decode_attention(*operands, repeat=jnp.int32(0), window=8, impl=impl)


def _expert_ffn(impl, *, T, K, D, E, **_):
    stacks = (f32(E, 2, 128, D), f32(E, D, 128))
    ids = i32(T, min(K, 2))
    return grouped_matmul.expert_ffn(f32(T, D), *stacks, ids, f32(*ids.shape), swiglu_limit=7.0, impl=impl)


def _queries(B, T, H, D):
    return core_attention.Queries(f32(B, T, H, D), *(i32(B, T),) * 3, f32(B, T, H, D), f32(B, T, H))


def _attend(impl, *, B, T, S, H, D, **_):
    held = [HeldArray(f32(1, B, S, D), jnp.int32(0))] * 2
    how = {"window": 8, "top_k": 4, "impl": impl}
    return core_attention.attend(_queries(B, T, H, D), f32(B, 7 + T, D), *held, f32(H), **how)


def _attend_cached(impl, *, B, T, S, H, D, **_):
    held = [HeldArray(f32(1, B, size, D), jnp.int32(0)) for size in (16, S, S)]
    how = {"window": 8, "top_k": 4, "impl": impl}
    return core_attention.attend_cached(_queries(B, T, H, D), *held, f32(H), **how)


def _index_loss(impl, *, B, T, S, H, D, **_):
    held = [HeldArray(f32(1, B, S, D), jnp.int32(0))] * 2
    how = {"window": 8, "top_k": 4, "of_chosen": True, "impl": impl}
    return core_attention.index_loss(_queries(B, T, H, D), f32(B, 7 + T, D), *held, f32(H), **how)


def _gathered_attention(impl, *, B, T, S, K, H, D, **_):
    return hybrid_attention.gathered_attention(f32(B, T, H, D), f32(B, S, D), i32(B, T, K), impl=impl)


def _hybrid_attention(impl, *, B, T, S, H, D, **_):
    near = (f32(B, T, H, D), f32(B, 7 + T, D), i32(B, T), f32(H))
    entries = (f32(B, S, D), i32(B, T), i32(B, T))
    return hybrid_attention.hybrid_attention(*near, *entries, window=8, impl=impl)


HYPER = dict(hc_eps=1e-6, norm_eps=1e-6)


def _maps(B, T):
    return hyper_connection.StreamMaps(f32(4, B, T), f32(4, B, T), f32(4, 4, B, T))


def _pre(impl, *, B, T, D, **_):
    weights = (f32(24, 4, D), f32(24), f32(3), f32(D))
    return hyper_connection.pre(f32(B, T, 4, D), *weights, num_iters=2, **HYPER, impl=impl)


def _post(impl, *, B, T, D, **_):
    return hyper_connection.post(f32(B, T, 4, D), f32(B, T, D), _maps(B, T), impl=impl)


def _post_pre(impl, *, B, T, D, **_):
    streams = (f32(B, T, 4, D), f32(B, T, D), _maps(B, T))
    weights = (f32(24, 4, D), f32(24), f32(3), f32(D))
    return hyper_connection.post_pre(*streams, *weights, num_iters=2, **HYPER, impl=impl)


def _collapse(impl, *, B, T, D, **_):
    return hyper_connection.collapse(f32(B, T, 4, D), f32(4, 4, D), f32(4), f32(1), **HYPER, impl=impl)


def _keys(B, T, S, H, D):
    return f32(B, T, H, D), f32(B, T, H), f32(B, S, D), i32(B, T), i32(B, T)


def _index_scores(impl, *, B, T, S, H, D, **_):
    return indexer.index_scores(*_keys(B, T, S, H, D), impl=impl)


def _index_select(impl, *, B, T, S, H, D, **_):
    return indexer.index_select(*_keys(B, T, S, H, D), 4, impl=impl)


def _index_list(impl, *, B, T, S, **_):
    return indexer.index_list(jnp.zeros((B, T, S), bool), 4)


def _linear_cross_entropy(impl, *, T, D, V, **_):
    return linear_cross_entropy.linear_cross_entropy(f32(T, D), f32(V, D), i32(T), impl=impl)


def _weighted_cross_entropy(impl, *, T, D, V, **_):
    return linear_cross_entropy.weighted_cross_entropy(f32(T, D), f32(V, D), i32(T), f32(T), impl=impl)


def _write_entries(impl, *, B, S, P, D, **_):
    stack, new = Columns((f32(1, B, D, S),), (True,)), (f32(B, P, D),)
    return entry_write.write_entries(stack, jnp.int32(0), new, i32(B), i32(B), impl=impl)


def _topk_mask(impl, *, B, T, S, **_):
    return topk_mask.topk_mask(f32(B, T, S), jnp.ones((B, T, S), bool), 2)


MAPS = [(4, "B", "T"), (4, "B", "T"), (4, 4, "B", "T")]
# Operation -> (implementations, axes that may be 0, axes that may not, results: shapes by letters or numbers)
OPERATIONS = {
    _block_matmul: (("reference", "pallas"), "T", "DV", ["TV"]),
    _attend: (("xla", "reference"), "BTS", "", ["BTHD"]),
    _attend_cached: (("xla", "reference"), "BTS", "", ["BTHD"]),
    _index_loss: (("xla", "reference", "pallas"), "BTS", "", ["BT"]),
    _compressor: (("reference", "pallas", "xla"), "BP", "D", ["BPD"]),
    _decode_attention: (("reference", "pallas"), "BT", "HD", ["BTHD", "BTH"]),
    _expert_ffn: (("reference", "pallas", "xla"), "TK", "DE", ["TD"]),
    _gathered_attention: (("reference", "pallas"), "BTSK", "HD", ["BTHD", "BTH"]),
    _hybrid_attention: (("reference", "pallas"), "BT", "HD", ["BTHD", "BTH"]),
    _pre: (("reference", "pallas"), "BT", "D", ["BTD", *MAPS]),
    _post: (("reference", "pallas"), "BT", "D", [("B", "T", 4, "D")]),
    _post_pre: (("reference", "pallas"), "BT", "D", [("B", "T", 4, "D"), "BTD", *MAPS]),
    _collapse: (("reference", "pallas"), "BT", "D", ["BTD"]),
    _index_scores: (("reference", "pallas"), "BTS", "HD", ["BTS"]),
    _index_select: (("reference", "pallas"), "BTS", "HD", ["BTS"]),
    _index_list: (("any",), "BTS", "", [("B", "T", 4)]),
    _linear_cross_entropy: (("reference", "pallas", "xla"), "T", "DV", ["T", "T"]),
    _weighted_cross_entropy: (("reference", "pallas", "xla"), "T", "", [()]),
    _write_entries: (("reference", "pallas"), "B", "SPD", [(1, "B", "D", "S")]),
    _topk_mask: (("any",), "BTS", "", ["BTS"]),
}


def cases(which):
    return [
        pytest.param(operation, impl, axis, id=f"{operation.__name__[1:]}-{impl}-{axis}")
        for operation, row in OPERATIONS.items()
        for impl in row[0]
        for axis in row[which]
    ]


@pytest.mark.parametrize(("operation", "impl", "axis"), cases(1))
def test_no_rows_give_no_rows(operation, impl, axis):
    sizes = SIZES | {axis: 0}
    results = jax.tree.leaves(operation(impl, **sizes))
    shapes = [tuple(sizes.get(size, size) for size in shape) for shape in OPERATIONS[operation][3]]
    assert [result.shape for result in results] == shapes
    if 0 in shapes[0]:
        return
    assert all(jnp.isfinite(result[result != -jnp.inf]).all() for result in results)


@pytest.mark.parametrize(("operation", "impl", "axis"), cases(2))
def test_a_model_without_an_axis_is_refused(operation, impl, axis):
    with pytest.raises(
        ValueError, match=r"must be at least 1|not empty|multiple of 128, not 0|must be in 1 \.\. 0"
    ):
        operation(impl, **SIZES | {axis: 0})


@pytest.mark.parametrize("impl", ["reference", "pallas", "xla"])
def test_no_tokens_give_the_head_a_gradient_of_zeros(impl):
    def loss(head):
        no_tokens = (f32(0, 8), head, i32(0), f32(0))
        return linear_cross_entropy.weighted_cross_entropy(*no_tokens, impl=impl)

    value, gradient = jax.value_and_grad(loss)(f32(16, 8))
    assert value == 0 and gradient.shape == (16, 8) and not gradient.any()


def test_experts_of_no_tokens_have_a_gradient_of_zeros():
    def loss(x, gate_up):
        down, none = f32(3, 128, 128), i32(0, 2)
        call = functools.partial(grouped_matmul.expert_ffn, swiglu_limit=7.0)
        return call(x, gate_up, down, none, f32(0, 2)).sum()

    for gradient in jax.grad(loss, (0, 1))(f32(0, 128), f32(3, 2, 128, 128)):
        assert not gradient.any()
