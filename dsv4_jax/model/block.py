"""One layer: attention and mixture of experts, each inside its own hyper-connection (report, section 2)."""

from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int16, Int32

from dsv4_jax.config import AttentionKind, ModelConfig, RouterKind
from dsv4_jax.model.attention import Attention
from dsv4_jax.model.cache import LayerCache
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.hyper_connection import HyperConnection
from dsv4_jax.model.layer_report import LayerReport
from dsv4_jax.model.moe import MixtureOfExperts
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.rope import Rotation
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.numerics.policy import Policy


class Surroundings(NamedTuple):
    """What all layers share in one call, keyed by layer kind where it differs."""

    span: Span
    counted: Bool[Array, "B T"]  # tokens whose routing the layers report
    window_rotation: Rotation
    compressed_rotation: Rotation
    csa_blocks: Blocks
    hca_blocks: Blocks
    window_in_ring: bool  # a short call appended to a cache attends to its own rows in the windows' rings
    mode: TrainingMode = INFERENCE
    experts: Int16[Array, "*layers B T Ke"] | None = None  # given experts of each token; None: the router's

    def rotation(self, kind: AttentionKind) -> Rotation:
        """Angles at the tokens' positions for a layer of this kind."""
        return self.window_rotation if kind == "window" else self.compressed_rotation

    def blocks(self, kind: AttentionKind) -> Blocks | None:
        """The blocks of a layer of this kind."""
        return {"window": None, "csa": self.csa_blocks, "hca": self.hca_blocks}[kind]


class Block(nnx.Module):
    """A layer of one attention kind and one router kind; parameters carry the repeats of its stack."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        operations: Operations,
        attention: AttentionKind,
        router: RouterKind,
        declared: Declared,
    ) -> None:
        self.hc_attn = HyperConnection(config, operations, declared.under("hc_attn"))
        self.attn_norm = declared("attn_norm")
        self.attn = Attention(config, policy, operations, attention, declared.under("attn"))
        self.hc_ffn = HyperConnection(config, operations, declared.under("hc_ffn"))
        self.ffn_norm = declared("ffn_norm")
        self.ffn = MixtureOfExperts(config, policy, operations, router, declared.under("ffn"))
        self.operations = operations
        self.kind = attention
        self.router = router

    def __call__(
        self,
        streams: Float[Array, "B T N D"],
        around: Surroundings,
        cache: LayerCache | None,
        repeat: Int32[Array, ""],
        collect: frozenset[str],
    ) -> tuple[Float[Array, "B T N D"], LayerCache | None, LayerReport, dict[str, jax.Array]]:
        """Two sublayers; also the report of the routing, and what `collect` names (`transformer.TAPS`)."""
        streams = self.operations.pinned(streams, "B T N D")
        x, maps = self.hc_attn.enter(streams, self.attn_norm[...])
        where = (around.span, around.rotation(self.kind), around.blocks(self.kind), around.window_in_ring)
        y, cache, taps, index_losses = self.attn(x, *where, cache, repeat, collect, around.mode)
        taps |= {"attention_mixing": maps.comb}

        streams, x, maps = self.hc_ffn.advance(streams, y, maps, self.ffn_norm[...])
        y, routing, clamped = self.ffn(x, around.span, repeat, around.experts)
        streams = self.hc_ffn.leave(streams, y, maps)
        learned = self.router == "learned"
        report = LayerReport.of(routing, around.counted, learned, index_losses, clamped)
        shape = x.shape[:2]
        taps |= {
            "expert_mixing": maps.comb,
            "experts": routing.experts.reshape(*shape, -1),
            "router_scores": routing.scores.reshape(*shape, -1),
            "streams": streams,
        }
        return streams, cache, report, {name: taps[name] for name in sorted(collect & taps.keys())}
