"""What a configuration costs: parameters by part, cache bytes, checkpoint bytes.

All of it from shapes. Nothing is allocated: a model of 1.6T parameters needs no more memory than a
small one. The counts are those of the report's section 4.2 (284B, 13B active for Flash; 1.6T, 49B
for Pro), by part.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction

from dsv4_jax.checkpoint import storage
from dsv4_jax.config import ModelConfig, layer_stacks, v4_flash, v4_pro
from dsv4_jax.config.io import ConfigFile
from dsv4_jax.parameters import Path, parameters, row_at
from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats.entries import scale_bytes
from pallas_kernels.formats.sizes import FP4_GROUP

PRESETS = {"flash": v4_flash, "pro": v4_pro}
"""Models that can be inspected by name, without any file."""

STORAGES = {"FP4 experts, FP8 linears": storage.PREVIEW, "BF16": storage.PLAIN}


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model without its MTP block; integers of hash tables are not counted."""

    attention: int  # projections, their norms, sinks
    compressors: int  # of the KV entries
    indexers: int  # with their own compressors
    moe: int  # gates, selection biases, routed and shared experts
    hyper_connections: int  # mHC of every sublayer, and the head collapse
    norms: int  # of the sublayers, and the last
    embedding: int
    head: int
    inactive_experts: int  # part of `moe`: experts that one token does not visit

    @property
    def total(self) -> int:
        """All of them."""
        parts = dataclasses.asdict(self)
        del parts["inactive_experts"]
        return sum(parts.values())

    @property
    def active_with_embedding(self) -> int:
        """What one token uses, the whole embedding table included."""
        return self.total - self.inactive_experts

    @property
    def active(self) -> int:
        """What one token multiplies with: the head included, the embedding table left out."""
        return self.active_with_embedding - self.embedding


@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """Parameters of one layer's pieces; 0 where the model has no layer of that kind."""

    attention: int
    csa_compressor: int
    hca_compressor: int
    indexer: int
    expert: int


@dataclasses.dataclass(frozen=True)
class CacheFormat:
    """How cache entries are stored (report, section 2.3.4)."""

    name: str
    entry_bytes: int  # one KV entry: a window entry, or a compressed one
    index_key_bytes: int  # one indexer key


@dataclasses.dataclass(frozen=True)
class CacheCost:
    """Bytes that one sequence needs in a cache format."""

    format: CacheFormat
    bytes_per_token: Fraction  # growth: compressed entries and indexer keys
    window_bytes: int  # fixed: the last W entries of every layer
    mtp_window_bytes: int  # the same of the MTP block, 0 without one

    def at(self, num_tokens: int) -> int:
        """Bytes of the growing part after `num_tokens` tokens."""
        return math.floor(self.bytes_per_token * num_tokens)


@dataclasses.dataclass(frozen=True)
class AllocatedCache:
    """What the cache of this version allocates for one sequence, from the shapes of its arrays."""

    dtype: str
    bytes_per_token: Fraction
    fixed_bytes: int  # rings of recent rows and counters


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Fixed float32 state of a sequence's compressors."""

    full_buffers: int  # projected values and gates of every row that may still be needed
    snapshot: int  # at a multiple of all ratios: only the overlap rows of CSA


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything `dsv4 inspect` shows."""

    config: ModelConfig
    parameters: ParameterCounts
    mtp_total: int
    mtp_active: int
    dspark_total: int  # of a DSpark draft head, 0 without one
    dspark_active: int
    layer: LayerCounts
    caches: tuple[CacheCost, ...]
    allocated: AllocatedCache
    state: StateBytes
    checkpoint_bytes: Mapping[str, int]  # storage -> bytes of all tensors
    memory_bytes: Mapping[str, int]  # storage -> bytes of the parameters in memory, bfloat16, native weights

    @property
    def total_with_mtp(self) -> int:
        """Parameters of everything a checkpoint holds, with either draft head."""
        return self.parameters.total + self.mtp_total + self.dspark_total


def inspect_config(config: ModelConfig, *, dspark_markov_rank: int | None = None) -> Inspection:
    """Counts everything about `config`.

    Args:
        config: any model.
        dspark_markov_rank: of a DSpark draft head that the config does not have; adds the size of a
            checkpoint with it.
    """
    mtp_total, mtp_active = count_mtp(config)
    dspark_total, dspark_active = count_dspark(config)
    return Inspection(
        config=config,
        parameters=count_parameters(config),
        mtp_total=mtp_total,
        mtp_active=mtp_active,
        dspark_total=dspark_total,
        dspark_active=dspark_active,
        layer=count_layer(config),
        caches=tuple(cache_cost(config, chosen) for chosen in cache_formats(config)),
        allocated=allocated_cache(config),
        state=state_bytes(config),
        checkpoint_bytes=checkpoint_bytes(config, dspark_markov_rank),
        memory_bytes={name: storage.resident_bytes(config, release) for name, release in STORAGES.items()},
    )


def inspect_file(file: ConfigFile) -> Inspection:
    """`inspect_config` of a file."""
    return inspect_config(file.config)


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of the model without MTP block, by part."""
    counts = dict.fromkeys([field.name for field in dataclasses.fields(ParameterCounts)], 0)
    for path, size in _sizes(config).items():
        if path[0] in ("mtp", "dspark"):
            continue
        counts[row_at(path).part] += size
        if row_at(path).role == "expert":
            counts["inactive_experts"] += _inactive(config, size)
    return ParameterCounts(**counts)


def count_mtp(config: ModelConfig) -> tuple[int, int]:
    """(all, active) parameters of the MTP block; embedding and head are shared with the model."""
    return _count_head(config, "mtp")


def count_dspark(config: ModelConfig) -> tuple[int, int]:
    """(all, active) parameters of the DSpark draft head, likewise; active for one token of a block, whose
    Markov embedding is one row of a table."""
    total, active = _count_head(config, "dspark")
    return total, active - (config.vocab_size * config.dspark.markov_rank if config.dspark else 0)


def _count_head(config: ModelConfig, root: str) -> tuple[int, int]:
    sizes = {path: size for path, size in _sizes(config).items() if path[0] == root}
    inactive = sum(_inactive(config, size) for path, size in sizes.items() if row_at(path).role == "expert")
    return sum(sizes.values()), sum(sizes.values()) - inactive


def count_layer(config: ModelConfig) -> LayerCounts:
    """Parameters of the pieces of one layer."""
    counts = {"attention": 0, "csa_compressor": 0, "hca_compressor": 0, "indexer": 0, "expert": 0}
    stacks = layer_stacks(config)
    sizes = {path: size for path, size in _sizes(config).items() if path[0] == "stacks"}
    seen = set()
    for path, size in sizes.items():
        stack, block = stacks[int(path[1])], int(path[3])
        kind = stack.kinds[block][0]
        piece = {
            "attention": "attention",
            "compressors": f"{kind}_compressor",
            "indexers": "indexer",
        }
        row = row_at(path)
        name = piece.get(row.part, "expert" if row.role == "expert" else None)
        # Layers of a kind are alike: each parameter of a piece is counted where it is met first.
        if name is None or (name, path[4:]) in seen:
            continue
        seen.add((name, path[4:]))
        each = size // stack.repeats
        counts[name] += each // config.n_routed_experts if name == "expert" else each
    return LayerCounts(**counts)


def cache_formats(config: ModelConfig) -> tuple[CacheFormat, ...]:
    """The storage formats of section 3.5, for the head widths of `config`."""
    rotary, plain = config.qk_rope_head_dim, config.head_dim - config.qk_rope_head_dim
    fp8 = plain + 2 * rotary + scale_bytes(plain)
    width = config.index_head_dim
    return (
        CacheFormat("bf16, bf16 keys", 2 * config.head_dim, 2 * width),
        CacheFormat("fp8, fp8 keys", fp8, width + 4),
        CacheFormat("fp8, mxfp4 keys", fp8, width // 2 + cdiv(width, FP4_GROUP)),
    )


def cache_cost(config: ModelConfig, chosen: CacheFormat) -> CacheCost:
    """Bytes of one sequence:

    bytes per token = n_CSA (entry + index key) / m_CSA + n_HCA entry / m_HCA
    """
    num_csa = config.attention_kinds.count("csa")
    num_hca = config.attention_kinds.count("hca")
    window = chosen.entry_bytes * config.sliding_window
    return CacheCost(
        format=chosen,
        bytes_per_token=Fraction(num_csa * (chosen.entry_bytes + chosen.index_key_bytes), config.csa_ratio)
        + Fraction(num_hca * chosen.entry_bytes, config.hca_ratio),
        window_bytes=window * config.num_hidden_layers,
        mtp_window_bytes=window * config.num_nextn_predict_layers,
    )


def state_bytes(config: ModelConfig) -> StateBytes:
    """Compressor state in float32: values and gates, each [w m rows, w Dc columns]."""
    num_csa = config.attention_kinds.count("csa")
    num_hca = config.attention_kinds.count("hca")
    width = config.head_dim + config.index_head_dim  # a CSA layer compresses twice
    w = config.branches("csa")
    csa = 2 * (w * config.csa_ratio) * (w * width) * 4
    w = config.branches("hca")
    hca = 2 * (w * config.hca_ratio) * (w * config.head_dim) * 4
    overlap = 2 * config.csa_ratio * width * 4
    return StateBytes(num_csa * csa + num_hca * hca, num_csa * overlap)


def allocated_cache(
    config: ModelConfig, dtype: str = "bfloat16", cache_format: str = "plain"
) -> AllocatedCache:
    """Measures `model.cache.new_cache` for one sequence, by its shapes at two capacities."""
    from dsv4_jax.model.geometry import ROWS

    page = math.lcm(config.csa_ratio, config.hca_ratio) * ROWS
    roomy = dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, 2 * page))
    small, large = (allocated_bytes(roomy, size, dtype, cache_format) for size in (page, 2 * page))
    return AllocatedCache(dtype, Fraction(large - small, page), 2 * small - large)


def allocated_bytes(
    config: ModelConfig, capacity: int, dtype: str = "bfloat16", cache_format: str = "plain"
) -> int:
    """Bytes of all arrays of a cache for one sequence, allocated for `capacity` tokens."""
    import jax
    import jax.numpy as jnp

    from dsv4_jax.model.cache import new_cache

    make = lambda: new_cache(config, 1, capacity, jnp.dtype(dtype), format=cache_format)  # noqa: E731
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def checkpoint_bytes(config: ModelConfig, dspark_markov_rank: int | None = None) -> dict[str, int]:
    """Bytes of all tensors (an index's `total_size`) in each storage that releases use."""
    releases = dict(STORAGES)
    if config.dspark is not None:
        dspark_markov_rank = config.dspark.markov_rank
    if dspark_markov_rank is not None:
        releases["FP4 experts, FP8 linears, DSpark draft head"] = dataclasses.replace(
            storage.FLASH_0731, markov_rank=dspark_markov_rank
        )
    return {name: storage.stored_bytes(config, release) for name, release in releases.items()}


def _sizes(config: ModelConfig) -> dict[Path, int]:
    """Path -> number of elements of every parameter that is not an integer table."""
    return {path: spec.size for path, spec in parameters(config).items() if spec.role != "table"}


def _inactive(config: ModelConfig, size: int) -> int:
    """Of routed-expert parameters, those of the E - Ke experts that a token does not visit."""
    experts = config.n_routed_experts
    return size // experts * (experts - config.num_experts_per_tok)
