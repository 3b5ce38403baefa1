"""What a step moves because weights are split: for each of them the bytes of gathering it and of its rows."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dsv4_jax.config import ModelConfig
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model.gathering import GATHERED
from dsv4_jax.parameter_shardings import placed_axes
from dsv4_jax.parameters import WIDE_ROLES, Parameter, parameters
from pallas_kernels.arithmetic import cdiv
from pallas_kernels.formats.weights import is_quantized
from sharding.activations import Placement
from sharding.cross_entropy import cheaper_head
from sharding.dispatch_cost import LINKS, Link, cheapest, dispatch_costs
from sharding.placement import cuts_of, ways
from sharding.rules import TRAIN
from sharding.weight_traffic import Product, Result, Traffic, Way

KEPT_IN_PARTS = {"attn/wo_a", "ffn/shared/gate_up"}
"""Products whose results the next one takes in parts."""

BY_HEADS = {"attn/wq_b"}
"""Whose results stay in parts where rows are whole: attention is split by heads there."""

NUMBER_BYTES = 2
"""Of an activation, bfloat16."""


def traffic(
    config: ModelConfig, placement: Placement, tokens: int, native: bool, link: Link = LINKS["v6e"]
) -> list[Traffic]:
    """One entry for each kind of split weight, and two for one that is split both ways: over fsdp, where its
    parts are gathered, and over other axes, where rows are exchanged.

    Args:
        config: of the model.
        placement: mesh and rules.
        tokens: of one step over the whole mesh.
        native: whether weights are held in FP8 and FP4, as official checkpoints store them; else in bfloat16.
        link: between the devices that share experts, for the choice of their transport.
    """
    shapes, found = native_shapes(config), dict[tuple[Any, ...], Traffic]()
    step = _Step(config, placement, tokens, link)
    for path, parameter in parameters(config).items():
        if parameter.role not in WIDE_ROLES:
            continue
        leaf: Any = functools.reduce(lambda tree, key: tree[key], path, shapes)
        repeats = parameter.shape[0] if "R" in parameter.dims else 1
        num_bytes = parameter.size * NUMBER_BYTES
        block = leaf.blocks.block if native and is_quantized(leaf) else None
        if block is not None:
            num_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf.blocks))
        name = f"mtp/{parameter.row.path}" if path[0] == "mtp" else parameter.row.path
        weight = _Weight(parameter, num_bytes / repeats, _cuts(path, parameter, block, placement))
        for way, axes, product, moved in (*step.gathered(weight), *step.kept(weight)):
            key = (name, axes, product)
            layers = found[key].layers if key in found else 0
            amounts = (product.parts, axes, product.of_weight(), moved, way)
            found[key] = Traffic(name, layers + repeats, *amounts)
    return list(found.values())


class _Weight(NamedTuple):
    """A split weight of one layer.

    Attributes:
        parameter: what it is.
        num_bytes: of the whole.
        cut: letter -> the axes of the mesh that split it.
    """

    parameter: Parameter
    num_bytes: float
    cut: dict[str, tuple[str, ...]]

    @property
    def split_at(self) -> int:
        """How many of its own dims are outputs."""
        return self.parameter.folds[0] if len(self.parameter.folds) == 2 else 1

    def axes(self, gathered: bool) -> tuple[str, ...]:
        """Those over which its parts are gathered, or the others."""
        return tuple(a for axes in self.cut.values() for a in axes if (a == GATHERED) == gathered)

    def sums_over(self, axes: tuple[str, ...]) -> bool:
        """Whether these split what the product sums over."""
        into = self.parameter.dims[self.parameter.num_leading + self.split_at :]
        return any(axis in axes for letter in into for axis in self.cut.get(letter, ()))

    @property
    def sizes(self) -> tuple[float, float]:
        """Inputs, and outputs in numbers of two bytes: gate and up are one product, logits float32."""
        parameter = self.parameter
        if parameter.role == "embedding":  # a look-up: nothing goes in, a row comes out
            return 0.0, parameter.own[1]
        twice = "2" in parameter.dims[: parameter.num_leading] or parameter.role == "head"
        own, at = parameter.own, self.split_at
        return math.prod(own[at:]), math.prod(own[:at]) * (2 if twice else 1)


Found = Iterator[tuple[Way, tuple[str, ...], Product, float]]
"""What is done, over which axes, the product, and the bytes of its rows."""


class _Step(NamedTuple):
    """What products are part of."""

    config: ModelConfig
    placement: Placement
    tokens: int
    link: Link

    def _of_rows(self, axes: tuple[str, ...], product: Product, rows: float = 1) -> float:
        """Bytes, if each token counts as so many rows; of tokens whose rows are split over all the rest."""
        group = rows * self.tokens * product.parts / ways(self.placement.mesh, {*self._batch, *axes})
        return product.of_rows(group, NUMBER_BYTES)

    @property
    def _batch(self) -> tuple[str, ...]:
        """The axes that split tokens."""
        batch = self.placement.axes_for("B", self.tokens)
        return batch + self.placement.axes_for("T", self.tokens, batch)

    def gathered(self, weight: _Weight) -> Found:
        """Over fsdp: of what a device has, whose rows could travel instead."""
        axes, others = weight.axes(True), ways(self.placement.mesh, weight.axes(False))
        if not axes:
            return
        result: Result = "summed" if weight.sums_over(axes) else "back"
        inputs, outputs = weight.sizes
        if result == "summed":
            outputs /= others
        else:
            inputs /= others
        parts, apart = ways(self.placement.mesh, axes), set(axes) <= set(self._batch)
        product = Product(parts, weight.num_bytes / others, inputs, outputs, result, apart)
        expert = weight.parameter.role == "expert"
        rows = self.config.num_experts_per_tok if expert and result == "summed" else 1
        moved, way = self._of_rows(axes, product, rows), "weights"
        if weight.parameter.role == "embedding" and moved <= product.of_weight():
            way = "rows"  # (`sharding.embedding`)
        yield way, axes, product, moved

    def kept(self, weight: _Weight) -> Found:
        """Over the other axes: rows travel."""
        axes, mesh = weight.axes(False), self.placement.mesh
        if not axes:
            return
        parts, apart, row = ways(mesh, axes), set(axes) <= set(self._batch), weight.parameter.row.path
        inputs, outputs = weight.sizes
        result, way = "back", "rows"
        if weight.parameter.role == "embedding":  # sums in which all but one part is 0, and of b bytes
            result, outputs = "summed", outputs * NUMBER_BYTES / 4
        elif weight.sums_over(axes):
            result = "summed"
        elif row == "head" and self.placement.table.name == TRAIN.name:
            result = "stays"  # of the loss (`sharding.cross_entropy`), whose logits stay
            group = -(-self.tokens * parts // mesh.size)
            sizes = (self.config.vocab_size, self.config.hidden_size, parts, NUMBER_BYTES)
            way = "rows" if cheaper_head(group, *sizes) == "split" else "weights"
        elif row in KEPT_IN_PARTS or (row in BY_HEADS and not apart):
            result = "stays"
        if row == "attn/wo_a":  # of one group in `sizes`: those of the groups that a device has
            inputs *= self.config.o_groups / ways(mesh, weight.cut.get("G", ()))
        product = Product(parts, weight.num_bytes, inputs, outputs, result, apart)
        expert = weight.parameter.role == "expert"
        yield way, axes, product, self._of_experts(weight.cut) if expert else self._of_rows(axes, product)

    def _of_experts(self, cut: dict[str, tuple[str, ...]]) -> float:
        """Of tokens and their sums, by the cheapest transport: half of it for each of the two matrices."""
        mesh, hidden = self.placement.mesh, self.config.hidden_size
        top_k, each = self.config.num_experts_per_tok, cdiv(self.tokens, self.placement.mesh.size)
        width, devices = ways(mesh, cut.get("F", ())), ways(mesh, cut.get("E", ()))
        sent = (width - 1) * each * (hidden * (NUMBER_BYTES + 4) + 8 * top_k)
        if devices > 1:
            shape = {"tokens": each * width, "hidden": hidden, "top_k": top_k, "number_bytes": NUMBER_BYTES}
            sent += cheapest(dispatch_costs(**shape, devices=devices, link=self.link)).sent_bytes
        return sent / 2


def _cuts(path, parameter: Parameter, block, placement: Placement) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that split a weight along each of its letters; of two D the last counts."""
    axes = placed_axes(parameter, block)
    by_axis, _ = cuts_of("/".join(map(str, path)), axes, placement.mesh, placement.table.parameters)
    return {
        letter: cut
        for axis, by_letter in zip(axes, by_axis, strict=True)
        for letter, cut in zip(axis.letters, by_letter, strict=True)
        if cut
    }
