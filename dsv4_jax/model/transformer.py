"""The whole network: embedding, layer stacks, head. One forward function serves every use.

Training and scoring run it without a cache, prefill and decode append to one; the layers do not know the
difference. Layers are grouped into runs of a repeating unit (`config.layer_stacks`), and a run is one
`lax.scan`, so tracing and compiling take the same time at any depth.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int16, Int32

from dsv4_jax.config import AttentionKind, LayerStack, ModelConfig, layer_stacks
from dsv4_jax.model import rope
from dsv4_jax.model import span as spans
from dsv4_jax.model.block import Block, Surroundings
from dsv4_jax.model.cache import Cache, LayerCache, MtpCache, pinned_cache, write_ring
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.dspark import DSpark
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.gathering import gathered
from dsv4_jax.model.geometry import compressor_geometry, window_geometry
from dsv4_jax.model.hyper_connection import StreamCollapse
from dsv4_jax.model.layer_report import LayerReport, ModelReport
from dsv4_jax.model.mtp import MultiTokenPrediction
from dsv4_jax.model.norm import rms_norm
from dsv4_jax.model.operations import Operations, operations
from dsv4_jax.model.repeat import one_repeat
from dsv4_jax.model.span import Span
from dsv4_jax.model.training_mode import INFERENCE, TrainingMode
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import parameters

TAPS = {
    "streams": "residual streams after each layer, [B, T, N, D]",
    "experts": "expert ids, i32[B, T, Ke]",
    "router_scores": "unbiased scores of all experts, f32[B, T, E]",
    "selected": "entries the indexer chose, bool[B, T, S] (CSA layers)",
    "attention": "probabilities over window entries, then entries, f32[B, T, H, W - 1 + T + S]",
    "attention_mixing": "comb of the attention sublayer, f32[N, N, B, T], input stream first",
    "expert_mixing": "comb of the expert sublayer, f32[N, N, B, T], input stream first",
}
"""Intermediate values a forward pass can return, one dict a layer."""


ANY_STACK = ("stacks", 0)
"""The table describes the layers of all stacks alike: any number will do."""


class Forward(NamedTuple):
    """What a pass over the layers returns."""

    streams: Float[Array, "B T N D"]  # after the last layer
    cache: Cache | None
    report: ModelReport  # of the layers, without the MTP block
    taps: list[dict[str, jax.Array]]  # one a layer, holding what was asked for
    further: Float[Array, "B T D"] | None  # MTP hidden states (`predict_appended`), if the cache has a slot


class Stack(nnx.Module):
    """The parameters of one run of layers: one Block a unit position, stacked over repeats."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        operations: Operations,
        stack: LayerStack,
        declared: Declared,
    ) -> None:
        self.blocks = nnx.List(
            Block(config, policy, operations, attention, router, declared.under("blocks", index))
            for index, (attention, router) in enumerate(stack.kinds)
        )


class Transformer(nnx.Module):
    """DeepSeek-V4. Build it with `initial.Network`; parameters come from a draw or a checkpoint.

    Args:
        config: the architecture.
        policy: dtypes, numerics, recomputation.
        chosen: what computes each operation; None means what the policy says (`operations.operations`).
    """

    def __init__(self, config: ModelConfig, policy: Policy, chosen: Operations | None = None) -> None:
        bound = chosen or operations(policy)
        declared = Declared(parameters(config), policy.param_dtype)
        self.embed = declared("embed")
        self.stacks = nnx.List(
            Stack(config, policy, bound, stack, declared.under("stacks", index))
            for index, stack in enumerate(layer_stacks(config))
        )
        self.hc_head = StreamCollapse(config, bound, declared.under("hc_head"))
        self.norm = declared("norm")
        self.head = declared("head")
        self.mtp = nnx.List(
            MultiTokenPrediction(config, policy, bound, declared.under("mtp", depth))
            for depth in range(config.num_nextn_predict_layers)
        )
        self.dspark = DSpark(config, policy, bound, declared.under("dspark")) if config.dspark else None
        self.config = config
        self.policy = policy
        self.operations = bound

    def embedding(self, ids: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table in the compute dtype; ids are clipped to the vocabulary."""
        return self.operations.embed(self.embed[...], ids).astype(self.policy.compute_dtype)

    def __call__(
        self,
        span: Span,
        cache: Cache | None = None,
        collect: frozenset[str] = frozenset(),
        mode: TrainingMode = INFERENCE,
        experts: Int16[Array, "L B T Ke"] | None = None,
    ) -> Forward:
        """Runs the layers over the tokens of one call (report, section 2).

        Args:
            span: the tokens and where they stand (`span.appended`, `from_start`, `packed`).
            cache: what came before, or None for whole sequences. The returned cache holds the call's
                valid tokens too; capacity is the caller's to check. With a slot for the MTP block, that runs
                over the call's tokens as well; with one for the DSpark head, its rings are kept.
            collect: names from `TAPS`.
            mode: of training; without a cache only.
            experts: the experts of every token in every layer, instead of the routers' choice; likewise.

        Raises:
            ValueError: for packed rows, a mode of training or given experts with a cache, or unknown taps.
        """
        if cache is not None and span.is_packed:
            raise ValueError("packed rows have no cache: append each sequence to a row of its own")
        if cache is not None and (mode != INFERENCE or experts is not None):
            raise ValueError("a call with a cache is inference: it has no mode of training, no given experts")
        if unknown := collect - TAPS.keys():
            raise ValueError(f"unknown taps {sorted(unknown)}; there are {sorted(TAPS)}")
        around = self.surroundings(span, cache)._replace(mode=mode)
        e = self.embedding(span.ids)
        shape = (*e.shape[:2], self.config.hc_mult, e.shape[2])
        streams = self.operations.pinned(jnp.broadcast_to(e[:, :, None], shape), "B T N D")
        captured = None
        if cache is not None and cache.dspark is not None:
            shape = (len(self.config.dspark.target_layer_ids), *e.shape)
            captured = jnp.zeros(shape, self.policy.compute_dtype)
        layer_caches: list[tuple[LayerCache, ...]] = []
        reports: list[tuple[LayerReport, ...]] = []
        taps: list[dict[str, jax.Array]] = []
        for index, stack in enumerate(layer_stacks(self.config)):
            before = None if cache is None else cache.layers[index]
            if experts is not None:
                around = around._replace(experts=_experts_of(experts, stack))
            streams, after, report, seen, captured = run_stack(
                self.stacks[index],
                stack.repeats,
                streams,
                captured,
                around,
                before,
                collect,
                captures=() if captured is None else captures_of(self.config, stack),
                remat=self.policy.remat == "unit",
                in_place=self.operations.weights_in_place,
                gather=functools.partial(
                    gathered,
                    root=("stacks", index),
                    config=self.config,
                    placement=self.operations.placement,
                ),
            )
            layer_caches.append(after)
            reports.append(report)
            taps += seen
        further = None
        if cache is not None:
            mtp = None
            if cache.mtp is not None:
                further, mtp = self.predict_appended(streams, span, cache)
            dspark = cache.dspark and self.dspark.remember(captured, span, cache.dspark)
            length = span.start + span.num_valid
            written = jnp.maximum(cache.written, length)
            slots = {"layers": tuple(layer_caches), "mtp": mtp, "dspark": dspark}
            cache = dataclasses.replace(cache, length=length, written=written, **slots)
            cache = pinned_cache(cache, self.operations.pinned)
        return Forward(streams, cache, ModelReport(tuple(reports)), taps, further)

    def layer(self, index: int, streams: Float[Array, "B T N D"], span: Span) -> Float[Array, "B T N D"]:
        """One layer alone, from given streams, without a cache: for checking layer by layer.

        Raises:
            ValueError: for an index outside 0 .. L-1.
        """
        for number, stack in enumerate(layer_stacks(self.config)):
            for position in range(len(stack.kinds)):
                for repeat in range(stack.repeats):
                    if stack.layer_index(position, repeat) == index:
                        graph, state = nnx.split(self.stacks[number].blocks[position])
                        block = nnx.merge(graph, jax.tree.map(lambda leaf, r=repeat: leaf[r], state))
                        around = self.surroundings(span, None)
                        return block(streams, around, None, jnp.int32(0), frozenset())[0]
        raise ValueError(f"layer {index} is not in 0 .. {len(self.config.attention_kinds) - 1}")

    def surroundings(self, span: Span, cache: Cache | None) -> Surroundings:
        """Angles and blocks of a call, computed once for all layers."""
        c = self.config
        compressed = rope.compressed_frequencies(c)

        def blocks(kind: AttentionKind) -> spans.Blocks:
            if span.is_packed:
                return spans.blocks_packed(span, c.ratio(kind), compressed)
            if cache is None:
                return spans.blocks_in_place(span, c.ratio(kind), compressed)
            return spans.blocks_appended(span, compressor_geometry(c, kind, cache.max_rewind), compressed)

        num_new = span.ids.shape[1]
        return Surroundings(
            span,
            span.valid,
            rope.rotation(span.position, rope.window_frequencies(c)),
            rope.rotation(span.position, compressed),
            blocks("csa"),
            blocks("hca"),
            cache is not None and window_geometry(c, cache.max_rewind).fits_in_ring(num_new),
        )

    def hidden(self, streams: Float[Array, "B T N D"]) -> Float[Array, "B T D"]:
        """The streams collapsed and normalised: the head's input."""
        return rms_norm(self.hc_head(streams), self.norm[...], self.config.rms_norm_eps)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Float32 head product (report, section 2.1); no cap, no tying."""
        return self.operations.pinned(
            self.operations.score(hidden, self.head[...], out=(("V", 0),), by_rows=True), "B T V"
        )

    def predict_further(
        self,
        streams: Float[Array, "B T N D"],
        span: Span,
        collect: frozenset[str] = frozenset(),
        experts: Int16[Array, "B T-1 Ke"] | None = None,
    ) -> tuple[Float[Array, "B T-1 D"], LayerReport, dict[str, jax.Array]]:
        """MTP hidden states: row t, from the streams at t and token t + 1, predicts token t + 2.

        The report of its layer counts the rows whose two tokens are of one segment: the last token of a
        segment is joined with a stranger's embedding.

        Args:
            streams: backbone streams after the last layer, of the same span.
            span: without a cache. A row's last token has no successor, so T - 1 rows come back.
            collect: names from `TAPS`, of the block's layer; returned last.
            experts: of every row, instead of the router's choice.

        Raises:
            ValueError: if the model has no MTP block.
        """
        if not self.mtp:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers = 0)")
        valid = span.valid[:, :-1] & span.valid[:, 1:]
        here = dataclasses.replace(span, ids=span.ids[:, :-1], position=span.position[:, :-1], valid=valid)
        # A position counts from the start of its segment, so only a successor's is one more.
        follows = span.position[:, 1:] == span.position[:, :-1] + 1
        around = self.surroundings(here, None)._replace(counted=valid & follows, experts=experts)

        def further(streams, following):
            hidden, report, _, taps = self.mtp[0](streams, following, around, None, collect)
            return hidden, report, taps

        if self.policy.remat == "unit":
            further = jax.checkpoint(further)
        return further(streams[:, :-1], self.embedding(span.ids[:, 1:]))

    def predict_appended(
        self, streams: Float[Array, "B T N D"], span: Span, cache: Cache
    ) -> tuple[Float[Array, "B T D"], MtpCache]:
        """MTP hidden states of tokens appended to a cache, and the slot after them.

        In a row that held n tokens, token n - 1 waited for its successor: row j stands for the token at
        position max(n - 1, 0) + j and predicts the token two after it. There are as many rows as valid
        tokens, but in an empty row one fewer, because its last token waits now; the others mean nothing.

        Args:
            streams: backbone streams of the call's tokens after the last layer.
            span: the call's tokens (`span.appended`).
            cache: before the call, with a slot.
        """
        length = streams.shape[1]
        was_empty = (span.start == 0).astype(jnp.int32)
        # Where row j's two tokens stand: the first in [waiting | call], the second in the call.
        place = was_empty[:, None] + jnp.arange(length, dtype=jnp.int32)
        following = jnp.take_along_axis(span.ids, jnp.minimum(place, length - 1), axis=1)
        # The router of the block is learned: ids of the first tokens are not needed.
        here = spans.appended(
            following, span.start - 1 + was_empty, jnp.maximum(span.num_valid - was_empty, 0)
        )
        held = Entries(cache.mtp.streams, jnp.int32(0))
        waiting = held.at_positions(span.start[:, None] - 1, streams.dtype)
        line = jnp.concatenate([waiting, streams], axis=1)
        line = jnp.take_along_axis(line, place[..., None, None], axis=1, mode="clip")
        around = self.surroundings(here, cache)
        hidden, _, layer, _ = self.mtp[0](line, self.embedding(following), around, cache.mtp.layer)
        ring = write_ring(cache.mtp.streams, jnp.int32(0), streams, span.start, span.num_valid)
        return hidden, MtpCache(ring, layer)


def captures_of(config: ModelConfig, stack: LayerStack) -> tuple[tuple[int, int, int], ...]:
    """(place, unit position, repeat) of the layers of a stack that the DSpark head reads."""
    wanted = config.dspark.target_layer_ids
    return tuple(
        (wanted.index(layer), position, repeat)
        for position in range(len(stack.kinds))
        for repeat in range(stack.repeats)
        if (layer := stack.layer_index(position, repeat)) in wanted
    )


def run_stack(
    stack: Stack,
    repeats: int,
    streams: Float[Array, "B T N D"],
    captured: Float[Array, "C B T D"] | None,
    around: Surroundings,
    caches: tuple[LayerCache, ...] | None,
    collect: frozenset[str],
    *,
    captures: tuple[tuple[int, int, int], ...],
    remat: bool,
    in_place: bool,
    gather: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[
    Float[Array, "B T N D"],
    tuple[LayerCache, ...] | None,
    tuple[LayerReport, ...],
    list[dict[str, jax.Array]],
    Float[Array, "C B T D"] | None,
]:
    """Runs a unit of layers `repeats` times. Taps come back in layer order, reports as the unit is stacked.

    With `in_place` a cached step reads quantised weights where they lie in their stacks, as kernels can.
    `captured` holds means over the streams after layers, of which `captures` names those of this stack.
    `gather` brings together what a mesh has split of one repeat's weights (`gathering.gathered`).
    """
    graph, state = nnx.split(stack)
    states = nnx.to_pure_dict(state)

    def unit(streams, caches, captured, parameters, repeat):
        after, reports, taps = [], [], []
        for index, block in enumerate(nnx.merge(graph, gather(parameters)).blocks):
            cache = None if caches is None else caches[index]
            here = around
            if around.experts is not None:
                here = around._replace(experts=around.experts[repeat, index])
            streams, cache, report, seen = block(streams, here, cache, repeat, collect)
            for place, position, at in captures:
                if position == index:
                    mean = streams.astype(jnp.float32).mean(axis=2).astype(captured.dtype)
                    captured = captured.at[place].set(jnp.where(repeat == at, mean, captured[place]))
            after.append(cache)
            reports.append(report)
            taps.append(seen)
        return streams, None if caches is None else tuple(after), captured, tuple(reports), taps

    if remat:
        unit = jax.checkpoint(unit)
    if repeats == 1:
        only = jax.tree.map(lambda leaf: leaf[0], states)
        streams, caches, captured, reports, taps = unit(streams, caches, captured, only, jnp.int32(0))
        return streams, caches, tuple(report.stacked_once() for report in reports), taps, captured

    def step(carry, xs):
        sliced, repeat = xs
        *carry, reports, taps = unit(
            *carry, sliced if caches is None else one_repeat(states, repeat, in_place, ANY_STACK), repeat
        )
        return tuple(carry), (reports, taps)

    # Whole sequences scan their parameters, so that a repeat's gradient has a repeat's size.
    xs = (states if caches is None else None, jnp.arange(repeats, dtype=jnp.int32))
    # The cache is carried, not scanned: a carry is updated in place, a scanned output is a second copy.
    (streams, caches, captured), (reports, taps) = jax.lax.scan(step, (streams, caches, captured), xs)
    by_layer = [jax.tree.map(lambda leaf, r=r: leaf[r], seen) for r in range(repeats) for seen in taps]
    return streams, caches, reports, by_layer, captured


def _experts_of(experts: Int16[Array, "L B T Ke"], stack: LayerStack) -> Int16[Array, "R P B T Ke"]:
    """Those of the stack's layers, by repeat and position in the unit."""
    count = stack.repeats * len(stack.kinds)
    own = experts[stack.first_layer : stack.first_layer + count]
    return own.reshape(stack.repeats, len(stack.kinds), *experts.shape[1:])
