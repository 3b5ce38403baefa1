"""Every operation that a mesh changes: the values and gradients of one device, whatever axes there are.

Each runs alone, with operands as a model hands them over. What is left to the partitioner is none of these.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.model.entries import Entries
from dsv4_jax.model.operations import Operations, Queries, operations
from dsv4_jax.model.span import blocks_packed, packed
from dsv4_jax.numerics.policy import Policy
from sharding.activations import Placement
from sharding.context import LineOverMesh, line_of
from sharding.cross_entropy import CrossEntropyOverMesh
from sharding.mesh import AXES, mesh_of
from sharding.rules import TRAIN

B, T, H, DH, D, N, V, W, RATIO, HI, DI = 8, 24, 4, 8, 16, 4, 12, 6, 2, 2, 4
BOUND = 1e-5
"""float32, relative to the largest: sums over devices are added in another order."""

WITHOUT_GRADIENTS = {
    "keep": "caches are of inference",
    "store": "caches are of inference",
    "attend_cached": "caches are of inference",
    "attend_among": "of drafts",
    "view": "of inspection",
    "look_up": "ids",
}


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def segments():
    """Documents of which one ends at each of the first tokens in another row."""
    found = np.ones((B, T), np.int32)
    for row in range(B):
        found[row, row + 1 :] += 1
        found[row, row + 8 :] += 1
    found[3, 20:] = 0
    return jnp.asarray(found)


SPAN = packed(jnp.zeros((B, T), jnp.int32), segments())
BLOCKS = blocks_packed(SPAN, RATIO, np.asarray([1.0, 0.1]))


def queries(index_q=None, index_weights=None):
    return Queries(normal(B, T, H, DH), SPAN.position, BLOCKS.lo, BLOCKS.hi, index_q, index_weights)


def line(chosen, kv):  # on a mesh it has more rows than on one device: what is made of it is compared
    return chosen.line(kv, None, before=W - 1)


def attend(chosen, q, kv, entries, sink):
    of = queries()._replace(q=q)
    sizes = {"window": W, "top_k": 3}
    return chosen.attend(of, line(chosen, kv), Entries(entries[None], jnp.int32(0)), None, sink, **sizes)


def index_loss(chosen, index_q, index_weights, keys):
    row = jnp.int32(0)
    operands = (
        queries(index_q, index_weights),
        line(chosen, normal(B, T, DH)),
        Entries(normal(1, B, T // RATIO, DH), row),
        Entries(keys[None], row),
        normal(H),
    )
    return chosen.index_loss(*operands, window=W, top_k=3, of_chosen=True, rounded_scores=False)


def compress(chosen, kv, gate, ape, norm):
    made = chosen.compress(
        *(kv, gate, ape, norm, *BLOCKS.rotation),
        is_first=BLOCKS.is_first,
        source=BLOCKS.source,
        previous=BLOCKS.previous,
        by_tokens=True,
        eps=1e-6,
        dtype=jnp.float32,
    )
    there = jnp.arange(made.shape[1]) < BLOCKS.count[:, None]
    return jnp.where(there[..., None], made, 0)  # nobody sees the others


HYPER = {"num_iters": 3, "hc_eps": 1e-6, "norm_eps": 1e-6}
ROWS = N * (2 + N)
MIXING = (0.1 * normal(ROWS, N, D), normal(ROWS), np.full(3, 0.1, np.float32), normal(D))


def leave(chosen, streams, update):
    _, maps = chosen.enter(streams, *MIXING, **HYPER)
    return chosen.leave(streams, update, maps)


def advance(chosen, streams, update, *weights):
    _, maps = chosen.enter(streams, *MIXING, **HYPER)
    return chosen.advance(streams, update, maps, *weights, **HYPER)


def experts(chosen, x, gate_up, down, weights):
    ids = np.argsort(np.random.default_rng(0).random((B, T, 4)), axis=-1)[..., :2].astype(np.int32)
    operands = (x, ids, weights, SPAN.valid)
    if chosen.placement is None:  # tokens of all rows
        operands = tuple(a.reshape(-1, *a.shape[2:]) for a in operands)
    x, ids, weights, valid = operands
    y = chosen.experts(x, gate_up, down, ids, weights, valid=valid, swiglu_limit=2.0)
    return y.reshape(B, T, D)


def cross_entropy(chosen, hidden, head):
    ids = np.random.default_rng(0).integers(0, V, hidden.shape[:-1]).astype(np.int32)
    weights = np.random.default_rng(1).random(ids.shape).astype(np.float32)
    return chosen.cross_entropy(hidden, head, ids, weights)


IDS = np.random.default_rng(2).integers(0, V, (B, T)).astype(np.int32)
X, ENTRIES = normal(B, T, D), normal(B, T // RATIO, DH)
CASES = {
    "linear": (lambda c, x, w: c.linear(x, w, out=(("G", 0), ("J", 1)), by_rows=True), X, normal(4, 2, 3, D)),
    "linear, summed": (lambda c, x, w: c.linear(x, w, over=(("G", 4), ("O", 4))), X, normal(7, D)),
    "linear, whole": (lambda c, x, w: c.linear(x, w), X, normal(7, D)),
    "grouped_linear": (
        lambda c, x, w: c.grouped_linear(x, w, out=(("G", 0), ("O", 1))),
        normal(B, T, 4, 6),
        normal(4, 8, 6),
    ),
    "score": (lambda c, x, w: c.score(x, w, out=(("V", 0),), by_rows=True), X, normal(V, D)),
    "embed": (lambda c, table: c.embed(table, IDS), normal(V, D)),
    "line": (
        lambda c, kv: attend(c, queries().q, kv, normal(B, T // RATIO, DH), normal(H)),
        normal(B, T, DH),
    ),
    "attend": (attend, normal(B, T, H, DH), normal(B, T, DH), ENTRIES, normal(H)),
    "index_loss": (index_loss, normal(B, T, HI, DI), normal(B, T, HI), normal(B, T // RATIO, DI)),
    "compress": (
        compress,
        normal(B, T, 2, DH),
        2 * normal(B, T, 2, DH),
        normal(RATIO, 2, DH),
        normal(DH),
    ),
    "compress, one branch": (
        compress,
        normal(B, T, 1, DH),
        2 * normal(B, T, 1, DH),
        normal(RATIO, 1, DH),
        normal(DH),
    ),
    "enter": (lambda c, x, *w: c.enter(x, *w, **HYPER), normal(B, T, N, D), *MIXING),
    "leave": (leave, normal(B, T, N, D), X),
    "advance": (advance, normal(B, T, N, D), X, *MIXING),
    "collapse": (
        lambda c, x, *w: c.collapse(x, *w, hc_eps=1e-6, norm_eps=1e-6),
        *(normal(B, T, N, D), 0.1 * normal(N, N, D), normal(N), np.full(1, 0.1, np.float32)),
    ),
    "experts": (experts, X, normal(4, 2, 6, D), normal(4, D, 6), np.abs(normal(B, T, 2))),
    "cross_entropy": (cross_entropy, X, normal(V, D)),
    "cross_entropy, split": (cross_entropy, X, normal(V, D)),
    "cross_entropy, gathered": (cross_entropy, X, normal(V, D)),
    "cross_entropy, further": (cross_entropy, X[:, :-1], normal(V, D)),  # as of the MTP block: T - 1 tokens
    "cross_entropy, flat": (cross_entropy, X.reshape(-1, D)[:-5], normal(V, D)),
}


def test_every_operation_is_here():
    names = {field.name for field in dataclasses.fields(Operations)} - {
        "placement",
        "weights_in_place",
        "cache_of_bits",
        "copies",
    }
    assert {name.split(",")[0] for name in CASES} == names - WITHOUT_GRADIENTS.keys()


def values_and_gradients(chosen, function, *operands):
    shapes = jax.eval_shape(functools.partial(function, chosen), *operands)
    pulls = [normal(*leaf.shape) for leaf in jax.tree.leaves(shapes)]

    @jax.jit
    def run(*operands):
        def loss(*operands):
            results = function(chosen, *operands)
            return sum((a * b).sum() for a, b in zip(jax.tree.leaves(results), pulls, strict=True)), results

        places = tuple(range(len(operands)))
        return jax.grad(loss, places, has_aux=True)(*operands)

    return jax.device_get(run(*operands))


@functools.cache
def of_one_device(name):
    return values_and_gradients(operations(Policy.of("float32")), *CASES[name])


def compare(name, mesh):
    placement = Placement(mesh_of(mesh), TRAIN)
    spread = operations(Policy.of("float32"), placement=placement)
    if name.startswith("cross_entropy, ") and (head := name.split(", ")[1]) in ("split", "gathered"):
        loss = dataclasses.replace(spread.cross_entropy.function, head=head)
        assert isinstance(loss, CrossEntropyOverMesh)
        spread = dataclasses.replace(
            spread, cross_entropy=dataclasses.replace(spread.cross_entropy, function=loss)
        )
    got, want = values_and_gradients(spread, *CASES[name]), of_one_device(name)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * np.abs(b).max())


@pytest.mark.parametrize("name", CASES)
def test_on_three_axes(name):
    compare(name, "context=2,expert=2,tensor=2")


OTHERS = [",".join(f"{axis}=2" for axis in three) for three in itertools.combinations(AXES, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*OTHERS, "context=8", "context=4,tensor=2", "expert=4,context=2", "fsdp=8"])
@pytest.mark.parametrize("name", CASES)
def test_on_other_axes(name, mesh):
    compare(name, mesh)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("before", [0, 2, 5, 11])
def test_a_line_of_parts(before, past):
    """Windows of less and of more than the tokens of a device, and of more than there are."""
    kv = normal(2, 8, 3)
    held = normal(2, before, 3) if past else None
    over = LineOverMesh(Placement(mesh_of("context=4,data=2"), TRAIN))
    got = jax.jit(lambda kv, held: over(kv, held, before=before))(kv, held)
    want = np.asarray(line_of(jnp.asarray(kv), held, before=before))
    own = np.asarray(got).reshape(2, 4, before + 2, 3)
    for device in range(4):
        np.testing.assert_array_equal(own[:, device], want[:, 2 * device : 2 * device + before + 2])
