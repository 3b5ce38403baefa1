"""What a long context costs: cache bytes from the shapes of our cache, and FLOPs of one decoded token.

Beside DeepSeek-V3.2 and a plain grouped-query cache of the same depth, as the report compares them
(sections 1 and 2.3.4).
"""

import dataclasses
import math
from fractions import Fraction

from dsv4_jax.config import ModelConfig
from dsv4_jax.config.quantities import integer_problem
from dsv4_jax.inspection.costs import allocated_bytes, allocated_cache, count_parameters
from dsv4_jax.model.geometry import allocated_length
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS, CacheFormat

V32_LAYERS = 61
V32_BYTES_PER_TOKEN = V32_LAYERS * (656 + 132)  # FP8 latent with bf16 rotary, FP8 indexer key
GQA_BYTES_PER_LAYER = 2 * 8 * 128 * 2  # keys and values, 8 heads of 128, bf16

# DeepSeek-V3.2: 37.48B active parameters, indexer and head included; 1.06B of them in bf16 or float32.
V32_LINEAR_FLOPS, V32_PLAIN_FLOPS = 74.95e9, 2.12e9
V32_HEADS, V32_KEY, V32_VALUE, V32_TOP_K = 128, 576, 512, 2048
V32_INDEX_HEADS, V32_INDEX_WIDTH = 64, 128


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """One way to keep the context of one sequence."""

    name: str
    per_token: Fraction
    at_context: int  # bytes that the context needs, the part that grows with it only
    allocated: int | None = None  # bytes that this version allocates for it, rings of recent rows included

    @property
    def v32_over_this(self) -> float:
        """How many times smaller than V3.2's."""
        return float(V32_BYTES_PER_TOKEN / self.per_token)


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one decoded token; a multiply-add is 2."""

    linear: float  # every active parameter but the embedding
    plain: float  # the part of `linear` whose weights are stored in bf16 or float32
    attention: float
    indexer: float

    @property
    def total(self) -> float:
        """All of them, counted once."""
        return self.linear + self.attention + self.indexer

    def fp8_equivalent(self, indexer_weight: float) -> float:
        """Weighted: FP8 and FP4 matmuls 1, bf16 ones (plain weights, core attention) 2.

        Args:
            indexer_weight: 0.5 for FP4 queries and keys, 1 for FP8.
        """
        return self.linear + self.plain + 2 * self.attention + indexer_weight * self.indexer


@dataclasses.dataclass(frozen=True)
class ContextCost:
    """Result of `context_cost`."""

    context: int
    allocated_tokens: int  # what a cache for that context has room for
    caches: tuple[CacheBytes, ...]
    flops: TokenFlops
    v32_flops: TokenFlops

    @property
    def flops_share(self) -> float:
        """Of V3.2's, counted once."""
        return self.flops.total / self.v32_flops.total

    @property
    def fp8_equivalent_share(self) -> float:
        """Of V3.2's, weighted (see `TokenFlops.fp8_equivalent`)."""
        return self.flops.fp8_equivalent(0.5) / self.v32_flops.fp8_equivalent(1.0)


def context_cost(config: ModelConfig, context: int) -> ContextCost:
    """Costs of a context of so many tokens.

    Raises:
        ValueError: for a context below 1 or beyond the model's positions.
    """
    problem = integer_problem("context", context, 1, config.max_position_embeddings)
    if problem:
        raise ValueError(f"{problem} (max_position_embeddings)")
    capacity = allocated_length(config, context)

    def ours(form: CacheFormat) -> CacheBytes:
        size = allocated_cache(config, cache_format=form).bytes_per_token
        name = f"this model, {'bf16' if form == 'plain' else form}"
        allocated = allocated_bytes(config, capacity, cache_format=form)
        return CacheBytes(name, size, math.floor(size * context), allocated)

    others = [
        ("DeepSeek-V3.2, fp8", Fraction(V32_BYTES_PER_TOKEN)),
        ("GQA, 8 heads of 128, bf16", Fraction(GQA_BYTES_PER_LAYER * config.num_hidden_layers)),
    ]
    caches = (
        *map(ours, CACHE_FORMATS),
        *(CacheBytes(name, size, math.floor(size * context)) for name, size in others),
    )
    return ContextCost(context, capacity, caches, token_flops(config, context), v32_flops(context))


def token_flops(config: ModelConfig, context: int) -> TokenFlops:
    """Of the token that has `context` tokens in its view, itself included."""
    c = config
    num_csa, num_hca = c.attention_kinds.count("csa"), c.attention_kinds.count("hca")
    near = c.num_hidden_layers * min(context, c.sliding_window)
    chosen = num_csa * min(c.index_topk, context // c.csa_ratio)
    keys = near + chosen + num_hca * (context // c.hca_ratio)
    return TokenFlops(
        linear=2.0 * count_parameters(c).active,
        plain=2.0 * _plain_parameters(c),
        attention=4.0 * c.num_attention_heads * c.head_dim * keys,
        indexer=2.0 * c.index_n_heads * c.index_head_dim * num_csa * (context // c.csa_ratio),
    )


def v32_flops(context: int) -> TokenFlops:
    """The same of DeepSeek-V3.2: every layer attends to 2048 chosen tokens and scores all of them."""
    per_key = 2.0 * V32_HEADS * (V32_KEY + V32_VALUE)
    return TokenFlops(
        linear=V32_LINEAR_FLOPS,
        plain=V32_PLAIN_FLOPS,
        attention=V32_LAYERS * per_key * min(context, V32_TOP_K),
        indexer=2.0 * V32_LAYERS * V32_INDEX_HEADS * V32_INDEX_WIDTH * context,
    )


def _plain_parameters(c: ModelConfig) -> int:
    """Matrices that releases keep in bf16 or float32: head, compressors, router, mHC, indexer weights."""
    num_csa, num_hca = c.attention_kinds.count("csa"), c.attention_kinds.count("hca")
    csa = 2 * 2 * (c.head_dim + c.index_head_dim) + c.index_n_heads
    rows = num_csa * csa + num_hca * 2 * c.head_dim + c.num_hidden_layers * c.n_routed_experts
    mixing = 2 * c.num_hidden_layers * (2 + c.hc_mult) * c.hc_mult * c.hc_mult * c.hidden_size
    return (c.vocab_size + rows) * c.hidden_size + mixing
