"""Buffers that JAX uses as they are; where arrays go is tested with the parameters that go there."""

import jax
import ml_dtypes
import numpy as np
import pytest

from sharding.placement import aligned


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (300, 301)])
def test_jax_takes_over_aligned_buffers(shape, dtype):
    """What the memory bounds of loading and drawing rest on."""
    array = aligned(shape, np.dtype(dtype))
    array[...] = 1
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
