"""What each device of a mesh would hold of a model: parameters and caches, from shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax

from dsv4_jax.config import ModelConfig
from dsv4_jax.errors import ProblemsError
from dsv4_jax.inspection.movement import traffic
from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.geometry import allocated_length
from dsv4_jax.numerics.cache_formats import CacheFormat
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameter_shardings import parameter_shardings
from dsv4_jax.parameters import parameters, row_at
from pallas_kernels.formats.weights import QuantizedWeight, is_quantized
from sharding.activations import Placement
from sharding.mesh import MeshError, described
from sharding.report import Held, held
from sharding.rules import DECODE, TABLES, RuleTable
from sharding.weight_traffic import Traffic

Weights = Literal["native", "bfloat16", "float32"]
"""FP4 experts and FP8 linear layers as official checkpoints store them, or all matrices in one dtype."""


def described_placement(mesh: str, table: RuleTable) -> Placement:
    """A placement on devices that nobody has at hand.

    Raises:
        ProblemsError: for a spelling that is no mesh.
    """
    try:
        return Placement(described(mesh), table)
    except MeshError as refused:
        raise ProblemsError(refused.what, refused.problems) from refused


def parameter_rows(config: ModelConfig, placement: Placement, weights: Weights) -> list[Held]:
    """One row an array of parameters; elements and scales of a quantised one apart.

    Raises:
        ProblemsError: rules that do not fit the mesh or the parameters, all of them at once.
    """
    shapes, table = native_shapes(config), parameters(config)
    rows, blocks = [], {}
    for path in table:
        leaf = functools.reduce(lambda tree, key: tree[key], path, shapes)
        if weights == "native" and is_quantized(leaf):
            blocks[path] = leaf.blocks.block
    mesh, rules = placement.mesh, placement.table.parameters
    shardings = parameter_shardings(config, mesh, rules, "this model", blocks)
    for path, parameter in table.items():
        leaf: Any = functools.reduce(lambda tree, key: tree[key], path, shapes)
        if path not in blocks:
            dtype = parameter.dtype("bfloat16" if weights == "native" else weights)
            leaf = jax.ShapeDtypeStruct(parameter.shape, dtype)
        for name, array in _arrays(leaf):
            words = "/".join(map(str, path)) + name
            rows.append(held(words, array.shape, array.dtype, shardings[path].spec, mesh.shape))
    return rows


def cache_rows(
    config: ModelConfig, placement: Placement, policy: Policy, batch: int, max_length: int
) -> list[Held]:
    """One row an array of a cache for `batch` rows of up to `max_length` tokens.

    Args:
        config: of the model.
        placement: mesh and rules.
        policy: dtypes and the format of the cache.
        batch: rows over the whole mesh.
        max_length: tokens a row.
    """
    capacity = allocated_length(config, max_length)
    how = (policy.cache_dtype, 8, policy.row_dtype, policy.cache_format)
    shapes = jax.eval_shape(lambda: new_cache(config, batch, capacity, *how))
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        dims = "B" if leaf.ndim == 1 else "R B"
        spec = placement.spec(dims, leaf.shape)
        name = "cache" + jax.tree_util.keystr(path).replace("[", "/").replace("]", "").replace(".", "/")
        rows.append(held(name, leaf.shape, leaf.dtype, spec, placement.mesh.shape))
    return rows


def _arrays(leaf: Any) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    if not isinstance(leaf, QuantizedWeight):
        yield "", leaf
        return
    for path, array in jax.tree_util.tree_leaves_with_path(leaf.blocks):
        yield jax.tree_util.keystr(path), array


@dataclasses.dataclass(frozen=True)
class Spread:
    """A model on a mesh.

    Attributes:
        placement: mesh and rules.
        parameters: one row an array.
        cache: one row an array; empty where no context was asked for.
        batch: rows that the cache holds over the whole mesh.
        context: tokens that each of them may hold.
        tokens: of a step over the whole mesh: one a row in decode, else `context` of each, or one.
        traffic: what such a step moves because weights are split.
    """

    placement: Placement
    parameters: tuple[Held, ...]
    cache: tuple[Held, ...] = ()
    batch: int = 0
    context: int = 0
    tokens: int = 0
    traffic: tuple[Traffic, ...] = ()

    @property
    def num_devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.placement.mesh.shape.values())

    def by_part(self) -> dict[str, tuple[int, int, int]]:
        """Part of the model -> bytes of one copy, bytes that each device holds, and how much of these are
        beyond its even share of one copy."""
        devices = self.num_devices
        sums: dict[str, tuple[int, int, int]] = {}
        for row in (*self.parameters, *self.cache):
            # All devices together hold `copies` times the array.
            once = row.bytes_a_device * devices // row.copies
            beyond = row.bytes_a_device - once // devices
            part = part_of(row.path)
            before = sums.get(part, (0, 0, 0))
            sums[part] = tuple(map(sum, zip(before, (once, row.bytes_a_device, beyond), strict=True)))
        return sums


def part_of(path: str) -> str:
    """Which part of a model an array belongs to, by its path in a row."""
    first, *_ = path.split("/")
    if first in ("cache", "mtp"):
        return first
    keys = path.split(".")[0].split("/")
    row = row_at(tuple(int(key) if key.isdecimal() else key for key in keys))
    if row.role == "expert":
        return "routed experts"
    return {"moe": "shared experts and routers"}.get(row.part, row.part.replace("_", " "))


def spread(
    config: ModelConfig,
    mesh: str,
    rules: str = "decode",
    weights: Weights = "native",
    batch: int | None = None,
    context: int | None = None,
    cache: CacheFormat = "fp8+mxfp4",
) -> Spread:
    """A model on a mesh of devices that nobody needs to have.

    Args:
        config: of the model.
        mesh: a spelling, "expert=16,tensor=2".
        rules: name of a table of `sharding.rules`.
        weights: how parameters are held.
        batch: rows of the cache over the whole mesh; None: one a device.
        context: tokens of capacity a row; None: no cache.
        cache: its format.

    Raises:
        ProblemsError: for a mesh that cannot be, rules that there are not or that do not fit the parameters.
    """
    if rules not in TABLES:
        raise ProblemsError("cannot spread the model", [f"no rules {rules!r}, only {', '.join(TABLES)}"])
    placement = described_placement(mesh, TABLES[rules])
    rows = tuple(parameter_rows(config, placement, weights))
    batch = math.prod(placement.mesh.shape.values()) if batch is None else batch
    tokens = batch * (1 if rules == DECODE.name or context is None else context)
    moved = tuple(traffic(config, placement, tokens, native=weights == "native"))
    if context is None:
        return Spread(placement, rows, tokens=tokens, traffic=moved)
    policy = Policy.of("float32" if weights == "float32" else "bfloat16", cache=cache)
    held_rows = tuple(cache_rows(config, placement, policy, batch, context))
    return Spread(placement, rows, held_rows, batch, context, tokens, moved)
