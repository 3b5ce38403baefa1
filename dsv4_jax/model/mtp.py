"""Multi-token prediction: one more block that guesses the token after the next (report, section 2.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.block import Block, Surroundings
from dsv4_jax.model.cache import LayerCache
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.hyper_connection import StreamCollapse
from dsv4_jax.model.layer_report import LayerReport
from dsv4_jax.model.norm import rms_norm
from dsv4_jax.model.operations import Operations
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy


class MultiTokenPrediction(nnx.Module):
    """Joins the streams at token t with the embedding of token t + 1; window attention, learned routing.

    Embedding and head are the backbone's; the collapse and the last norm are its own.
    """

    def __init__(
        self, config: ModelConfig, policy: Policy, operations: Operations, declared: Declared
    ) -> None:
        self.e_proj = declared("e_proj")
        self.h_proj = declared("h_proj")
        self.enorm = declared("enorm")
        self.hnorm = declared("hnorm")
        self.norm = declared("norm")
        self.hc_head = StreamCollapse(config, operations, declared.under("hc_head"))
        self.block = Block(config, policy, operations, "window", "learned", declared.under("block"))
        self.grids = grids(policy, config.qk_rope_head_dim)
        self.operations = operations
        self.eps = config.rms_norm_eps

    def __call__(
        self,
        streams: Float[Array, "B T N D"],
        next_embedding: Float[Array, "B T D"],
        around: Surroundings,
        cache: LayerCache | None = None,
        collect: frozenset[str] = frozenset(),
    ) -> tuple[Float[Array, "B T D"], LayerReport, LayerCache | None, dict[str, jax.Array]]:
        """Hidden states for the head, row t standing for token t + 2, the report of the layer, its cache, and
        what was to be collected.

        Args:
            streams: backbone streams after the last layer, before collapse and norm.
            next_embedding: embedding of token t + 1 beside the streams of token t.
            around: positions of the tokens t.
            cache: None for whole sequences; else the block's own, which holds the rows before these.
            collect: names from `transformer.TAPS`.
        """
        to_grid = self.grids.activation
        e = to_grid(rms_norm(next_embedding, self.enorm[...], self.eps))
        h = to_grid(rms_norm(streams, self.hnorm[...], self.eps))
        linear = self.operations.linear
        e, h = linear(e, self.e_proj[...]), linear(h, self.h_proj[...])
        graph, state = nnx.split(self.block)
        block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
        x = (e[:, :, None] + h).astype(streams.dtype)
        x, cache, report, taps = block(x, around, cache, jnp.int32(0), collect)
        return rms_norm(self.hc_head(x), self.norm[...], self.eps), report.stacked_once(), cache, taps
