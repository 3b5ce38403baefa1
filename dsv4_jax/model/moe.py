"""Mixture of experts: Ke routed experts and one shared expert a token (report, section 2.1)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int16, Int32

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

    def __call__(
        self, x: Float[Array, "*tokens D"]
    ) -> tuple[Float[Array, "*tokens D"], Int32[Array, "*tokens"]]:
        """(silu(min(x w1, c)) * clip(x w3, -c, c)) w2; clamp, SiLU and product in float32.

        Also how many of a token's 2 F numbers the clamp changed.
        """
        both = self.operations.linear(self.grids.activation(x), self.gate_up[...], out=(("F", 1),))
        both = both.astype(jnp.float32)
        gate, up = both[..., 0, :], both[..., 1, :]
        clamped = jnp.zeros(x.shape[:-1], jnp.int32)
        if self.limit:
            beyond = (gate > self.limit).astype(jnp.int32) + (jnp.abs(up) > self.limit)
            clamped = beyond.sum(axis=-1, dtype=jnp.int32)
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        hidden = self.grids.activation((jax.nn.silu(gate) * up).astype(x.dtype))
        return self.operations.linear(hidden, self.down[...], over=(("F", hidden.shape[-1]),)), clamped


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
        self.place = declared.root

    def __call__(
        self,
        x: Float[Array, "B T D"],
        span: Span,
        repeat: Int32[Array, ""],
        given: Int16[Array, "B T Ke"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing, Int32[Array, "*tokens"]]:
        """Routed plus shared experts; the sum is float32. Padding takes no expert's time.

        The routed weights may be this layer's, or the whole stack of repeats with `repeat` as the index:
        a step that touches a few experts must not copy all of them out of the stack. With `given`, those are
        the experts of each token, and the router only weighs them. The last result counts what the clamp of
        the shared expert's SwiGLU changed.
        """
        rows = 2 if self.operations.merges_tokens else 1
        tokens, ids, valid = (a.reshape(-1, *a.shape[rows:]) for a in (x, span.ids, span.valid))
        if given is not None:
            given = given.reshape(-1, *given.shape[rows:]).astype(jnp.int32)
        routing = self.gate(tokens, ids, given)
        gate_up, down = (self.grids.expert(w[...]) for w in (self.experts.gate_up, self.experts.down))
        chosen, copies = routing.experts, self.operations.copies
        if copies is not None:
            chosen = copies.slots(self.place, repeat, chosen)
        routed = self.operations.experts(
            self.grids.activation(tokens),
            matrices(gate_up),
            matrices(down),
            chosen,
            routing.weights,
            swiglu_limit=self.limit,
            valid=valid,
            repeat=repeat if gate_up.ndim == 5 else None,
            round_hidden=self.grids.hidden,
        )
        shared, clamped = self.shared(tokens)
        y = routed + shared.astype(jnp.float32)
        return y.astype(x.dtype).reshape(x.shape), routing, clamped
