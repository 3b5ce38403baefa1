"""The indexer's loss and its gradients against the formulas, query by query, in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core_attention import Queries, attend, index_loss, view
from tests.kernels.held_arrays import HeldArray

BATCH, LENGTH, HEADS, WIDTH, WINDOW = 2, 9, 3, 8, 4
SIZE, TOP_K, INDEX_HEADS, INDEX_WIDTH = 11, 4, 2, 16


def operands(dtype="float32"):
    """(queries, line, entries, index keys, sink): no entry at first, more than TOP_K at last; lo is not 0."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(1.5 * rng.standard_normal(shape), dtype)  # noqa: E731
    lo = np.asarray([[0] * LENGTH, [0] * 4 + [3] * 5])
    hi = np.asarray([np.arange(LENGTH) + 1, [0, 0, 1, 3, 3, 4, 8, 10, 11]])
    position = np.asarray([np.arange(LENGTH) + 5, [0, 1, 2, 3, 0, 1, 2, 3, 4]])
    queries = Queries(
        draw(BATCH, LENGTH, HEADS, WIDTH),
        *(jnp.asarray(x, jnp.int32) for x in (position, lo, hi)),
        draw(BATCH, LENGTH, INDEX_HEADS, INDEX_WIDTH),
        draw(BATCH, LENGTH, INDEX_HEADS).astype(jnp.float32) / 3,
    )
    entries, keys = draw(2, BATCH, SIZE, WIDTH), draw(2, BATCH, SIZE, INDEX_WIDTH)
    held = [HeldArray(stack, jnp.int32(1)) for stack in (entries, keys)]
    return queries, draw(BATCH, WINDOW - 1 + LENGTH, WIDTH), *held, draw(HEADS).astype(jnp.float32)


SIZES = {"window": WINDOW, "top_k": TOP_K}


@functools.partial(jax.jit, static_argnames=("of_chosen", "impl", "block"))
def losses_and_gradients(given, cotangent, of_chosen, impl, block):
    """The losses, and the gradients of all floats in `given`, of the losses weighted by `cotangent`."""
    integers = {name: getattr(given[0], name) for name in ("position", "lo", "hi")}

    def loss(q, index_q, index_weights, line, entries, keys, sink):
        queries = Queries(q=q, index_q=index_q, index_weights=index_weights, **integers)
        held = [HeldArray(stack, jnp.int32(1)) for stack in (entries, keys)]
        sizes = SIZES | {"of_chosen": of_chosen, "impl": impl, "block": block}
        how = {"interpret": True} if impl == "pallas" else {}
        found = index_loss(queries, line, *held, sink, **sizes, **how)
        return jnp.sum(found * cotangent), found

    queries, line, entries, keys, sink = given
    floats = (queries.q, queries.index_q, queries.index_weights, line, entries.stack, keys.stack, sink)
    gradients, found = jax.grad(loss, range(7), has_aux=True)(*floats)
    return found, gradients


def by_hand(given, cotangent, of_chosen):
    """The same in float64: losses, and the gradients of index queries, weights and keys."""
    queries, line, entries, keys, sink = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    entries, keys = entries.stack[1], keys.stack[1]
    losses = np.zeros((BATCH, LENGTH))
    d_q, d_w, d_k = (np.zeros_like(x) for x in (queries.index_q, queries.index_weights, keys))
    for b in range(BATCH):
        for t in range(LENGTH):
            allowed = np.arange(int(queries.lo[b, t]), int(queries.hi[b, t]))
            if not len(allowed):
                continue
            index_q, weight = queries.index_q[b, t], queries.index_weights[b, t]
            products = index_q @ keys[b].T
            scores = weight @ np.maximum(products, 0)
            if of_chosen:
                allowed = sorted(allowed, key=lambda s, scores=scores: (-scores[s], s))[:TOP_K]
            near = min(int(queries.position[b, t]), WINDOW - 1)
            window = line[b, t + WINDOW - 1 - near : t + WINDOW]
            target = np.zeros(len(allowed))
            for h in range(HEADS):
                far, close = (
                    np.exp(x @ queries.q[b, t, h] * WIDTH**-0.5) for x in (entries[b][allowed], window)
                )
                target += far / (far.sum() + close.sum() + np.exp(sink[h]))
            target /= target.sum()
            chosen = scores[allowed]
            logs = chosen - chosen.max() - np.log(np.exp(chosen - chosen.max()).sum())
            losses[b, t] = (target * (np.log(target) - logs)).sum()
            d_scores = (np.exp(logs) - target) * cotangent[b, t]
            for s, d_score in zip(allowed, d_scores, strict=True):
                active = products[:, s] > 0
                d_w[b, t] += d_score * products[:, s] * active
                d_q[b, t] += d_score * (weight * active)[:, None] * keys[b, s]
                d_k[b, s] += d_score * (weight * active) @ index_q
    return losses, (d_q, d_w, d_k)


@pytest.mark.parametrize("of_chosen", [False, True])
@pytest.mark.parametrize(("impl", "block"), [("xla", 4), ("reference", 64), ("pallas", 8)])
def test_losses_and_gradients_are_those_of_the_formula(of_chosen, impl, block):
    given, cotangent = (
        operands(),
        np.linspace(-1, 2, BATCH * LENGTH).reshape(BATCH, LENGTH).astype(np.float32),
    )
    want, (d_q, d_w, d_k) = by_hand(given, cotangent, of_chosen)
    found, gradients = losses_and_gradients(given, cotangent, of_chosen, impl, block)
    assert found.dtype == jnp.float32 and want.max() > 0.3
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-6)
    assert not np.asarray(found)[np.asarray(given[0].hi <= given[0].lo)].any()
    q, index_q, index_weights, line, entries, keys, sink = gradients
    for got, wanted in ((index_q, d_q), (index_weights, d_w), (keys[1], d_k)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    assert not any(np.asarray(leaf).any() for leaf in (q, line, entries, sink, keys[0]))


def test_the_target_is_what_attention_gives_its_entries():
    """A perfect indexer: one whose softmax is the target has loss 0 and no gradient."""
    queries, line, entries, keys, sink = operands()
    seen = view(
        *(queries, line, entries, None, sink), **SIZES, rounded_scores=False, collect=frozenset({"attention"})
    )["attention"]
    target = np.asarray(seen)[..., line.shape[1] :].sum(2)
    # An index key of each entry alone, whose score is the logarithm of what the entry should get, above 0.
    logs = np.log(np.maximum(target, 1e-30)) + 100
    eye = jnp.broadcast_to(jnp.eye(SIZE, dtype=jnp.float32), (2, BATCH, SIZE, SIZE))
    perfect = queries._replace(
        index_q=jnp.asarray(logs[:, :, None], jnp.float32), index_weights=jnp.ones((BATCH, LENGTH, 1))
    )
    found = jax.jit(functools.partial(index_loss, **SIZES, of_chosen=False, impl="xla"))(
        perfect, line, entries, HeldArray(eye, jnp.int32(0)), sink
    )
    np.testing.assert_allclose(found, 0, atol=2e-5)


def test_bfloat16_operands_are_computed_in_float32():
    given = operands("bfloat16")
    cotangent = np.ones((BATCH, LENGTH), np.float32)
    want, _ = by_hand(given, cotangent, True)
    found, gradients = losses_and_gradients(given, cotangent, True, "xla", 4)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-6)
    assert gradients[1].dtype == gradients[5].dtype == jnp.bfloat16


def test_scores_of_an_impl_that_does_not_round_are_refused():
    with pytest.raises(ValueError, match="impl='pallas' does not round") as refused:
        index_loss(*operands(), **SIZES, of_chosen=True, rounded_scores=True, block=0, impl="pallas")
    assert "block=0" in str(refused.value)


def test_the_choice_is_that_of_attention_when_scores_are_rounded():
    """Scores a little apart are equal in bfloat16, and the lowest index wins there."""
    queries, line, entries, keys, sink = operands()
    same = HeldArray(
        keys.stack.at[:].set(keys.stack[:, :, :1]) * (1 + 1e-4 * jnp.arange(SIZE)[:, None]), keys.repeat
    )
    given = (queries._replace(index_weights=jnp.abs(queries.index_weights)), line, entries, same, sink)
    rounded, exact = (
        index_loss(*given, **SIZES, of_chosen=True, rounded_scores=flag, impl="xla") for flag in (True, False)
    )
    assert (np.asarray(rounded) != np.asarray(exact)).any()
    first = attend(*given, **SIZES, rounded_scores=True, impl="xla")
    assert np.isfinite(first).all()
