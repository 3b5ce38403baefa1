"""One rule of choice, as a mask and as a list: where scores tie, and for what is no finite number."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.indexer.xla import select_list_xla, select_xla

AWKWARD = [0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 1.2e-38, -1.2e-38, np.inf, -np.inf, np.nan]


def chosen_by_rule(scores, visible, top_k):
    """Ids of the largest, lowest first among equals; numpy keeps subnormals, so they are levelled by hand."""
    eligible = [
        i for i, (score, seen) in enumerate(zip(scores, visible, strict=True)) if seen and score > -np.inf
    ]
    value = lambda i: 0.0 if abs(scores[i]) < np.finfo(np.float32).tiny else scores[i]  # noqa: E731
    return set(sorted(eligible, key=lambda i: (-value(i), i))[:top_k])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(AWKWARD), st.booleans()), min_size=8, max_size=8), st.integers(1, 3)
)
def test_mask_and_list_follow_the_rule(row, top_k):
    scores = np.array([[[score for score, _ in row]]], np.float32)
    visible = np.array([[[seen for _, seen in row]]])
    want = chosen_by_rule(scores[0, 0], visible[0, 0], top_k)
    mask = np.asarray(select_xla(jnp.asarray(scores), jnp.asarray(visible), top_k))[0, 0]
    assert set(np.flatnonzero(mask)) == want
    index, any_chosen = select_list_xla(jnp.asarray(scores), jnp.asarray(visible), top_k)
    listed = np.asarray(index)[0, 0][np.asarray(any_chosen)[0, 0]]
    assert set(listed) == want and len(listed) == len(want)
