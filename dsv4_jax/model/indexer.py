"""The lightning indexer: which compressed entries a CSA query attends to (report, section 2.3)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.cache import CompressorCache
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.operations import Operations
from dsv4_jax.model.rope import Rotation, rotate
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.numerics.grids import grids
from dsv4_jax.numerics.policy import Policy


class Indexer(nnx.Module):
    """Queries from the query latent, keys from a compressor of its own, one weight a head from the input."""

    def __init__(
        self, config: ModelConfig, policy: Policy, operations: Operations, declared: Declared
    ) -> None:
        self.wq_b = declared("wq_b")
        self.weights_proj = declared("weights_proj")
        self.compressor = Compressor(
            config,
            policy,
            operations,
            declared.under("compressor"),
            kind="csa",
            holds="index_keys",
        )
        self.grids = grids(policy, config.qk_rope_head_dim)
        self.operations = operations
        self.scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def queries(
        self,
        x: Float[Array, "B T D"],
        latent: Float[Array, "B T Q"],
        rotation: Rotation,
    ) -> tuple[Float[Array, "B T Hi Di"], Float32[Array, "B T Hi"]]:
        """Rotated head queries (not normalised) and the scaled head weights."""
        linear, pinned = self.operations.linear, self.operations.pinned
        q = pinned(linear(latent, self.wq_b[...], out=(("Hi", 0),), by_rows=True), "B T")
        q = rotate(q, Rotation(rotation.cos[:, :, None], rotation.sin[:, :, None]))
        q = self.grids.index_query(q)
        weights = pinned(linear(x, self.weights_proj[...], out=(("Hi", 0),), by_rows=True), "B T").astype(
            jnp.float32
        )
        to_grid = self.grids.score
        return q, to_grid(to_grid(weights) * self.scale)

    def keys(
        self,
        x: Float[Array, "B T D"],
        span: Span,
        blocks: Blocks,
        cache: CompressorCache | None,
        repeat: Int32[Array, ""],
    ) -> tuple[Float[Array, "R B S Di"], CompressorCache | None]:
        """Emits the indexer's own compressed keys; as `Compressor.__call__`."""
        return self.compressor(x, span, blocks, cache, repeat)
