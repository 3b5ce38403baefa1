"""How checkpoints store weights, and what the released ones hold: dtype, shape and bytes, from shapes alone.

Nothing here allocates: the totals below equal the published `total_size` of V4-Flash
(159,609,485,896 bytes), V4-Flash-0731 (166,878,536,440 bytes, 72,317 tensors) and V4-Pro-0813
(892,727,580,904 bytes, 149,782 tensors).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import ml_dtypes

from dsv4_jax.checkpoint import names
from dsv4_jax.config import DSpark, ModelConfig
from pallas_kernels.formats.on_host import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape
from pallas_kernels.formats.sizes import FP4_GROUP, FP8_BLOCK

DTYPE_BITS = {"F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "BF16": 16, "F32": 32, "I64": 64}

Format = Literal["plain", "fp8", "fp4"]
"""How a tensor's numbers are held: as they are, in FP8 with scales of 128 x 128 blocks, or in FP4 with scales
of 32 numbers of a row. Released checkpoints hold plain matrices in BF16."""

FP4_DTYPES = ("I8", "U8")
SCALE_DTYPES = ("F8_E8M0", "F32")

QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""Of config.json in the released checkpoints."""

Draft = Literal["mtp", "dspark", "none"]


@dataclasses.dataclass(frozen=True)
class ReleasedTensor:
    """One tensor of a release: safetensors dtype name and shape as in the header of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Release:
    """How a family of releases stores its weights.

    Attributes:
        experts: format of the routed experts; scales are E8M0, 1 x 32 for fp4 and 128 x 128 for
            fp8.
        linears: format of attention, shared-expert, indexer-query and MTP projections.
        draft: what lies under `mtp.*`.
        markov_rank: of DSpark's token-transition head; 0 without DSpark.
    """

    experts: Format
    linears: Literal["fp8", "plain"]
    draft: Draft
    markov_rank: int = 0


PREVIEW = Release("fp4", "fp8", "mtp")
"""V4-Flash and V4-Pro, instruct, April 2026."""
FLASH_0731 = Release("fp4", "fp8", "dspark", markov_rank=256)
PRO_0813 = Release("fp4", "fp8", "dspark", markov_rank=512)
BASE = Release("fp8", "fp8", "mtp")
"""V4-Flash-Base and V4-Pro-Base, as far as is known."""
PLAIN = Release("plain", "plain", "mtp")
"""An unquantised export."""


def released_tensors(
    config: ModelConfig, release: Release, experts: int | None = None
) -> Iterator[ReleasedTensor]:
    """Every tensor of an official checkpoint of `config`, weights before their scales.

    With `experts` so many experts of each layer, see `names.layout_tensors`.
    """
    backbone = dataclasses.replace(config, num_nextn_predict_layers=0, dspark=None)
    for spec in names.official_tensors(backbone, experts):
        yield from _released(spec, release)
    if release.draft == "mtp":
        for depth in range(config.num_nextn_predict_layers):
            for spec in names.mtp_tensors(config, depth, experts):
                yield from _released(spec, release)
    elif release.draft == "dspark":
        for spec in names.dspark_tensors(with_dspark(config, release), experts):
            yield from _released(spec, release)


def with_dspark(config: ModelConfig, release: Release) -> ModelConfig:
    """The config with a DSpark head in place of MTP blocks: its own, or one of the release's Markov rank that
    reads the last layers."""
    if config.dspark is not None:
        return config
    last = config.num_hidden_layers
    head = DSpark(5, config.vocab_size - 1, tuple(range(last - min(3, last), last)), release.markov_rank)
    return dataclasses.replace(config, num_nextn_predict_layers=0, dspark=head)


def stored_bytes(config: ModelConfig, release: Release) -> int:
    """`total_bytes` of all `released_tensors`, found without listing every expert."""
    return sum(
        tensor.num_bytes * (config.n_routed_experts if names.is_one_expert(tensor.name) else 1)
        for tensor in released_tensors(config, release, 1)
    )


def total_bytes(tensors: Iterable[ReleasedTensor]) -> int:
    """The index file's `total_size`: data bytes of all tensors, headers excluded."""
    return sum(tensor.num_bytes for tensor in tensors)


def resident_bytes(config: ModelConfig, release: Release) -> int:
    """Bytes of all parameters in memory, loaded in bfloat16 with native weights, draft heads included.

    Quantised weights take what they take on disk; norms widen to float32, hash tables narrow to int32.
    """

    def bits(spec: names.TensorSpec, tensor: ReleasedTensor) -> int:
        if spec.scale_name is not None:
            return DTYPE_BITS[tensor.dtype]
        return 8 * spec.parameter.dtype(ml_dtypes.bfloat16).itemsize

    return sum(
        math.prod(tensor.shape)
        * bits(spec, tensor)
        // 8
        * (config.n_routed_experts if names.is_one_expert(spec.name) else 1)
        for spec in names.official_tensors(config, 1)
        for tensor in _released(spec, release)
    )


def _released(spec: names.TensorSpec, release: Release) -> Iterator[ReleasedTensor]:
    if spec.scale_name is None:
        dtype = {"matrix": "BF16", "norm": "BF16", "float32": "F32", "table": "I64"}[spec.kind]
        yield ReleasedTensor(spec.name, dtype, spec.shape)
        return
    yield from quantized(spec.name, spec.scale_name, spec.shape, format_in(release, spec))


def quantized(name: str, scale_name: str, shape: tuple[int, ...], how: Format) -> Iterator[ReleasedTensor]:
    """A weight of logical shape [.., O, I] in such a format, and its scales."""
    if how == "plain":
        yield ReleasedTensor(name, "BF16", shape)
    elif how == "fp8":
        yield ReleasedTensor(name, "F8_E4M3", shape)
        yield ReleasedTensor(scale_name, "F8_E8M0", fp8_scale_shape(shape))
    else:
        yield ReleasedTensor(name, "I8", fp4_packed_shape(shape))
        yield ReleasedTensor(scale_name, "F8_E8M0", fp4_scale_shape(shape))


def format_in(release: Release, spec: names.TensorSpec) -> Format:
    """How a release stores a tensor."""
    if spec.scale_name is None:
        return "plain"
    return release.experts if spec.parameter.role == "expert" else release.linears


def quantizing_problems(specs: tuple[names.TensorSpec, ...], release: Release) -> list[str]:
    """Tensors whose shape a release's format cannot hold."""
    return [
        f"{spec.name} {list(spec.shape)}: FP4 needs rows of a multiple of {FP4_GROUP}"
        for spec in specs
        if format_in(release, spec) == "fp4" and spec.shape[-1] % FP4_GROUP
    ]


def stored_pair(spec: names.TensorSpec, how: Format) -> tuple[ReleasedTensor, ReleasedTensor]:
    """The two tensors of a file: elements and scales."""
    assert spec.scale_name is not None
    first, second = quantized(spec.name, spec.scale_name, spec.shape, how)
    return first, second


def dtype_on_disk(tensor: ReleasedTensor, recorded: str | None) -> str:
    """The recorded dtype if it is one for the same format: FP4 may be I8 or U8, scales E8M0 or float32."""
    same = ({*FP4_DTYPES}, {*SCALE_DTYPES})
    return recorded if any({recorded, tensor.dtype} <= group for group in same) else tensor.dtype
