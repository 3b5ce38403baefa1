"""Hash tables are read alike by rows and by columns, and on a TPU by columns for less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import v4_flash
from dsv4_jax.model import tables
from dsv4_jax.planning.program_text import costs
from tests.kernels.ahead_of_time import compile_for


@pytest.mark.parametrize(("vocabulary", "width"), [(1, 1), (7, 3), (300, 6)])
def test_columns_give_what_rows_give(vocabulary, width):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (vocabulary, width), dtype=np.int32)
    ids = np.array([0, vocabulary - 1, vocabulary // 2, vocabulary, vocabulary + 5, -1], np.int32)
    want = table[np.clip(ids, 0, vocabulary - 1)]
    np.testing.assert_array_equal(tables.by_columns(jnp.asarray(table), jnp.asarray(ids)), want)
    in_range = ids >= 0  # a negative index counts from the end of an array's rows
    rows = tables.by_rows(jnp.asarray(table), jnp.asarray(ids[in_range]))
    np.testing.assert_array_equal(rows, want[in_range])


@pytest.mark.slow
def test_columns_cost_a_tpu_less():
    config = v4_flash()
    shape = (1, config.vocab_size, config.num_experts_per_tok)  # a stack of one layer, as the model holds it
    operands = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32))

    def cycles(look_up):
        """By the compiler's estimate."""
        text = compile_for("v6e", lambda table, ids: look_up(table[0], ids), *operands).as_text()
        return sum(cost.cycles for cost in costs(text))

    assert 4 * cycles(tables.by_columns) < cycles(tables.by_rows)
