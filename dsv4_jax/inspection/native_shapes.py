"""The parameters of a model as official checkpoints store them, by shape: nothing is allocated."""

import jax
import jax.numpy as jnp

from dsv4_jax.checkpoint.load import nested
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics.formats import Fp8Blocks, Mxfp4
from dsv4_jax.numerics.weights import QuantizedWeight
from dsv4_jax.parameters import Parameter, parameters
from pallas_kernels.arithmetic import cdiv


def native_shapes(config: ModelConfig):
    """FP4 experts, FP8 linear layers, the rest bfloat16 and float32, as `jax.ShapeDtypeStruct`."""
    return nested({path: _native(parameter) for path, parameter in parameters(config).items()})


def _native(parameter: Parameter):
    if parameter.matrix is None:
        return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype("bfloat16"))
    outputs, inputs = parameter.stored

    def array(rows, columns, dtype):
        return jax.ShapeDtypeStruct((*parameter.leading, rows, columns), dtype)

    if parameter.role == "expert":
        blocks = Mxfp4(array(outputs, inputs // 2, jnp.uint8), array(outputs, inputs // 32, jnp.uint8))
    else:
        scale = array(cdiv(outputs, 128), cdiv(inputs, 128), jnp.uint8)
        blocks = Fp8Blocks(array(outputs, inputs, jnp.float8_e4m3fn), scale)
    return QuantizedWeight(blocks, parameter.own)
