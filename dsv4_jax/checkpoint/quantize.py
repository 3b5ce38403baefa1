"""Tensors of a quantised official checkpoint: kept as they are in memory, or rounded to FP8 and FP4 now."""

import jax
import ml_dtypes
import numpy as np

from dsv4_jax.checkpoint.dequantize import dequantize_into
from dsv4_jax.checkpoint.held import Blocks, Held
from dsv4_jax.checkpoint.names import TensorSpec
from dsv4_jax.checkpoint.safetensors import DTYPES
from dsv4_jax.checkpoint.storage import Format, Release, StoredTensor, quantized
from dsv4_jax.checkpoint.tensor_rules import FP4_DTYPES
from dsv4_jax.errors import CheckpointError
from pallas_kernels.formats.blocks import Mxfp4, fp4_as_fp8, quantize_fp8_blocks, quantize_mxfp4
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK

CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""`quantization_config` of the released checkpoints."""


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


Pair = tuple[np.ndarray, np.ndarray]
"""A tensor's elements and scales, both as bytes."""


class Pairs:
    """Official tensors in FP8 or FP4: kept as they are held, or rounded to the nearest numbers.

    Remembers the last one, because its elements and scales are written in turn.
    """

    def __init__(self) -> None:
        self._last: tuple[str, Pair] | None = None

    def __call__(self, held: Held, spec: TensorSpec, how: Format) -> Pair:
        """One tensor in a format, 'fp8' or 'fp4'.

        Raises:
            CheckpointError: if the tensor holds NaN or infinity, or FP4 that FP8 does not hold exactly.
        """
        if self._last is None or self._last[0] != spec.name:
            self._last = None  # before the next one is fetched
            blocks = _in_format(held, spec, how)
            self._last = spec.name, (np.asarray(blocks.data).view(np.uint8), np.asarray(blocks.scale))
        return self._last[1]


def _in_format(held: Held, spec: TensorSpec, how: Format) -> Blocks:
    if held.format not in (how, "fp4"):
        return _nearest(held, spec, how)
    blocks = held.tensor(spec)
    assert isinstance(blocks, Blocks)
    if held.format == how:
        return blocks
    assert isinstance(blocks, Mxfp4)
    try:
        return fp4_as_fp8(blocks)
    except ValueError as refused:
        raise CheckpointError("cannot store FP4 as FP8", [f"{spec.name}: {refused}"]) from refused


def _nearest(held: Held, spec: TensorSpec, how: Format) -> Blocks:
    plain = plain_tensor(held, spec, np.dtype(np.float32))
    if not np.isfinite(plain).all():
        raise CheckpointError("cannot quantise", [f"{spec.name}: holds NaN or infinity"])
    return (_to_fp8 if how == "fp8" else _to_fp4)(plain)


_to_fp8 = jax.jit(quantize_fp8_blocks)
_to_fp4 = jax.jit(quantize_mxfp4)


def plain_tensor(held: Held, spec: TensorSpec, dtype: np.dtype) -> np.ndarray:
    """The values of one tensor of any layout, dequantised if need be.

    Args:
        held: the parameter.
        spec: of a tensor that is one official tensor, or several stacked ones.
        dtype: of the result; bfloat16 or float32 if the parameter is quantised.
    """
    found = held.tensor(spec)
    if isinstance(found, np.ndarray):
        return found.astype(dtype, copy=False)
    target = np.empty((*found.data.shape[:-2], *held.shape[-2:]), dtype)
    dequantize_into(target, found.data, found.scale.view(ml_dtypes.float8_e8m0fnu))
    return target.reshape(spec.shape)


def dtype_on_disk(tensor: StoredTensor, recorded: str | None) -> str:
    """The recorded dtype if it is one for the same format: FP4 may be I8 or U8, scales E8M0 or float32."""
    same = ({*FP4_DTYPES}, {"F8_E8M0", "F32"})
    return recorded if any({recorded, tensor.dtype} <= group for group in same) else tensor.dtype


def as_dtype(data: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of elements or scales in one of the dtypes of `dtype_on_disk`."""
    if dtype == "F32":
        return np.ldexp(np.float32(1), data.astype(np.int32) - 127)
    return data.view(DTYPES[dtype])
