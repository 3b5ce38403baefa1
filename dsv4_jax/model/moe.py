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
from dsv4_jax.numerics import qat
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.formats.weights import matrices, plain


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
        self.policy = policy
        self.operations = operations

    def __call__(self, x: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        """(silu(min(x w1, c)) * clip(x w3, -c, c)) w2; clamp, SiLU and product in float32."""
        to_grid = qat.fake_activation if self.policy.simulates("act_fp8") else lambda x: x
        both = self.operations.linear(to_grid(x), self.gate_up[...]).astype(jnp.float32)
        gate, up = both[:, 0], both[:, 1]
        if self.limit:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        hidden = to_grid((jax.nn.silu(gate) * up).astype(x.dtype))
        return self.operations.linear(hidden, self.down[...])


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
        self.gate = Router(config, kind, declared.under("gate"))
        self.experts = Experts(declared.under("experts"))
        self.shared = SharedExpert(config, policy, operations, declared.under("shared"))
        self.limit = config.swiglu_limit
        self.num_experts = config.n_routed_experts
        self.policy = policy
        self.operations = operations

    def __call__(
        self, x: Float[Array, "B T D"], span: Span, repeat: Int32[Array, ""]
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """Routed plus shared experts; the sum is float32. Padding takes no expert's time.

        The routed weights may be this layer's, or the whole stack of repeats with `repeat` as the index:
        a step that touches a few experts must not copy all of them out of the stack.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens, span.ids.reshape(-1))
        gate_up, down = self.experts.gate_up[...], self.experts.down[...]
        if self.policy.simulates("expert_fp4"):
            gate_up, down = (qat.fake_mxfp4(plain(w, self.policy.param_dtype)) for w in (gate_up, down))
        seen, round_hidden = tokens, None
        if self.policy.simulates("act_fp8"):
            seen, round_hidden = qat.fake_activation(tokens), qat.fake_activation
        first_expert: Int32[Array, ""] | int = 0
        if gate_up.ndim == 5:
            # Of quantised weights both arrays: elements and scales.
            gate_up, down = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (gate_up, down))
            first_expert = repeat * self.num_experts
        routed = self.operations.experts(
            seen,
            matrices(gate_up),
            matrices(down),
            routing.experts,
            routing.weights,
            swiglu_limit=self.limit,
            num_experts=self.num_experts,
            valid=span.valid.reshape(-1),
            first_expert=first_expert,
            round_hidden=round_hidden,
        )
        y = routed + self.shared(tokens).astype(jnp.float32)
        return y.astype(x.dtype).reshape(x.shape), routing
