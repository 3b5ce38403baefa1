"""Core attention as a whole: plain XLA, with its prefixes and gathers, against the composed references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core_attention import Queries, attend, attend_cached, view
from tests.kernels.checks import assert_close
from tests.kernels.held_arrays import HeldArray

BATCH, LENGTH, HEADS, WIDTH, WINDOW, SLOTS = 2, 5, 3, 16, 4, 16
SIZE = 150  # three prefixes: 64, 128, 150
INDEX_HEADS, INDEX_WIDTH = 2, 8
MASKED, GATHERED = 20, 3
"""Chosen entries: the first are masked at every prefix, the others gathered (`xla.GATHER_BEYOND`)."""


def operands(longest: int, dtype: str = "float32"):
    """(queries, line, ring, entries, index keys, sink) of calls whose last query sees `longest` entries."""
    rng = np.random.default_rng(longest)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    start = np.asarray([2, 9])
    position = jnp.asarray(start[:, None] + np.arange(LENGTH), jnp.int32)
    hi = np.minimum(np.arange(LENGTH) + longest - LENGTH + 1, longest) * np.ones((BATCH, 1), int)
    hi[1] //= 2
    queries = Queries(
        draw(BATCH, LENGTH, HEADS, WIDTH),
        position,
        jnp.zeros((BATCH, LENGTH), jnp.int32),
        jnp.asarray(np.maximum(hi, 0), jnp.int32),
        draw(BATCH, LENGTH, INDEX_HEADS, INDEX_WIDTH),
        draw(BATCH, LENGTH, INDEX_HEADS).astype(jnp.float32),
    )
    line = draw(BATCH, WINDOW - 1 + LENGTH, WIDTH)
    slot = (start[:, None] - (WINDOW - 1) + np.arange(line.shape[1])) % SLOTS
    ring = draw(3, BATCH, SLOTS, WIDTH).at[1, np.arange(BATCH)[:, None], slot].set(line)
    stacks = [HeldArray(x, jnp.int32(1)) for x in (ring, draw(3, BATCH, SIZE, WIDTH))]
    keys = HeldArray(draw(3, BATCH, SIZE, INDEX_WIDTH), jnp.int32(1))
    return queries, line, *stacks, keys, draw(HEADS).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("kind", "top_k", "impl", "cached"))
def run(queries, line, ring, entries, keys, sink, *, kind, top_k=MASKED, impl, cached=False):
    """What a layer of this kind makes of them."""
    entries = None if kind == "window" else entries
    keys = keys if kind == "csa" else None
    call, near = (attend_cached, ring) if cached else (attend, line)
    return call(queries, near, entries, keys, sink, window=WINDOW, top_k=top_k, impl=impl)


FLOAT32 = 1e-5  # the same terms in another order, relative to the largest value


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("kind", "top_k"), [("window", MASKED), ("hca", MASKED), ("csa", MASKED), ("csa", GATHERED)]
)
def test_xla_matches_reference(kind, top_k, cached):
    """No entries at all, the first prefix to its end, one entry into the next, and all of them."""
    for longest in (0, 64, 65, SIZE):
        given = operands(longest)
        how = {"kind": kind, "top_k": top_k, "cached": cached}
        assert_close(run(*given, impl="xla", **how), run(*given, impl="reference", **how), FLOAT32)


@pytest.mark.parametrize(("kind", "top_k"), [("csa", MASKED), ("csa", GATHERED)])
def test_gradients_match_the_reference(kind, top_k):
    given = operands(100)

    def loss(q, line, stack, sink, impl):
        queries, _, ring, entries, keys, _ = given
        whole = (queries._replace(q=q), line, ring, HeldArray(stack, entries.repeat), keys, sink)
        out = run(*whole, kind=kind, top_k=top_k, impl=impl)
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    floats = (given[0].q, given[1], given[3].stack, given[-1])
    got, want = (jax.grad(loss, range(4))(*floats, impl) for impl in ("xla", "reference"))
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, FLOAT32)


def test_a_ring_is_viewed_as_its_line():
    queries, line, ring, *rest = operands(70)
    sizes = {"window": WINDOW, "top_k": MASKED, "rounded_scores": False}
    taps = [
        view(queries, near, *rest, **sizes, collect=frozenset(["selected", "attention"]))
        for near in (line, ring)
    ]
    assert taps[0].keys() == {"selected", "attention"}
    for name, by_line in taps[0].items():
        np.testing.assert_array_equal(by_line, taps[1][name])
    assert (taps[0]["selected"].sum(axis=-1) == np.minimum(queries.hi, MASKED)).all()


def test_problems_are_named_together():
    queries, line, ring, entries, keys, sink = operands(8)
    how = {"window": WINDOW, "top_k": MASKED, "rounded_scores": True, "impl": "triton"}
    with pytest.raises(ValueError, match=r"attend: impl='triton'.*rounded_scores.*index_keys need.*line \("):
        attend(queries, line[:, 1:], None, keys, sink, **how)
    with pytest.raises(ValueError, match=r"attend_cached: rounded_scores: impl='pallas' does not round"):
        attend_cached(queries, ring, entries, keys, sink, **(how | {"impl": "pallas"}))
