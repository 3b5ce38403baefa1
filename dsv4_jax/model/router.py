"""Routing: square-root-softplus scores; experts by score plus bias, or by a table of token ids.

Report, section 2.1. All of it is float32, whatever the compute dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import ModelConfig, RouterKind
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.linear import project_float32
from dsv4_jax.model.operations import Operations

FLOOR = 1e-20
"""Keeps the score sum and the slope of the square root finite when every softplus underflows."""


class Routing(NamedTuple):
    """Which experts a token uses, and how much."""

    experts: Int32[Array, "*tokens Ke"]
    weights: Float32[Array, "*tokens Ke"]
    scores: Float32[Array, "*tokens E"]  # unbiased, of every expert (balance loss)


@jax.custom_jvp
def sqrt_softplus(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """sqrt(log(1 + exp(x))), finite with a finite slope for every finite x.

    The slope sigmoid(x) / (2 sqrt(softplus(x))) is stated by hand: autodiff would divide 0 by 0 once
    softplus underflows (x below about -104).
    """
    return jnp.sqrt(jnp.where(x > 20.0, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20.0)))))


@sqrt_softplus.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = sqrt_softplus(x)
    return y, jax.nn.sigmoid(x) / (2 * jnp.maximum(y, FLOOR)) * dx


class Router(nnx.Module):
    """Scores every expert and picks Ke of them; `kind` says how they are picked."""

    def __init__(
        self, config: ModelConfig, operations: Operations, kind: RouterKind, declared: Declared
    ) -> None:
        self.weight = declared("weight")
        self.bias = declared("bias") if kind == "learned" else None
        self.tid2eid = declared("tid2eid") if kind == "hash" else None
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.operations = operations

    def __call__(
        self,
        x: Float[Array, "*tokens D"],
        ids: Int32[Array, "*tokens"],
        given: Int32[Array, "*tokens Ke"] | None = None,
    ) -> Routing:
        """Routes each token; ties in the biased score go to the lowest expert.

        With `given` those are the experts, of older parameters for instance, and the scores of this call
        weigh them (report, section 4.2.3).
        """
        scores = sqrt_softplus(project_float32(x, self.weight[...]))
        if given is not None:
            experts = given
        elif self.tid2eid is not None:
            experts = self.operations.look_up(self.tid2eid[...], ids)
        else:
            biased = jax.lax.stop_gradient(scores + self.bias[...])
            experts = jax.lax.top_k(biased, self.top_k)[1]
        chosen = jnp.take_along_axis(scores, experts, axis=-1)
        # w = chosen / max(sum(chosen), FLOOR). A common factor is taken out first: the slope of the division,
        # 1 / sum^2, would overflow for sums near the floor, and 0 * inf is NaN.
        size = jax.lax.stop_gradient(jnp.maximum(chosen.max(axis=-1, keepdims=True), FLOOR))
        shares = chosen / size
        total = jnp.maximum(shares.sum(axis=-1, keepdims=True), FLOOR / size)
        return Routing(experts, self.scaling * shares / total, scores)
