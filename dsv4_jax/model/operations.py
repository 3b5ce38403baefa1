"""Which function computes each operation of the model, chosen once.

Everything that has more than one implementation is in the record `Operations`: modules call its functions and
do not know which ones they are, on which device, or that kernels can run in an interpreter.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from dsv4_jax.model import cache, tables
from dsv4_jax.model.linear import project_float32
from dsv4_jax.model.operations_on_mesh import spread
from dsv4_jax.numerics import cache_storage
from dsv4_jax.numerics.policy import Policy
from pallas_kernels import block_matmul, core_attention, entry_write, hyper_connection
from pallas_kernels.compressor import compressor
from pallas_kernels.core_attention import Queries as Queries
from pallas_kernels.formats.weights import Weight
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.hyper_connection import StreamMaps as StreamMaps
from pallas_kernels.hyper_connection import xla as hyper_connection_xla
from pallas_kernels.hyper_connection.tuning import HyperConnectionBlocks
from pallas_kernels.linear_cross_entropy import weighted_cross_entropy
from sharding.activations import Placement
from sharding.context import line_of
from sharding.expert_copies import LayerCopies


@dataclasses.dataclass(frozen=True)
class Operation:
    """One function, and the settings that are bound to it. Equal ones are one key of a compiled program.

    Attributes:
        name: its field in `Operations`; also what a profile calls it.
        function: takes the operands.
        settings: keyword arguments that are the same for every call.
        kernels: the families whose Pallas kernels a call may run; none where all of it is XLA.
        when: what must hold for the kernels to run; empty if they always do.
    """

    name: str
    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()
    kernels: tuple[str, ...] = ()
    when: str = ""

    def __call__(self, *operands: Any, **more: Any) -> Any:
        """The function of these operands."""
        with jax.named_scope(self.name):
            return self.function(*operands, **dict(self.settings), **more)

    def runs(self) -> str:
        """For people: what computes this."""
        if not self.kernels:
            return "XLA"
        families = " and ".join(self.kernels)
        return f"{families} kernels" + (f" {self.when}, else XLA" if self.when else "")


@dataclasses.dataclass(frozen=True)
class Operations:
    """The functions of one model: a hashable part of what its compiled programs are keyed by."""

    linear: Operation  # x, weight, which dims a mesh may split: `block_matmul.linear`
    grouped_linear: Operation  # likewise: `block_matmul.grouped_linear`
    line: Operation  # rows of a call, rows before it: `sharding.context.line_of`
    compress: Operation  # rows, gates, bias, norm, cos, sin: `compressor.compressor`
    keep: Operation  # ring, repeat, new rows, start, number of them: `cache.write_ring`
    store: Operation  # stack, repeat, new entries, first, count: `cache_storage.write_entries`
    attend: Operation  # queries, line, entries, index keys, sink: `core_attention.attend`
    attend_cached: Operation  # queries, ring, entries, index keys, sink: `core_attention.attend_cached`
    attend_among: Operation  # queries, keys, which are visible, sink: `core_attention.softmax_attention`
    view: Operation  # as `attend`, and what to collect: `core_attention.view`
    index_loss: Operation  # queries, line, entries, index keys, sink: `core_attention.index_loss`
    enter: Operation  # streams, fn, base, scale, norm: `hyper_connection.pre`
    leave: Operation  # streams, update, maps: `hyper_connection.post`
    advance: Operation  # streams, update, maps, fn, base, scale, norm: `hyper_connection.post_pre`
    collapse: Operation  # streams, fn, base, scale: `hyper_connection.collapse`
    embed: Operation  # table, token ids: `tables.by_rows`
    score: Operation  # hidden, head, which dims a mesh may split: float32, `linear.project_float32`
    look_up: Operation  # table, token ids: `tables.by_rows`
    experts: Operation  # tokens, gate_up, down, ids, weights: `grouped_matmul.expert_ffn`
    cross_entropy: Operation  # hidden, head, ids, weights: `linear_cross_entropy.weighted_cross_entropy`
    weights_in_place: bool  # quantised weights are read inside their stacks; if not, a layer is sliced out
    cache_of_bits: bool  # caches keep FP8 and bfloat16 numbers as integers (`numerics.cache_formats`)
    placement: Placement | None = None  # the mesh that the model is spread over, and how; None: one device
    copies: LayerCopies | None = (
        None  # slots of the experts, where some have several; None: one each, in order
    )

    @property
    def merges_tokens(self) -> bool:
        """Whether rows and their tokens may become one dim: not where a mesh splits both."""
        return self.placement is None or self.placement.mesh.shape["context"] == 1

    def pinned(self, x: jax.Array, dims: str, first: str = "") -> jax.Array:
        """An activation, split over the mesh by the rules for its dims (`Placement.spec`); itself without."""
        return x if self.placement is None else self.placement.pinned(x, dims, first)

    def each(self) -> tuple[Operation, ...]:
        """All of them, in the order of the fields."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if isinstance(value, Operation))


def whole_linear(
    x: jax.Array, weight: Weight, *, out: Any = (), over: Any = (), by_rows: bool = False, **settings: Any
):
    """`block_matmul.linear`. On one device nothing is split along the letters that `sharding.linear` asks
    for."""
    del out, over, by_rows
    return block_matmul.linear(x, weight, **settings)


def whole_grouped_linear(x: jax.Array, weight: Weight, *, out: Any = (), **settings: Any):
    """`block_matmul.grouped_linear`, likewise."""
    del out
    return block_matmul.grouped_linear(x, weight, **settings)


def whole_compressor(*operands: Any, by_tokens: bool = False, **more: Any):
    """`compressor.compressor`; whether a mesh may split the tokens (`sharding.context`) is nothing here."""
    del by_tokens
    return compressor(*operands, **more)


def rows_cross_entropy(
    hidden: jax.Array, head: jax.Array, ids: jax.Array, weights: jax.Array, *more: Any, **how
):
    """`linear_cross_entropy.weighted_cross_entropy` of tokens with any number of dims."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return weighted_cross_entropy(flat, head, ids.reshape(-1), weights.reshape(-1), *more, **how)


def whole_scores(x: jax.Array, weight: jax.Array, *, out: Any = (), by_rows: bool = False):
    """`linear.project_float32`, likewise."""
    del out, by_rows
    return project_float32(x, weight)


EMBED = Operation("embed", tables.by_rows)
LINE = Operation("line", line_of)
SCORE = Operation("score", whole_scores)
ATTEND_AMONG = Operation("attend_among", core_attention.softmax_attention)


@functools.lru_cache(maxsize=64)
def operations(
    policy: Policy,
    hyper_connection_blocks: HyperConnectionBlocks | None = None,
    placement: Placement | None = None,
) -> Operations:
    """Binds what `policy.kernels` chose. There is no fallback from one choice to another.

    Args:
        policy: of the model.
        hyper_connection_blocks: tile sizes of those kernels, for tests; None lets the family choose.
        placement: the mesh that the model is spread over; None: one device.
    """
    bound = _bound(policy, hyper_connection_blocks)
    return bound if placement is None else spread(bound, placement)


def _bound(policy: Policy, hyper_connection_blocks: HyperConnectionBlocks | None) -> Operations:
    columns = (("columns", entry_write.write_entries),)
    if policy.kernels == "xla":
        return Operations(
            linear=Operation("linear", whole_linear, (("impl", "xla"),)),
            grouped_linear=Operation("grouped_linear", whole_grouped_linear, (("impl", "xla"),)),
            line=LINE,
            compress=Operation("compress", whole_compressor, (("impl", "xla"),)),
            keep=Operation("keep", cache.write_ring),
            store=Operation("store", cache_storage.write_entries, (*columns, ("impl", "reference"))),
            attend=Operation("attend", core_attention.attend, (("impl", "xla"),)),
            attend_cached=Operation("attend_cached", core_attention.attend_cached, (("impl", "xla"),)),
            attend_among=ATTEND_AMONG,
            view=Operation("view", core_attention.view),
            index_loss=Operation("index_loss", core_attention.index_loss, (("impl", "xla"),)),
            enter=Operation("enter", hyper_connection_xla.pre_xla),
            leave=Operation("leave", hyper_connection_xla.expand),
            advance=Operation("advance", hyper_connection_xla.post_pre_xla),
            collapse=Operation("collapse", hyper_connection_xla.collapse_xla),
            embed=EMBED,
            score=SCORE,
            look_up=Operation("look_up", tables.by_rows),
            experts=Operation("experts", expert_ffn, (("impl", "xla"),)),
            cross_entropy=Operation("cross_entropy", rows_cross_entropy, (("impl", "xla"),)),
            weights_in_place=False,
            cache_of_bits=True,
        )
    how = (("interpret", policy.kernels == "pallas-interpret"),)
    sized = (*how, ("blocks", hyper_connection_blocks))
    streams = ("hyper_connection",)
    fp8 = {"kernels": ("block_matmul",), "when": "with FP8 weights"}
    return Operations(
        linear=Operation("linear", whole_linear, (("impl", "pallas"), *how), **fp8),
        grouped_linear=Operation("grouped_linear", whole_grouped_linear, (("impl", "pallas"), *how), **fp8),
        line=LINE,
        compress=Operation("compress", whole_compressor, (("impl", "pallas"), *how), ("compressor",)),
        keep=Operation("keep", cache.write_ring, (("choose_narrow", True),)),
        store=Operation(
            "store",
            cache_storage.write_entries,
            (*columns, ("impl", "pallas"), *how),
            ("entry_write",),
            "with an FP8 or FP4 cache",
        ),
        attend=Operation(
            "attend", core_attention.attend, (("impl", "pallas"), *how), ("indexer", "hybrid_attention")
        ),
        attend_cached=Operation(
            "attend_cached",
            core_attention.attend_cached,
            (("impl", "pallas"), *how),
            ("indexer", "decode_attention"),
        ),
        attend_among=ATTEND_AMONG,
        view=Operation("view", core_attention.view),
        index_loss=Operation(
            "index_loss", core_attention.index_loss, (("impl", "pallas"), *how), ("indexer",)
        ),
        enter=Operation("enter", hyper_connection.pre, sized, streams),
        leave=Operation("leave", hyper_connection.post, sized, streams),
        advance=Operation("advance", hyper_connection.post_pre, sized, streams),
        collapse=Operation("collapse", hyper_connection.collapse, sized, streams),
        embed=EMBED,
        score=SCORE,
        look_up=Operation("look_up", tables.by_columns),
        experts=Operation("experts", expert_ffn, (("impl", "pallas"), *how), ("grouped_matmul",)),
        cross_entropy=Operation(
            "cross_entropy", rows_cross_entropy, (("impl", "pallas"), *how), ("linear_cross_entropy",)
        ),
        weights_in_place=True,
        cache_of_bits=False,
    )
