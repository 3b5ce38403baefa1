"""Rows of a table that is split over devices: ids travel, and the rows that were found.

Split by rows (V), each device looks among its own, and of a sum over devices one part alone is not zero.
Split by columns (D) over n devices, which have t tokens each, one of three ways is taken:

    rows, apart     the n t ids are brought together, every device takes its columns of all their rows, and
                    pieces go back to the devices of the tokens:           (n - 1) / n  t D b
    rows, whole     tokens that the n devices share: columns are put together:  (n - 1) / n  t D b
    table           its columns are brought together:                      (n - 1) / n  v D b

bytes that a device receives forward, for v rows of b bytes a number that it has; backward as many, of
gradients. Rows are less unless a device has more tokens than rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from sharding.activations import Placement
from sharding.placement import Axis, sharding_of, ways
from sharding.report import axes_of
from sharding.sums import scattered, whole


def cheaper(tokens: int, rows: int) -> Literal["rows", "table"]:
    """What moves fewer bytes over the axes that split D: a device's tokens, or its rows of the table."""
    return "rows" if tokens < rows else "table"


@dataclasses.dataclass(frozen=True)
class EmbeddingOverMesh:
    """Rows by id over a mesh.

    Attributes:
        look_up: on one device; ids are clipped to the table's rows.
        placement: mesh and rules.
    """

    look_up: Callable[[jax.Array, jax.Array], jax.Array]
    placement: Placement

    def __call__(self, table: Float[Array, "V D"], ids: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """The rows of the ids, split over the batch; no number is rounded.

        Args:
            table: split over V and D as the rules say.
            ids: in 0 .. V - 1; others are clipped.
        """
        mesh, rules = self.placement.mesh, self.placement.table.parameters
        axes = [Axis(("V",), (table.shape[0],)), Axis(("D",), (table.shape[1],))]
        spec = (*sharding_of("embed", axes, mesh, rules)[0].spec, None, None)
        cut, columns = axes_of(spec[0]), axes_of(spec[1])
        batch = self.placement.axes_for("B", ids.shape[0], cut)
        tokens = self.placement.axes_for("T", ids.shape[1], (*cut, *batch))
        size, own_ids = len(table), ids.size // ways(mesh, (*batch, *tokens))
        apart, split = set(columns) <= set(batch), {*batch, *tokens}.intersection(columns)
        if (split and not apart) or cheaper(own_ids, size // ways(mesh, cut)) == "table":
            columns = ()
        scatters = ids.shape[0] // ways(mesh, batch) % ways(mesh, cut) == 0

        def own(table: jax.Array, ids: jax.Array) -> jax.Array:
            if columns and apart:
                ids = lax.all_gather(ids, columns, tiled=True)
            if cut:
                place = jnp.clip(ids, 0, size - 1) - lax.axis_index(cut) * len(table)
                found = (place >= 0) & (place < len(table))
                x = jnp.where(found[..., None], self.look_up(table, place), 0)
            else:
                x = self.look_up(table, ids)
            if columns and apart:
                x = lax.all_to_all(x, columns, 0, 2, tiled=True)
            elif columns:
                x = lax.all_gather(x, columns, axis=2, tiled=True)
            return scattered(x, cut).astype(x.dtype) if scatters else whole(x, cut)

        return jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(
                PartitionSpec(cut or None, columns or None),
                PartitionSpec(batch or None, tokens or None),
            ),
            out_specs=PartitionSpec((*batch, *(cut if scatters else ())) or None, tokens or None),
            check_vma=False,
        )(table, ids)
