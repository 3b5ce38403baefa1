"""The loss over a mesh: each device has some of the tokens and the whole head, and one number is summed."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sharding.activations import Placement
from sharding.expert_parallel import TOKEN_AXES


@dataclasses.dataclass(frozen=True)
class CrossEntropyOverMesh:
    """`linear_cross_entropy.weighted_cross_entropy` of tokens that are split over all devices.

    Logits never leave their device, and are not whole there either. The head is brought together for the
    product, and its gradient is summed over the devices and split again, V D numbers each way.

    Attributes:
        loss: on one device.
        placement: mesh and rules.
    """

    loss: Callable[..., jax.Array]
    placement: Placement

    def __call__(
        self,
        hidden: Float[Array, "T D"],
        head: Float[Array, "V D"],
        ids: Int32[Array, "T"],
        weights: Float32[Array, "T"],
        z_weight: Float32[Array, ""] | None = None,
    ) -> Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]:
        """The weighted sum of the negative log-likelihoods of all tokens, on every device.

        Args:
            hidden: what the head multiplies; any number of tokens.
            head: output rows.
            ids: targets.
            weights: of the tokens.
            z_weight: of the squared log-sum-exps; there are two results then, as of the loss on one device.
        """
        mesh = self.placement.mesh
        filling = -len(hidden) % mesh.size  # tokens of weight 0
        hidden = jnp.pad(hidden, ((0, filling), (0, 0)))
        ids, weights = (jnp.pad(a, (0, filling)) for a in (ids, weights))
        tokens = PartitionSpec(TOKEN_AXES)
        given = () if z_weight is None else (z_weight,)
        split = jax.shard_map(
            lambda *own: lax.psum(self.loss(*own), mesh.axis_names),
            mesh=mesh,
            in_specs=(tokens, PartitionSpec(), tokens, tokens, *[PartitionSpec()] * len(given)),
            out_specs=PartitionSpec(),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(hidden, head, ids, weights, *given)
