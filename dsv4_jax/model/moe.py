"""Mixture of experts: Ke routed experts and one shared expert a token (report, section 2.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from dsv4_jax.config import ModelConfig, RouterKind
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.router import Router, Routing
from dsv4_jax.model.span import Span
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.weights import matrices


class Experts(nnx.Module):
    """The routed experts' weights: gate_up [E, 2, F, D] (0 = gate w1, 1 = up w3) and down [E, D, F]."""

    def __init__(self, declared: Declared) -> None:
        self.gate_up = declared("gate_up")
        self.down = declared("down")


class SharedExpert(nnx.Module):
    """The expert every token uses; clamped like the routed ones."""

    def __init__(
        self, config: ModelConfig, policy: Policy, operations: Operations, declared: Declared
    ) -> None:
        self.gate_up = declared("gate_up")
        self.down = declared("down")
        self.limit = config.swiglu_limit
        self.grids = grids(policy, config.qk_rope_head_dim)
        self.operations = operations

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """(silu(min(x w1, c)) * clip(x w3, -c, c)) w2; clamp, SiLU and product in float32."""
        both = self.operations.linear(self.grids.activation(x), self.gate_up[...], out=(("F", 1),))
        both = both.astype(jnp.float32)
        gate, up = both[..., 0, :], both[..., 1, :]
        if self.limit:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        hidden = self.grids.activation((jax.nn.silu(gate) * up).astype(x.dtype))
        return self.operations.linear(hidden, self.down[...], over=(("F", hidden.shape[-1]),))


class MixtureOfExperts(nnx.Module):
    """One layer's feed-forward sublayer."""

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy,
        operations: Operations,
        kind: RouterKind,
        declared: Declared,
    ) -> None:
        self.gate = Router(config, operations, kind, declared.under("gate"))
        self.experts = Experts(declared.under("experts"))
        self.shared = SharedExpert(config, policy, operations, declared.under("shared"))
        self.limit = config.swiglu_limit
        self.grids = grids(policy, config.qk_rope_head_dim)
        self.operations = operations

    def __call__(
        self, x: Float[Array, "B T D"], span: Span, repeat: Int32[Array, ""]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Routed plus shared experts; the sum is float32. Padding takes no expert's time.

        The routed weights may be this layer's, or the whole stack of repeats with `repeat` as the index:
        a step that touches a few experts must not copy all of them out of the stack.
        """
        rows = 2 if self.operations.merges_tokens else 1
        tokens, ids, valid = (a.reshape(-1, *a.shape[rows:]) for a in (x, span.ids, span.valid))
        routing = self.gate(tokens, ids)
        gate_up, down = (self.grids.expert(w[...]) for w in (self.experts.gate_up, self.experts.down))
        routed = self.operations.experts(
            self.grids.activation(tokens),
            matrices(gate_up),
            matrices(down),
            routing.experts,
            routing.weights,
            swiglu_limit=self.limit,
            valid=valid,
            repeat=repeat if gate_up.ndim == 5 else None,
            round_hidden=self.grids.hidden,
        )
        y = routed + self.shared(tokens).astype(jnp.float32)
        return y.astype(x.dtype).reshape(x.shape), routing
