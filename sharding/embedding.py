"""Rows of a table whose vocabulary is split over devices: ids travel, and the rows that were found."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from sharding.activations import Placement
from sharding.placement import Axis, sharding_of, ways
from sharding.report import axes_of


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
        """The rows of the ids, split over the batch. Each device looks among its own rows, and of a sum over
        devices one part alone is not zero: no number is rounded.

        Args:
            table: split over V as the rules say.
            ids: in 0 .. V - 1; others are clipped.
        """
        mesh, rules = self.placement.mesh, self.placement.table.parameters
        rows = Axis(("V",), (table.shape[0],))
        spec = sharding_of("embed", [rows], mesh, rules)[0].spec
        cut = axes_of(spec[0]) if len(spec) else ()
        batch = self.placement.axes_for("B", ids.shape[0], cut)
        tokens = self.placement.axes_for("T", ids.shape[1], (*cut, *batch))
        scatters = ids.shape[0] // ways(mesh, batch) % ways(mesh, cut) == 0
        size = table.shape[0]

        def own(table: jax.Array, ids: jax.Array) -> jax.Array:
            if not cut:
                return self.look_up(table, ids)
            place = jnp.clip(ids, 0, size - 1) - lax.axis_index(cut) * len(table)
            found = (place >= 0) & (place < len(table))
            x = jnp.where(found[..., None], self.look_up(table, place), 0)
            if scatters:
                return lax.psum_scatter(x, cut, scatter_dimension=0, tiled=True)
            return lax.psum(x, cut)

        split = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(PartitionSpec(cut or None), PartitionSpec(batch or None, tokens or None)),
            out_specs=PartitionSpec((*batch, *(cut if scatters else ())) or None, tokens or None),
            check_vma=False,
        )
        return split(table, ids)
