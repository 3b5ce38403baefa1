"""The loss over a mesh: what each device computes, and what is summed.

With a head that is split by rows over n devices, either the head is brought together and every device takes
some of the tokens, or the head stays and the n devices take the same tokens, each for its own rows:

    gathered   (n - 1) / n (V D (h + g) + t D a)     the head, its gradient, the hidden states' gradient
    split      (n - 1) / n 2 t D a + 3 * 4 t         that gradient, summed; maxima, sums and targets' logits

bytes that a device receives, for t tokens a group of n devices, V D numbers of the head of h bytes (g of its
gradient) and a bytes a number of the hidden states. A gathered head also takes V D h bytes on every device,
and as many of its gradient. The products are the same. For V4-Flash in bfloat16 a head that stays is less up
to 258,000 tokens a group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from sharding.activations import Placement
from sharding.expert_parallel import TOKEN_AXES
from sharding.placement import ways
from sharding.rules import OPTIONAL, axis_names

Head = Literal["by bytes", "gathered", "split"]
"""How the loss meets a split head."""


def received_bytes(
    head: Literal["gathered", "split"], tokens: int, vocab: int, width: int, parts: int, itemsize: int
) -> float:
    """What a device receives in a step's loss and its gradient, by the formula above.

    Args:
        head: which way.
        tokens: of a group of devices that share the head.
        vocab: V.
        width: D.
        parts: n, devices that share the head.
        itemsize: bytes a number of head and hidden states.
    """
    part = (parts - 1) / parts
    if head == "gathered":
        return part * width * itemsize * (2 * vocab + tokens)
    return part * 2 * tokens * width * itemsize + (12 * tokens if parts > 1 else 0)


def cheaper_head(
    tokens: int, vocab: int, width: int, parts: int, itemsize: int
) -> Literal["gathered", "split"]:
    """The way by which a device receives fewer bytes; arguments as of `received_bytes`."""
    split, gathered = (
        received_bytes(way, tokens, vocab, width, parts, itemsize) for way in ("split", "gathered")
    )
    return "split" if split < gathered else "gathered"


@dataclasses.dataclass(frozen=True)
class CrossEntropyOverMesh:
    """`linear_cross_entropy.weighted_cross_entropy` of tokens that are split over all devices.

    Logits never leave their device, and are not whole there either.

    Attributes:
        loss: on one device, of a whole head.
        terms: on one device: nll and lse of each token, of any rows of the head
            (`linear_cross_entropy.linear_cross_entropy`).
        placement: mesh and rules.
        head: whether a split head stays where it is; "by bytes": whichever receives less.
    """

    loss: Callable[..., jax.Array]
    terms: Callable[..., tuple[jax.Array, jax.Array]]
    placement: Placement
    head: Head = "by bytes"

    def __call__(
        self,
        hidden: Float[Array, "*tokens D"],
        head: Float[Array, "V D"],
        ids: Int32[Array, "*tokens"],
        weights: Float32[Array, "*tokens"],
        z_weight: Float32[Array, ""] | None = None,
    ) -> Float32[Array, ""] | tuple[Float32[Array, ""], Float32[Array, ""]]:
        """The weighted sum of the negative log-likelihoods of all tokens, on every device.

        Args:
            hidden: what the head multiplies; any number of tokens [T, D], or rows of them [B, T, D], which
                stay where the rules have them and are cut further along T, over the other axes.
            head: output rows.
            ids: targets.
            weights: of the tokens.
            z_weight: of the squared log-sum-exps; there are two results then, as of the loss on one device.
        """
        mesh = self.placement.mesh
        shared = self.shared_axes(ids.size, *head.shape, head.dtype.itemsize)
        by_dim = self._token_axes(ids.shape, shared)
        tokens = tuple(axis for axes in by_dim for axis in axes)
        filling = -ids.shape[-1] % ways(mesh, by_dim[-1])  # tokens of weight 0
        rows = ((0, 0),) * (ids.ndim - 1)
        hidden = jnp.pad(hidden, (*rows, (0, filling), (0, 0)))
        ids, weights = (jnp.pad(a, (*rows, (0, filling))) for a in (ids, weights))
        given = () if z_weight is None else (z_weight,)
        of_tokens = functools.partial(self._of_rows, shared) if shared else self.loss

        def own(hidden, head, ids, weights, *given):
            hidden = hidden.reshape(-1, hidden.shape[-1])
            return lax.psum(of_tokens(hidden, head, ids.reshape(-1), weights.reshape(-1), *given), tokens)

        split = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(
                PartitionSpec(*(axes or None for axes in by_dim)),
                PartitionSpec(shared or None),
                *[PartitionSpec(*(axes or None for axes in by_dim))] * 2,
                *[PartitionSpec()] * len(given),
            ),
            out_specs=PartitionSpec(),
            check_vma=False,  # kernels do not say over which axes their results vary
        )
        return split(hidden, head, ids, weights, *given)

    def _token_axes(self, shape: tuple[int, ...], shared: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The mesh axes that each dim of the tokens is split over; together all of size above 1 but `shared`.

        Where those of the rules do not leave a whole number of tokens to each further device, tokens of a
        split dim would have to move to fill it up: the further devices then work on the same tokens.
        """
        mesh = self.placement.mesh
        every = [axis for axis in TOKEN_AXES if axis not in shared and mesh.shape[axis] > 1]
        if len(shape) == 1:
            return [tuple(every)]
        rows = self.placement.axes_for("B", shape[0], shared)
        tokens = self.placement.axes_for("T", shape[1], (*shared, *rows))
        further = tuple(axis for axis in every if axis not in (*rows, *tokens))
        if not tokens or shape[1] % ways(mesh, (*tokens, *further)) == 0:
            tokens += further
        return [rows, tokens]

    def shared_axes(self, tokens: int, vocab: int, width: int, itemsize: int) -> tuple[str, ...]:
        """The mesh axes over which a head of V rows is split and stays so; none where it is gathered."""
        mesh = self.placement.mesh
        wanted = axis_names(self.placement.table.parameters.get("V", ()))
        axes = tuple(axis for name in wanted if mesh.shape[axis := name.removesuffix(OPTIONAL)] > 1)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if parts == 1 or vocab % parts or self.head == "gathered":
            return ()
        group = -(-tokens * parts // mesh.size)
        way = self.head if self.head == "split" else cheaper_head(group, vocab, width, parts, itemsize)
        return axes if way == "split" else ()

    def _of_rows(self, axes, hidden, head, ids, weights, z_weight=None):
        """The loss of a device's tokens; the devices along `axes` have the same ones, and other rows each."""
        own_nll, own_lse = self.terms(hidden, head, ids - lax.axis_index(axes) * len(head))
        # An id of other rows picks a logit of 0, so the sum of lse - nll is the target's logit.
        top = lax.pmax(lax.stop_gradient(own_lse), axes)
        lse = top + jnp.log(lax.psum(jnp.exp(own_lse - top), axes))
        nll = lse - lax.psum(own_lse - own_nll, axes)
        if z_weight is None:
            return jnp.sum(weights * nll)
        squares = jnp.sum(weights * lse**2)
        return jnp.sum(weights * nll) + z_weight * squares, lax.stop_gradient(squares)
