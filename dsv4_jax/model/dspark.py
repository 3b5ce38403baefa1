"""DSpark: a draft head of three window blocks that guesses a block of tokens in one pass.

It reads what chosen layers of the backbone put out, averaged over the streams, and keeps a ring of keys of
them. A block of K slots, the next token and noise, sees the last W of these keys and the whole block, later
slots too. A small Markov head then corrects the slots one after the other (DeepSeek-V4-Flash-0731; DSpark,
arXiv 2607.05147).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import DSPARK_STAGES, ModelConfig
from dsv4_jax.model import rope
from dsv4_jax.model import span as spans
from dsv4_jax.model.block import Block
from dsv4_jax.model.cache import LayerCache
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.hyper_connection import StreamCollapse
from dsv4_jax.model.linear import flat, project_float32
from dsv4_jax.model.norm import rms_norm
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.repeat import one_repeat
from dsv4_jax.model.span import Span
from dsv4_jax.numerics import cache_formats
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy


class Slots(NamedTuple):
    """What the blocks of the head make of the slots of a draft block."""

    collapsed: Float[Array, "B K D"]  # for the confidence head
    hidden: Float[Array, "B K D"]  # normalised, for the backbone's head


class DSpark(nnx.Module):
    """The head; embedding and output head are the backbone's. `stages` is a stack of R = 3 blocks."""

    def __init__(
        self, config: ModelConfig, policy: Policy, operations: Operations, declared: Declared
    ) -> None:
        self.main_proj = declared("main_proj")
        self.main_norm = declared("main_norm")
        self.norm = declared("norm")
        self.hc_head = StreamCollapse(config, operations, declared.under("hc_head"))
        self.markov_w1 = declared("markov_w1")
        self.markov_w2 = declared("markov_w2")
        self.confidence = declared("confidence")
        self.stages = Block(config, policy, operations, "window", "learned", declared.under("stages"))
        self.config = config
        self.policy = policy
        self.grids = grids(policy, config.qk_rope_head_dim)
        self.operations = operations
        self.eps = config.rms_norm_eps

    def remember(self, captured: Float[Array, "C B T D"], span: Span, cache: LayerCache) -> LayerCache:
        """The rings after the tokens of one call:

        k_s = rope(rms(wkv_s rms(main_proj captured; main_norm); kv_norm_s), position), for s = 0..2

        The norm of a stage's attention input is not applied: it belongs to the draft streams.

        Args:
            captured: means over the streams after the layers that the head reads.
            span: where the tokens stand.
            cache: before the call.
        """
        main = jnp.moveaxis(captured, 0, 2)
        main = self.operations.linear(self.grids.activation(flat(main)), flat(self.main_proj[...]))
        main = self.grids.activation(rms_norm(main, self.main_norm[...], self.eps))
        rotation = rope.rotation(span.position, rope.window_frequencies(self.config))

        def step(ring, stage):
            block, number = stage
            new = block.attn.entry(main, rotation)
            new = cache_formats.store_entries(new, self.policy.cache_format, self.config.qk_rope_head_dim)
            return self.operations.keep(ring, number, new, span.start, span.num_valid)

        return LayerCache(self._over_stages(step, cache.window), None, None)

    def block(self, embedded: Float[Array, "B K D"], start: Int32[Array, "B"], cache: LayerCache) -> Slots:
        """The slots of a draft block after all stages; slot i stands at position start + i.

        Args:
            embedded: embeddings of the next token, at position `start`, and of noise for the slots after it.
            start: n, tokens of each row; the rings hold the last W of them.
            cache: of the rows.
        """
        batch, count, _ = embedded.shape
        streams = jnp.broadcast_to(
            embedded[:, :, None], (batch, count, self.config.hc_mult, embedded.shape[2])
        )
        span = spans.appended(
            jnp.zeros((batch, count), jnp.int32), start, jnp.full((batch,), count, jnp.int32)
        )
        rotation = rope.rotation(span.position, rope.window_frequencies(self.config))
        window = self.config.sliding_window
        past = start[:, None] - window + jnp.arange(window, dtype=jnp.int32)
        visible = jnp.concatenate([past >= 0, jnp.ones((batch, count), bool)], axis=1)
        visible = jnp.broadcast_to(visible[:, None], (batch, count, window + count))

        def step(streams, stage):
            block, number = stage
            streams = self.operations.pinned(streams, "B T N D")
            x, maps = block.hc_attn.enter(streams, block.attn_norm[...])
            x = self.grids.activation(x)
            q, _ = block.attn.queries(x, rotation)
            own = block.attn.entry(x, rotation)
            held = Entries(cache.window, number).at_positions(past, own.dtype)
            keys = jnp.concatenate([held, own], axis=1)
            o = self.operations.attend_among(q, keys, visible, block.attn.attn_sink[...].reshape(-1))
            y = block.attn.output(o, rotation)
            streams, x, maps = block.hc_ffn.advance(streams, y, maps, block.ffn_norm[...])
            y, *_ = block.ffn(x, span, number)
            return block.hc_ffn.leave(streams, y, maps)

        streams = self._over_stages(step, streams)
        collapsed = self.hc_head(streams)
        return Slots(collapsed, rms_norm(collapsed, self.norm[...], self.eps))

    def follow(self, token: Int32[Array, "B"]) -> Float[Array, "B Mr"]:
        """The Markov embedding of the token before a slot."""
        return self.operations.embed(self.markov_w1[...], token[:, None])[:, 0]

    def correction(self, followed: Float[Array, "B Mr"]) -> Float32[Array, "B V"]:
        """What the token before a slot adds to its logits."""
        return self.operations.score(followed[:, None], self.markov_w2[...], out=(("V", 0),), by_rows=True)[
            :, 0
        ]

    def confidence_logit(
        self, collapsed: Float[Array, "B D"], followed: Float[Array, "B Mr"]
    ) -> Float32[Array, "B"]:
        """The logit that a draft is accepted, given that all before it were."""
        read = [x.astype(jnp.float32) for x in (collapsed, followed)]
        return project_float32(jnp.concatenate(read, axis=-1), self.confidence[...])[:, 0]

    def _over_stages(self, step: Any, carry: Any) -> Any:
        """`step(carry, (block, number))` for the three stages, as one loop."""
        graph, state = nnx.split(self.stages)
        states = nnx.to_pure_dict(state)

        def body(carry, number):
            held = one_repeat(states, number, self.operations.weights_in_place, ("dspark", "stages"))
            return step(carry, (nnx.merge(graph, held), number)), None

        return jax.lax.scan(body, carry, jnp.arange(DSPARK_STAGES, dtype=jnp.int32))[0]
