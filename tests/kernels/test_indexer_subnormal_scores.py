"""The indexer's choice: scores of 0, -0 and subnormals compete by index, in the kernel and its reference."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.indexer.kernel_tpu_select import ordered
from pallas_kernels.indexer.reference import index_select_reference

SCORES = np.array([-1e-40, 0.0, 1e-42, -0.0, 1.2e-38, -1.2e-38], np.float32)


def test_the_kernel_orders_them_as_zero():
    assert ordered(jnp.asarray(SCORES)).tolist()[:4] == [0, 0, 0, 0]
    assert ordered(jnp.asarray(SCORES))[4] > 0 > ordered(jnp.asarray(SCORES))[5]


def test_the_reference_chooses_them_by_index():
    got = index_select_reference(jnp.asarray(SCORES)[None, None], 3)[0, 0]
    assert got.tolist() == [True, True, False, False, True, False]
