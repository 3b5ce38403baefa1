"""Copies of hot experts: the same sums, less to do for the fullest device."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import expert_ffn
from sharding.expert_copies import place_copies
from tests.kernels.checks import assert_close
from tests.sharding.test_expert_parallel import LIMIT, E, operands


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24), st.integers(1, 9), st.integers(0, 3))
def test_tables(loads, devices, spare):
    """Every slot holds an expert, every expert has its copies, and no load is lost."""
    slots = -(-len(loads) // devices) + spare
    table = place_copies(np.array(loads), devices, slots)
    assert table.expert_of.shape == (devices * slots,)
    np.testing.assert_array_equal(np.bincount(table.expert_of, minlength=len(loads)), table.count)
    assert (table.count >= 1).all()
    for expert, (own, count) in enumerate(zip(table.slots_of, table.count, strict=True)):
        assert set(own) == set(np.flatnonzero(table.expert_of == expert)) and len(set(own)) == count
    assert table.device_loads(np.array(loads), devices).sum() == pytest.approx(sum(loads))


def test_the_fullest_device_has_less_to_do():
    """256 experts on 16 devices, loads by rank, two slots more a device."""
    loads = 1000.0 / (1 + np.arange(256))
    without, table = place_copies(loads, 16, 16), place_copies(loads, 16, 18)
    mean = loads.sum() / 16
    assert loads.reshape(16, 16).sum(axis=1).max() > 8 * mean  # as the checkpoint has them
    assert without.device_loads(loads, 16).max() > 2.5 * mean  # the hottest expert alone
    assert table.device_loads(loads, 16).max() < 1.1 * mean
    assert table.count[0] > table.count[1] > table.count[-1] == 1


def test_the_sums_are_the_same():
    x, gate_up, down, ids, weights = operands()
    ids = ids.at[0, 0].set(-1).at[1, 1].set(E)  # no expert
    table = place_copies(np.bincount(np.asarray(ids).ravel().clip(0, E - 1)), 4, 3)
    slots = table.slots(ids)
    assert slots[0, 0] == -1 and slots[1, 1] == 12
    np.testing.assert_array_equal(table.expert_of[slots[2:]], ids[2:])
    hot = int(np.argmax(table.count))
    chosen = np.asarray(slots)[np.asarray(ids) == hot]
    assert set(chosen) == set(table.slots_of[hot])  # all copies are used
    want = expert_ffn(x, gate_up, down, ids, weights, swiglu_limit=LIMIT)
    got = expert_ffn(x, *table.laid_out((gate_up, down)), slots, weights, swiglu_limit=LIMIT)
    assert_close(got, want, 1e-5)
    stacks = table.laid_out((gate_up[None], down[None]), axis=1)
    got = expert_ffn(x, *stacks, slots, weights, swiglu_limit=LIMIT, repeat=jnp.int32(0))
    assert_close(got, want, 1e-5)


def test_errors_name_every_problem():
    with pytest.raises(ValueError, match=r"finite and not negative; devices=0 .*; slots=0 .*; 0 x 0 slots"):
        place_copies(np.array([1.0, -1.0]), 0, 0)
    with pytest.raises(ValueError, match="2 x 3 slots are fewer than 7 experts"):
        place_copies(np.ones(7), 2, 3)
    with pytest.raises(ValueError, match=r"loads \(2, 2\) must be \[E\]"):
        place_copies(np.ones((2, 2)), 2, 3)
