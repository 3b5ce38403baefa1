"""The operations of a model on a mesh: what is split, and which function moves what is needed elsewhere.

* Experts: `sharding.expert_parallel`, tokens travel.
* Products with weights: `sharding.linear`, rows travel and weights stay; `sharding.embedding` likewise.
* Operations whose rows do not meet (attention, compressors, caches, hyper-connections): `sharding.by_device`.
  With `context` larger than 1 tokens of a row do meet: `sharding.context` exchanges what they need.
* The loss: `sharding.cross_entropy`, tokens over all devices, or over those that do not share the head.
* The rest is partitioned by the compiler, along the pinned activations.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from pallas_kernels.compressor.op import SPLITS as COMPRESSOR
from pallas_kernels.core_attention.index_loss import SPLITS as INDEX_LOSS
from pallas_kernels.core_attention.op import SPLITS as ATTENTION
from pallas_kernels.entry_write.op import SPLITS as ENTRIES
from pallas_kernels.hyper_connection.op import SPLITS as STREAMS
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.splits import Splits
from sharding.activations import Placement
from sharding.by_device import SECOND, ByDevice
from sharding.context import CompressOverMesh, LineOverMesh
from sharding.cross_entropy import CrossEntropyOverMesh
from sharding.embedding import EmbeddingOverMesh
from sharding.expert_parallel import over_mesh
from sharding.expert_rows import ExpertRows
from sharding.linear import LinearOverMesh

if TYPE_CHECKING:
    from dsv4_jax.model.operations import Operation, Operations

RING = Splits(
    {"ring": "R B M Dh", "repeat": "", "new": "B T Dh", "start": "B", "num_valid": "B"},
    results=("R B M Dh",),
    free="B",
)
"""Of `cache.write_ring`, whose rings may have more dims behind M."""

BY_ROWS: dict[str, tuple[Splits, str, str, str]] = {
    "keep": (RING, "B", "", ""),
    "store": (ENTRIES["write_entries"], "B", "", ""),
    "attend": (ATTENTION["attend"], "B", "H", "T"),
    "attend_cached": (ATTENTION["attend_cached"], "B", "H", ""),
    "index_loss": (INDEX_LOSS["index_loss"], "B", "", "T"),
    "enter": (STREAMS["pre"], "tokens", "", SECOND),
    "leave": (STREAMS["post"], "tokens", "", SECOND),
    "advance": (STREAMS["post_pre"], "tokens", "", SECOND),
    "collapse": (STREAMS["collapse"], "tokens", "", SECOND),
}
"""Operation -> its family's table, and the letters of its rows, heads and tokens of a row there."""


def spread(chosen: "Operations", placement: Placement) -> "Operations":
    """The same operations on a mesh.

    Args:
        chosen: on one device.
        placement: mesh and rules.
    """
    found: dict[str, Any] = {"placement": placement, "experts": _experts(chosen.experts, placement)}
    terms = dataclasses.replace(chosen.cross_entropy, function=linear_cross_entropy)
    loss = CrossEntropyOverMesh(chosen.cross_entropy, terms, placement)
    found["cross_entropy"] = _through(chosen.cross_entropy, loss)
    found["embed"] = _through(chosen.embed, EmbeddingOverMesh(chosen.embed, placement))
    for name, grouped in (("linear", False), ("score", False), ("grouped_linear", True)):
        each = getattr(chosen, name)
        over = LinearOverMesh(each, placement, grouped, by_device=bool(each.kernels))
        found[name] = _through(each, over)
    for name, (splits, *letters) in BY_ROWS.items():
        each = getattr(chosen, name)
        found[name] = _through(each, ByDevice(each, placement, splits, *letters))
    found["line"] = _through(chosen.line, LineOverMesh(placement))
    rows = ByDevice(chosen.compress, placement, COMPRESSOR["compressor"], "B")
    found["compress"] = _through(chosen.compress, CompressOverMesh(chosen.compress, rows, placement))
    return dataclasses.replace(chosen, **found)


def _experts(each: "Operation", placement: Placement) -> "Operation":
    rules = placement.table.parameters
    axes = {letter: rules[letter] for letter in "EFD" if letter in rules}
    flat = over_mesh(each, placement.mesh, weight_axes=axes)
    return _through(each, ExpertRows(flat, placement))


def _through(each: "Operation", function: Any) -> "Operation":
    """The same operation, whose settings are bound inside `function`."""
    return dataclasses.replace(each, function=function, settings=())
