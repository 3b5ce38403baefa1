"""The routed experts for rows of tokens [B, T], where a mesh splits the tokens of a row too.

Merging B and T of such an array would move it between devices, so each device merges its own part inside the
`shard_map` of `expert_parallel`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from sharding.activations import Placement
from sharding.expert_parallel import TOKEN_AXES, ExpertParallel, Matrices, chosen_ids, on_device
from sharding.report import axes_of


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """Takes tokens [T, D] as `ExpertParallel` does, and rows of tokens [B, T, D].

    Attributes:
        flat: for tokens [T, D].
        placement: says how rows and their tokens are split.
    """

    flat: ExpertParallel
    placement: Placement

    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        gate_up: Matrices,
        down: Matrices,
        ids: Int32[Array, "*tokens Ke"],
        weights: Float32[Array, "*tokens Ke"],
        *,
        valid: Bool[Array, "*tokens"] | None = None,
        repeat: Int32[Array, ""] | None = None,
        **settings: Any,
    ) -> Float32[Array, "*tokens D"]:
        """The experts' weighted sums for every token; else as `grouped_matmul.expert_ffn`.

        Raises:
            ValueError: as `ExpertParallel`.
        """
        if x.ndim == 2:
            return self.flat(x, gate_up, down, ids, weights, valid=valid, repeat=repeat, **settings)
        if x.size == 0:
            return jnp.zeros(x.shape, jnp.float32)
        mesh = self.flat.mesh
        rows = self.placement.spec("B T", x.shape[:2])
        used = [axis for entry in rows for axis in axes_of(entry)]
        # Devices that hold the same tokens share the work on them.
        sharing = tuple(axis for axis in TOKEN_AXES if axis not in used and mesh.shape[axis] > 1)
        shares = math.prod(mesh.shape[axis] for axis in sharing)
        own_tokens = math.prod(x.shape[:2]) // math.prod(mesh.shape[axis] for axis in used)
        share = -(-own_tokens // shares)
        ids = chosen_ids(ids, valid, gate_up.shape[0 if repeat is None else 1])
        local = functools.partial(self.flat.experts, **settings)
        whole = jax.ShapeDtypeStruct((share * mesh.size, x.shape[-1]), x.dtype)
        rounded = settings.get("round_hidden") is not None
        travel = self.flat.travel(gate_up, down, whole, ids.shape[-1], rounded=rounded)

        def on_own_rows(x, gate_up, down, ids, weights, repeat):
            own = [a.reshape(-1, a.shape[-1]) for a in (x, ids, weights)]
            filling = share * shares - own_tokens
            own = [
                jnp.pad(a, ((0, filling), (0, 0)), constant_values=empty)
                for a, empty in zip(own, (0, -1, 0), strict=True)
            ]
            if sharing:
                start = lax.axis_index(sharing) * share
                own = [lax.dynamic_slice_in_dim(a, start, share) for a in own]
            y = on_device(local, travel, own[0], gate_up, down, own[1], own[2], repeat)
            if sharing:
                y = lax.all_gather(y, sharing, tiled=True)
            return y[:own_tokens].reshape(x.shape)

        split = jax.shard_map(
            on_own_rows,
            mesh=mesh,
            in_specs=(rows, *travel.cut.specs(repeat is not None), rows, rows, PartitionSpec()),
            out_specs=rows,
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(x, gate_up, down, ids, weights, repeat)
