"""The lightning indexer: which compressed entries a CSA query attends to (report, section 2.3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.cache import CompressorCache
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.linear import project
from dsv4_jax.model.parameters import matrix
from dsv4_jax.model.rope import Rotation, rotate
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.numerics import qat
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.topk_mask import topk_mask

MAX_SCORE_ELEMENTS = 2**24
"""Per-head products held at once; longer key lists are scored in pieces (64 MiB of float32)."""


class Indexer(nnx.Module):
    """Queries from the query latent, keys from a compressor of its own, one weight a head from the input."""

    def __init__(self, config: ModelConfig, policy: Policy, *, repeats: int) -> None:
        heads = {"layers": repeats, "index_heads": config.index_n_heads}
        std = config.initializer_range
        query = heads | {"index_head_dim": config.index_head_dim, "q_rank": config.q_lora_rank}
        self.wq_b = matrix(query, policy.param_dtype, std)
        weights = heads | {"hidden": config.hidden_size}
        self.weights_proj = matrix(weights, policy.param_dtype, std)
        self.compressor = Compressor(
            config,
            policy,
            ratio=config.csa_ratio,
            branches=2,
            width=config.index_head_dim,
            repeats=repeats,
            holds="index_keys",
        )
        self.policy = policy
        self.scale = (config.index_head_dim * config.index_n_heads) ** -0.5

    def queries(
        self,
        x: Float[Array, "B T D"],
        latent: Float[Array, "B T Q"],
        rotation: Rotation,
    ) -> tuple[Float[Array, "B T Hi Di"], Float32[Array, "B T Hi"]]:
        """Rotated head queries (not normalised) and the scaled head weights."""
        q = project(latent, self.wq_b[...], self.policy)
        q = rotate(q, Rotation(rotation.cos[:, :, None], rotation.sin[:, :, None]))
        if self.policy.fp4_index:
            q = qat.fake_index_vector(q)
        elif self.policy.cache_format == "fp8+fp8":
            q = qat.hadamard(q)  # as the keys; products of bfloat16 and FP8 are exact, so q needs no rounding
        weights = project(x, self.weights_proj[...]).astype(jnp.float32)
        if self.policy.simulates("idx_score_bf16"):
            weights = qat.to_bfloat16(qat.to_bfloat16(weights) * self.scale)
            return q, weights
        return q, weights * self.scale

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


def index_scores(
    q: Float[Array, "B T Hi Di"],
    weights: Float32[Array, "B T Hi"],
    keys: Float[Array, "B S Di"],
    *,
    rounded: bool = False,
) -> Float32[Array, "B T S"]:
    """I[t, s] = sum_h weights[t, h] relu(q[t, h] . k[s]); float32 products and sums.

    With `rounded`, products, weighted products and the sum are each rounded to bfloat16. Long key lists are
    scored piece by piece, so that [B, T, Hi, S] never exists.
    """
    to_grid = qat.to_bfloat16 if rounded else lambda x: x

    def score(piece: Float[Array, "B s Di"]) -> Float32[Array, "B T s"]:
        dots = to_grid(jnp.einsum("bthd,bsd->bths", q, piece, preferred_element_type=jnp.float32))
        return to_grid(to_grid(jax.nn.relu(dots) * weights[..., None]).sum(axis=2))

    batch, num_keys, width = keys.shape
    per_key = q.shape[0] * q.shape[1] * q.shape[2]
    pieces = 1
    while per_key * num_keys // pieces > MAX_SCORE_ELEMENTS and num_keys % (2 * pieces) == 0:
        pieces *= 2
    if pieces == 1:
        return score(keys)
    split = jnp.moveaxis(keys.reshape(batch, pieces, num_keys // pieces, width), 1, 0)
    return jnp.moveaxis(jax.lax.map(score, split), 0, 2).reshape(batch, -1, num_keys)


def select(
    scores: Float32[Array, "B T S"], visible: Float[Array, "B T S"], top_k: int
) -> Float[Array, "B T S"]:
    """Membership of the top-k visible entries; ties go to the lowest entry, NaN scores are never chosen."""
    return topk_mask(scores, visible, top_k)
