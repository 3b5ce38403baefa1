"""Tensors of a quantised official checkpoint: kept as they are in memory, or rounded to FP8 and FP4 now."""

import jax
import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.dequantize import FP4_GROUP, dequantize_into
from dsv4_jax.checkpoint.names import TensorSpec
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.storage import Format, Release, StoredTensor, quantized
from dsv4_jax.checkpoint.tensor_rules import FP4_DTYPES
from dsv4_jax.checkpoint.values import place_in
from dsv4_jax.errors import CheckpointError
from dsv4_jax.numerics import formats
from dsv4_jax.numerics.weights import QuantizedWeight, elements, scale

CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [formats.FP8_BLOCK, formats.FP8_BLOCK],
}
"""`quantization_config` of the released checkpoints."""


def format_of(leaf: object) -> Format:
    """How a parameter is held: bf16 stands for a plain array of any dtype."""
    if not isinstance(leaf, QuantizedWeight):
        return "bf16"
    return "fp8" if isinstance(leaf.blocks, formats.Fp8Blocks) else "fp4"


def format_in(release: Release, spec: TensorSpec) -> Format:
    """How a release stores a tensor."""
    if spec.scale_name is None:
        return "bf16"
    return release.experts if spec.parameter.role == "expert" else release.linears


def quantizing_problems(specs: tuple[TensorSpec, ...], release: Release) -> list[str]:
    """Tensors whose shape a release's format cannot hold."""
    return [
        f"{spec.name} {list(spec.shape)}: FP4 needs rows of a multiple of {FP4_GROUP}"
        for spec in specs
        if format_in(release, spec) == "fp4" and spec.shape[-1] % FP4_GROUP
    ]


def stored_pair(spec: TensorSpec, how: Format) -> tuple[StoredTensor, StoredTensor]:
    """The two tensors of a file: elements and scales."""
    assert spec.scale_name is not None
    first, second = quantized(spec.name, spec.scale_name, spec.shape, how)
    return first, second


def kept(leaf: QuantizedWeight, spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's elements (bytes) and scales (bytes) as they lie in memory.

    Args:
        leaf: of the parameter.
        spec: of an official tensor, so that its index covers all leading axes.
    """
    data, codes = np.asarray(elements(leaf)), np.asarray(scale(leaf))
    return data[spec.index].view(np.uint8), codes[spec.index]


class Rounding:
    """Rounds plain tensors; remembers the last one, because its elements and scales are written in turn."""

    def __init__(self) -> None:
        self._name = ""
        self._pair: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, leaf: object, spec: TensorSpec, how: Format) -> tuple[np.ndarray, np.ndarray]:
        """Elements (bytes) and scales (bytes) of the nearest numbers in a format, 'fp8' or 'fp4'.

        Raises:
            CheckpointError: if the tensor holds NaN or infinity, or FP4 that FP8 does not hold exactly.
        """
        if self._pair is None or self._name != spec.name:
            blocks = (
                _as_fp8(leaf, spec) if (format_of(leaf), how) == ("fp4", "fp8") else _nearest(leaf, spec, how)
            )
            data = blocks.elements if isinstance(blocks, formats.Fp8Blocks) else blocks.packed
            self._name, self._pair = spec.name, (np.asarray(data).view(np.uint8), np.asarray(blocks.scale))
        return self._pair


def _nearest(leaf: object, spec: TensorSpec, how: Format) -> formats.Fp8Blocks | formats.Mxfp4:
    plain = plain_part(leaf, spec, np.dtype(np.float32))
    if not np.isfinite(plain).all():
        raise CheckpointError("cannot quantise", [f"{spec.name}: holds NaN or infinity"])
    return (_to_fp8 if how == "fp8" else _to_fp4)(plain)


def _as_fp8(leaf: QuantizedWeight, spec: TensorSpec) -> formats.Fp8Blocks:
    packed, codes = kept(leaf, spec)
    try:
        return formats.fp4_as_fp8(formats.Mxfp4(packed, codes))
    except ValueError as refused:
        raise CheckpointError("cannot store FP4 as FP8", [f"{spec.name}: {refused}"]) from refused


_to_fp8 = jax.jit(formats.quantize_fp8_blocks)
_to_fp4 = jax.jit(formats.quantize_mxfp4)


def dequantized(leaf: QuantizedWeight, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    """The plain values of one tensor of any layout.

    Args:
        leaf: of the parameter.
        spec: of a tensor that is one official tensor, or several stacked ones.
        dtype: bfloat16 or float32.
    """
    data, codes = np.asarray(elements(leaf))[spec.index], np.asarray(scale(leaf))[spec.index]
    fp8 = data.dtype == ml_dtypes.float8_e4m3fn
    target = np.empty(data.shape if fp8 else (*data.shape[:-1], 2 * data.shape[-1]), dtype)
    dequantize_into(target, data, codes.view(ml_dtypes.float8_e8m0fnu))
    return target.reshape(spec.shape)


def plain_part(leaf: object, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    """The values of one tensor, dequantised if need be."""
    if isinstance(leaf, QuantizedWeight):
        return dequantized(leaf, spec, dtype)
    return place_in(np.asarray(leaf), spec).astype(dtype, copy=False)


def dtype_on_disk(tensor: StoredTensor, recorded: str | None) -> str:
    """The recorded dtype if it is one for the same format: FP4 may be I8 or U8, scales E8M0 or float32."""
    same = ({*FP4_DTYPES}, {"F8_E8M0", "F32"})
    return recorded if any({recorded, tensor.dtype} <= group for group in same) else tensor.dtype


def as_dtype(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of elements or scales in one of the dtypes of `dtype_on_disk`."""
    if dtype == "F32":
        return np.ldexp(np.float32(1), data.astype(np.int32) - 127)
    return data.view(DTYPES[dtype])
