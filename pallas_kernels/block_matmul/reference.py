"""What `block_matmul` means. Nothing in this file is fast."""

import jax

from pallas_kernels.formats.blocks import Fp8Blocks
from pallas_kernels.precision import einsum_float32


def block_matmul_reference(x: jax.Array, weight: Fp8Blocks, groups: int = 1) -> jax.Array:
    """The definition, for one matrix; the contract is in `op.block_matmul`."""
    matrices = weight.dequantize(x.dtype).reshape(groups, -1, weight.shape[1])
    y = einsum_float32("tgi,goi->tgo", x.reshape(len(x), groups, -1), matrices)
    return y.reshape(len(x), -1).astype(x.dtype)
