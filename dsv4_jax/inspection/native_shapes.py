"""The parameters of a model as official checkpoints store them, by shape: nothing is allocated."""

import jax
import jax.numpy as jnp

from dsv4_jax.checkpoint.load import nested
from dsv4_jax.config import ModelConfig
from dsv4_jax.parameters import Parameter, parameters
from pallas_kernels.formats.blocks import Fp8Blocks, Mxfp4
from pallas_kernels.formats.on_host import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape
from pallas_kernels.formats.weights import QuantizedWeight


def native_shapes(config: ModelConfig):
    """FP4 experts, FP8 linear layers, the rest bfloat16 and float32, as `jax.ShapeDtypeStruct`."""
    return nested({path: _native(parameter) for path, parameter in parameters(config).items()})


def _native(parameter: Parameter):
    if parameter.matrix is None:
        return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype("bfloat16"))
    outputs, inputs = parameter.stored

    shape = (*parameter.leading, outputs, inputs)
    if parameter.role == "expert":
        blocks = Mxfp4(
            jax.ShapeDtypeStruct(fp4_packed_shape(shape), jnp.uint8),
            jax.ShapeDtypeStruct(fp4_scale_shape(shape), jnp.uint8),
        )
    else:
        blocks = Fp8Blocks(
            jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(fp8_scale_shape(shape), jnp.uint8),
        )
    return QuantizedWeight(blocks, parameter.own)
