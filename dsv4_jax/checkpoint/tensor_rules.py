"""What one tensor's header entry must say: dtype, shape, and the scales beside it."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from dsv4_jax.checkpoint.names import TensorSpec
from dsv4_jax.checkpoint.safetensors import TensorInfo
from dsv4_jax.reading.foreign import OFFICIAL_HOME
from pallas_kernels.formats.on_host import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape
from pallas_kernels.formats.sizes import FP4_GROUP

Format = Literal["plain", "fp8", "fp4"]

PLAIN_DTYPES = ("BF16", "F16", "F32")
TABLE_DTYPES = ("I64", "I32")
FP4_DTYPES = ("I8", "U8")
SCALE_DTYPES = ("F8_E8M0", "F32")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to read: where it goes, where it lies, how it is stored."""

    spec: TensorSpec
    tensor: TensorInfo
    scale: TensorInfo | None
    format: Format


def check_tensor(
    spec: TensorSpec, tensor: TensorInfo, scale: TensorInfo | None
) -> tuple[Entry | None, list[str]]:
    """Matches a tensor with its specification.

    Storage is decided by the tensor's dtype, never by the config or the repository's name.

    Args:
        spec: what the config asks for.
        tensor: what the header says.
        scale: the header entry of `spec.scale_name`, if present.

    Returns:
        (entry, problems); the entry is None if there are problems.
    """
    where = f"{tensor.path.name}: {tensor.name}"
    problems: list[str] = []
    how: Format = "plain"
    if spec.kind == "table":
        if tensor.dtype not in TABLE_DTYPES:
            problems.append(f"{where}: dtype {tensor.dtype}, expected I64 or I32")
        expected = spec.shape
    elif tensor.dtype in PLAIN_DTYPES:
        expected = spec.shape
    elif spec.scale_name is None:
        problems.append(f"{where}: dtype {tensor.dtype}, expected BF16, F16 or F32")
        expected = spec.shape
    elif tensor.dtype == "F8_E4M3":
        how, expected = "fp8", spec.shape
    elif tensor.dtype in FP4_DTYPES:
        how, expected = "fp4", fp4_packed_shape(spec.shape)
        if tensor.shape == spec.shape:
            problems.append(
                f"{where}: {tensor.dtype} {list(tensor.shape)} is int8, not packed FP4 (which would"
                f" be {list(expected)}); int8 quantisation is not supported; {OFFICIAL_HOME}"
            )
            expected = spec.shape
        elif spec.shape[-1] % FP4_GROUP:
            problems.append(f"{where}: FP4 needs rows of a multiple of {FP4_GROUP}, not {spec.shape[-1]}")
    else:
        problems.append(f"{where}: dtype {tensor.dtype}, expected BF16, F16, F32, F8_E4M3, or I8 (FP4)")
        expected = spec.shape
    if tensor.shape != expected:
        problems.append(
            f"{where}: shape {list(tensor.shape)}, expected {list(expected)}"
            f"{_transposed_hint(tensor.shape, expected)}"
        )
    if not problems:
        problems = _scale_problems(spec, tensor, scale, how)
    return (None if problems else Entry(spec, tensor, scale, how)), problems


def _transposed_hint(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    swapped = (*expected[:-2], *expected[:-3:-1])
    return " (it looks transposed)" if len(expected) > 1 and found == swapped else ""


def _scale_problems(spec: TensorSpec, tensor: TensorInfo, scale: TensorInfo | None, how: Format) -> list[str]:
    where = f"{tensor.path.name}: {tensor.name}"
    if how == "plain":
        if scale is None:
            return []
        return [f"{scale.path.name}: {scale.name}: scales beside {tensor.dtype} weights, without use"]
    if scale is None:
        return [f"{where}: {how.upper()} weights without their scales ({spec.scale_name} is missing)"]
    problems = []
    if scale.dtype not in SCALE_DTYPES:
        problems.append(f"{scale.path.name}: {scale.name}: dtype {scale.dtype}, expected F8_E8M0 or F32")
    grid = fp8_scale_shape(spec.shape) if how == "fp8" else fp4_scale_shape(spec.shape)
    if scale.shape != grid:
        problems.append(
            f"{scale.path.name}: {scale.name}: shape {list(scale.shape)}, expected {list(grid)}"
            f"{_grid_hint(spec.shape, scale.shape)}"
        )
    return problems


def _grid_hint(shape: tuple[int, ...], found: tuple[int, ...]) -> str:
    known: Mapping[str, tuple[int, ...]] = {
        "32 x 32 blocks (DeepSeek-V4.1?)": (*shape[:-2], -(-shape[-2] // 32), -(-shape[-1] // 32)),
        "128 x 128 blocks": fp8_scale_shape(shape),
        "1 x 32 groups": (*shape[:-1], -(-shape[-1] // 32)),
        "1 x 16 groups (NVFP4?)": (*shape[:-1], -(-shape[-1] // 16)),
        "one scale a row": (*shape[:-1], 1),
    }
    fitting = [name for name, grid in known.items() if grid == found]
    return f": it looks like {fitting[0]}" if fitting else ""
