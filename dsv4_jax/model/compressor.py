"""The compressor: m consecutive tokens become one entry by gated softmax pooling (report, section 2.3)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from dsv4_jax.config import AttentionKind, ModelConfig
from dsv4_jax.model.cache import CompressorCache
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.linear import project_float32
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.numerics import cache_formats, cache_storage
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy


class Compressor(nnx.Module):
    """Emits one entry a complete block of m tokens.

    HCA (`branches` = 1) pools the m rows of the block. CSA and its indexer (`branches` = 2) pool 2m rows:
    branch 0 of the previous block and branch 1 of the current one. Both roles add the positional bias of
    the row's place in its own block.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        operations: Operations,
        declared: Declared,
        *,
        kind: AttentionKind,
        holds: Literal["entries", "index_keys"],
    ) -> None:
        self.wkv = declared("wkv")
        self.wgate = declared("wgate")
        self.ape = declared("ape")
        self.norm = declared("norm")
        self.ratio = config.ratio(kind)
        self.branches = config.branches(kind)
        self.eps = config.rms_norm_eps
        self.policy = policy
        self.operations = operations
        self.holds = holds
        self.num_rotary = config.qk_rope_head_dim
        self.grids = grids(policy, self.num_rotary)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        span: Span,
        blocks: Blocks,
        cache: CompressorCache | None,
        repeat: Int32[Array, ""],
    ) -> tuple[Float[Array, "R B S Dc"], CompressorCache | None]:
        """Projects the tokens, emits the blocks they complete, and stores rows and entries.

        Args:
            x: normalised sublayer input, compute dtype.
            span, blocks: where the tokens stand; `blocks` for this compressor's ratio.
            cache: None for whole sequences; otherwise its stack of states.
            repeat: index into that stack.

        Returns:
            All entries visible to this call (the cache's stack in its format, or [1, B, P, Dc] without a
            cache) and the cache after it.
        """
        product = project_float32 if self.grids.compressor_dtype else self.operations.linear
        # Blocks take rows of tokens that a mesh may have split. With a cache every device gets all of them.
        dims = "B T" if cache is None else "B"
        kv, gate = (self.operations.pinned(product(x, w[...]), dims) for w in (self.wkv, self.wgate))
        if cache is None:
            return self._emit(kv, gate, blocks, by_tokens=True)[None], None
        rings = [
            self.operations.keep(ring, repeat, rows, span.start, span.num_valid)
            for ring, rows in ((cache.kv, kv), (cache.gate, gate))
        ]
        row_dtype = self.policy.row_dtype
        held = lambda ring: cache_formats.read(ring[repeat], row_dtype)  # noqa: E731
        if blocks.in_ring:
            sources = lambda: [held(ring) for ring in rings]  # noqa: E731
        else:
            sources = lambda: [  # noqa: E731
                jnp.concatenate([held(ring), rows.astype(row_dtype)], axis=1)
                for ring, rows in ((cache.kv, kv), (cache.gate, gate))
            ]
        # Only a whole block makes an entry: most single-token steps complete none and skip the pooling.
        new = jax.lax.cond(
            jnp.any(blocks.count > 0),
            lambda: self._emit(*sources(), blocks),
            lambda: jnp.zeros((*blocks.is_first.shape, kv.shape[-1]), self.policy.compute_dtype),
        )
        at = (blocks.first, blocks.count)
        entries = self.operations.store(cache.entries, repeat, self._stored(new), *at)
        return cache_storage.in_rows(entries), CompressorCache(*rings, entries)

    def _emit(
        self,
        kv: Float[Array, "B rows w Dc"],
        gate: Float[Array, "B rows w Dc"],
        blocks: Blocks,
        *,
        by_tokens: bool = False,
    ) -> Float[Array, "B P Dc"]:
        weights = self.ape[...], self.norm[...]
        dtype = self.policy.compute_dtype
        entries = self.operations.compress(
            *(kv, gate, *weights, *blocks.rotation),
            is_first=blocks.is_first,
            source=blocks.source,
            previous=blocks.previous,
            by_tokens=by_tokens,
            eps=self.eps,
            dtype=dtype,
        )
        return self.grids.entry(entries) if self.holds == "entries" else self.grids.index_key(entries)

    def _stored(self, entries):
        if self.holds == "entries":
            return cache_formats.store_entries(entries, self.policy.cache_format, self.num_rotary)
        return cache_formats.store_keys(entries, self.policy.cache_format)
