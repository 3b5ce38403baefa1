"""Attention of one layer: projections, cache, core attention, output (report, section 2.3).

One shared vector a token is both key and value.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import AttentionKind, ModelConfig
from dsv4_jax.model.cache import LayerCache
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.indexer import Indexer
from dsv4_jax.model.linear import flat
from dsv4_jax.model.norm import rms_norm
from dsv4_jax.model.operations import Operations, Queries
from dsv4_jax.model.rope import Rotation, rotate
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy
from sharding.context import line_of


class Attention(nnx.Module):
    """One layer's attention with its projections; `kind` decides which entries exist."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        operations: Operations,
        kind: AttentionKind,
        declared: Declared,
    ) -> None:
        self.wq_a = declared("wq_a")
        self.q_norm = declared("q_norm")
        self.wq_b = declared("wq_b")
        self.wkv = declared("wkv")
        self.kv_norm = declared("kv_norm")
        self.wo_a = declared("wo_a")
        self.wo_b = declared("wo_b")
        self.attn_sink = declared("attn_sink")
        if kind == "window":
            self.compressor = None
        else:
            self.compressor = Compressor(
                config,
                policy,
                operations,
                declared.under("compressor"),
                kind=kind,
                holds="entries",
            )
        self.indexer = (
            Indexer(config, policy, operations, declared.under("indexer")) if kind == "csa" else None
        )
        self.window = config.sliding_window
        self.top_k = config.index_topk
        self.eps = config.rms_norm_eps
        self.policy = policy
        self.num_rotary = config.qk_rope_head_dim
        self.grids = grids(policy, self.num_rotary)
        self.operations = operations

    def __call__(
        self,
        x: Float[Array, "B T D"],
        span: Span,
        rotation: Rotation,
        blocks: Blocks | None,
        in_ring: bool,
        cache: LayerCache | None,
        repeat: Int32[Array, ""],
        collect: frozenset[str],
        mode: TrainingMode = INFERENCE,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, dict[str, jax.Array], Float32[Array, "B T"] | None]:
        """Attention of the tokens of one call (report, section 2.3).

        Args:
            x: normalised sublayer input, compute dtype.
            span: where the tokens stand.
            rotation: angles at the tokens' positions for this layer's kind, f32[B, T, Dr / 2].
            blocks: the layer kind's blocks; None for window layers.
            in_ring: a short call appended to a cache: it attends to its own rows in the window's ring.
            cache: None, or the layer's stack of states, updated in the returned copy.
            repeat: index into that stack.
            collect: "selected" and "attention" are returned by this sublayer (see `view`).
            mode: of training; only without a cache.

        Returns:
            the result, the states, what was collected, and the indexer's loss of each token, if asked for.
        """
        seen_x = self.grids.activation(x)
        q, latent = self.queries(seen_x, rotation)
        kv = self.entry(seen_x, rotation, by_tokens=cache is None)

        new_cache = cache
        before = self.window - 1
        if cache is None:
            near, past = self.operations.line(kv, None, before=before), None
        else:
            ring, near, past = self._through_ring(cache.window, kv, span, in_ring, repeat)
            new_cache = LayerCache(ring, cache.compressor, cache.indexer)

        row = jnp.int32(0) if cache is None else repeat  # without a cache the stack holds this layer only
        entries = index_keys = index_q = index_weights = None
        if self.compressor is not None:
            stack, state = self.compressor(
                x, span, blocks, None if cache is None else cache.compressor, repeat
            )
            entries = Entries(stack, row)
            new_cache = new_cache and LayerCache(new_cache.window, state, new_cache.indexer)
        if self.indexer is not None and (mode.index_loss or not mode.dense):
            # Choosing entries is not differentiable: the indexer is trained by a loss of its own.
            fixed_x, fixed_latent = jax.lax.stop_gradient((x, latent))
            index_q, index_weights = self.indexer.queries(fixed_x, fixed_latent, rotation)
            stack, state = self.indexer.keys(
                fixed_x, span, blocks, None if cache is None else cache.indexer, repeat
            )
            index_keys = Entries(stack, row)
            new_cache = new_cache and LayerCache(new_cache.window, new_cache.compressor, state)

        queries = Queries(
            q,
            span.position,
            None if blocks is None else blocks.lo,
            None if blocks is None else blocks.hi,
            index_q,
            index_weights,
        )
        sink = self.attn_sink[...].reshape(-1)
        rounded = self.grids.rounds_scores
        sizes = {"window": self.window, "top_k": self.top_k, "rounded_scores": rounded}
        index_losses = None
        if index_keys is not None and mode.index_loss:
            operands = (queries, near, entries, index_keys, sink)
            index_losses = self.operations.index_loss(*operands, **sizes, of_chosen=not mode.dense)
        seen = (queries, near, entries, None if mode.dense else index_keys, sink)
        if cache is not None and in_ring:
            o = self.operations.attend_cached(*seen, **sizes)
        else:
            o = self.operations.attend(*seen, **sizes, forward_only=cache is not None)
        asked = collect & {"selected", "attention"}
        taps = {}
        if asked:  # of whole rows, also where a mesh splits them
            line = near if cache is not None and in_ring else line_of(kv, past, before=before)
            taps = self.operations.view(queries, line, *seen[2:], **sizes, collect=asked)
        return self.output(o, rotation), new_cache, taps, index_losses

    def queries(
        self, seen_x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T H Dh"], Float[Array, "B T Q"]]:
        """Rotated queries, and the latent that they come from; `seen_x` is on the grid of activations."""
        linear, pinned = self.operations.linear, self.operations.pinned
        latent = pinned(linear(seen_x, self.wq_a[...], out=(("Q", 0),), by_rows=True), "B T")
        latent = self.grids.activation(rms_norm(latent, self.q_norm[...], self.eps))
        q = pinned(linear(latent, self.wq_b[...], out=(("G", 0), ("J", 1)), by_rows=True), "B T G")
        q = q.reshape(*q.shape[:2], -1, q.shape[-1])
        return rotate(rms_norm(q, None, self.eps), _by_head(rotation)), latent

    def entry(
        self, seen_x: Float[Array, "B T D"], rotation: Rotation, *, by_tokens: bool = False
    ) -> Float[Array, "B T Dh"]:
        """The rotated vector of each token that is key and value; `seen_x` is on the grid of activations.
        On a mesh every device gets all of a sequence, or `by_tokens` stays with the tokens."""
        kv = rms_norm(self.operations.linear(seen_x, self.wkv[...]), self.kv_norm[...], self.eps)
        return self.operations.pinned(self.grids.entry(rotate(kv, rotation)), "B T" if by_tokens else "B")

    def output(self, o: Float[Array, "B T H Dh"], rotation: Rotation) -> Float[Array, "B T D"]:
        """What attention found, turned back and projected in groups."""
        # The values were rotated at their own positions; turning back by the query's leaves the offset.
        groups, _, per_group, head_dim = self.wo_a[...].shape
        o = rotate(o, _by_head(rotation).inverse).reshape(*o.shape[:2], groups, per_group, head_dim)
        a = self.operations.grouped_linear(flat(o), flat(self.wo_a[...]), out=(("G", 0), ("O", 1)))
        over = (("G", groups), ("O", a.shape[-1]))
        y = self.operations.linear(self.grids.activation(flat(a)), flat(self.wo_b[...]), over=over)
        return self.operations.pinned(y, "B T")

    def _through_ring(self, ring, kv, span, in_ring, repeat):
        """The ring after the call, what holds the window entries before and of the call, and those before it.

        What holds them is the ring itself for a short call, else it is the entries in one line.
        """
        new = cache_formats.store_entries(kv, self.policy.cache_format, self.num_rotary)
        if in_ring:
            ring = self.operations.keep(ring, repeat, new, span.start, span.num_valid)
            return ring, Entries(ring, repeat), None
        past = span.start[:, None] - (self.window - 1) + jnp.arange(self.window - 1, dtype=jnp.int32)
        before = Entries(ring, repeat).at_positions(past, kv.dtype)
        line = self.operations.line(kv, before, before=before.shape[1])
        return self.operations.keep(ring, repeat, new, span.start, span.num_valid), line, before


def _by_head(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cos[:, :, None], rotation.sin[:, :, None])
