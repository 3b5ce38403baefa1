"""The official quantisation simulation: values take the low-precision grid, gradients pass straight through.

Report, sections 3.4 and 5.2.1; what is rounded where follows the released inference code. A plain cast would
also quantise the gradient (the transpose of a cast casts the cotangent), so every rounding here states its
own gradient: the identity. Rounded values come in the dtype of the input; bfloat16 holds them exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats.blocks import quantize_fp8_blocks, quantize_fp8_groups, quantize_mxfp4
from pallas_kernels.formats.sizes import ACTIVATION_GROUP, ENTRY_GROUP, FP4_GROUP

SWITCHES = {
    "act_fp8": "inputs of the FP8 and FP4 matmuls: FP8, groups of 128 channels",
    "kv_fp8": "window and compressed entries, channels without rotation: FP8, groups of 64",
    "idx_hadamard_fp4": "indexer queries and keys: Hadamard transform, then FP4, groups of 32",
    "idx_score_bf16": "index scores: every step rounded to bfloat16",
    "expert_fp4": "routed expert weights: FP4, groups of 32 inputs",
    "compressor_fp32": "the compressors' matmuls and raw rows: float32",
}
"""The parts of the simulation; each can be left out."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_fp8(x: Float[Array, "*rows C"], group: int) -> Float[Array, "*rows C"]:
    """x on the FP8 grid of `quantize_fp8_groups`; gradient 1. A last group may be smaller."""
    channels = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -channels % group)])
    return quantize_fp8_groups(padded, group).dequantize(x.dtype)[..., :channels]


fake_fp8.defvjp(lambda x, group: (fake_fp8(x, group), None), lambda group, _, d_y: (d_y,))


@jax.custom_vjp
def fake_mxfp4(x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    """x on the FP4 grid of `quantize_mxfp4`; gradient 1. A last group may be smaller."""
    channels = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -channels % FP4_GROUP)])
    return quantize_mxfp4(padded).dequantize(x.dtype)[..., :channels]


fake_mxfp4.defvjp(lambda x: (fake_mxfp4(x), None), lambda _, d_y: (d_y,))


@jax.custom_vjp
def fake_fp8_weight(x: Float[Array, "*stack O I"]) -> Float[Array, "*stack O I"]:
    """A weight matrix on the FP8 grid of `quantize_fp8_blocks`; gradient 1, to the float32 master."""
    return quantize_fp8_blocks(x).dequantize(x.dtype)


fake_fp8_weight.defvjp(lambda x: (fake_fp8_weight(x), None), lambda _, d_y: (d_y,))


def fake_activation(x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    """What an FP8 matmul sees of its input."""
    return fake_fp8(x, ACTIVATION_GROUP)


def fake_entry(entry: Float[Array, "*rows Dh"], num_rotary: int) -> Float[Array, "*rows Dh"]:
    """A rotated window or compressed entry as the FP8 cache keeps it: rotary channels stay as they are."""
    still = entry.shape[-1] - num_rotary
    return jnp.concatenate([fake_fp8(entry[..., :still], ENTRY_GROUP), entry[..., still:]], axis=-1)


def fake_index_vector(x: Float[Array, "*rows Di"]) -> Float[Array, "*rows Di"]:
    """A rotated indexer query or key: Hadamard transform, then FP4 over all channels."""
    return fake_mxfp4(hadamard(x))


def hadamard(x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
    """x H n^-1/2 with the natural-order Sylvester matrix H; orthogonal and symmetric.

    Operands and result are rounded to bfloat16, sums are float32. No random signs.

    Raises:
        ValueError: if n is not a power of two.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"a Hadamard transform needs a power of two of channels, not {n}")
    index = np.arange(n)
    ones = np.array([[bin(i & j).count("1") for j in index] for i in index])
    matrix = jnp.asarray(1.0 - 2.0 * (ones % 2), jnp.float32)
    rows = to_bfloat16(x.astype(jnp.float32))
    y = jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)
    return to_bfloat16(y * np.float32(n**-0.5)).astype(x.dtype)


@jax.custom_vjp
def to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x rounded to bfloat16, in its own dtype; gradient 1."""
    # A pair of casts would be folded away by some backends.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


to_bfloat16.defvjp(lambda x: (to_bfloat16(x), None), lambda _, d_y: (d_y,))
