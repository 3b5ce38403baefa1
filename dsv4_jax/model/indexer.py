"""The lightning indexer: which compressed entries a CSA query attends to (report, section 2.3)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.cache import CompressorCache
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.declared import Declared
from dsv4_jax.model.entries import Entries
from dsv4_jax.model.linear import project
from dsv4_jax.model.rope import Rotation, rotate
from dsv4_jax.model.span import Blocks, Span
from dsv4_jax.numerics import cache_formats, qat
from dsv4_jax.numerics.policy import Policy
from pallas_kernels.arithmetic import cdiv, int32s
from pallas_kernels.topk_mask import topk_mask

KEYS_AT_ONCE = 4096
"""Keys of a row decoded at once: 2 MiB of float32 at Di = 128, which stay in a core's cache."""

MAX_SCORE_ELEMENTS = 2**24
"""Per-head products held at once (64 MiB of float32)."""


class Indexer(nnx.Module):
    """Queries from the query latent, keys from a compressor of its own, one weight a head from the input."""

    def __init__(self, config: ModelConfig, policy: Policy, declared: Declared) -> None:
        self.wq_b = declared("wq_b")
        self.weights_proj = declared("weights_proj")
        self.compressor = Compressor(
            config,
            policy,
            declared.under("compressor"),
            kind="csa",
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
    keys: Entries,
    size: int,
    *,
    rounded: bool = False,
) -> Float32[Array, "B T size"]:
    """I[t, s] = sum_h weights[t, h] relu(q[t, h] . k[s]); float32 products and sums.

    With `rounded`, products, weighted products and the sum are each rounded to bfloat16. The first `size`
    keys are sliced, decoded and scored piece by piece, so that neither their numbers nor [B, T, Hi, size]
    ever exist as a whole. No gradients.
    """
    batch, length, heads, width = q.shape
    by_query = q.reshape(batch, length * heads, width)
    to_grid = qat.to_bfloat16 if rounded else lambda x: x

    def score(start: int | Int32[Array, ""], count: int) -> Float32[Array, "B T count"]:
        dots = cache_formats.products(by_query, keys.piece(start, count))
        dots = to_grid(dots.reshape(batch, length, heads, count))
        return to_grid(to_grid(jax.nn.relu(dots) * weights[..., None]).sum(axis=2))

    piece = min(KEYS_AT_ONCE, max(64, MAX_SCORE_ELEMENTS // (batch * length * heads)))
    if size <= piece:
        return score(0, size)

    def step(i, scores):
        # The last piece moves back to be whole; what two pieces share they score alike.
        start = jnp.minimum(i * piece, size - piece).astype(jnp.int32)
        return jax.lax.dynamic_update_slice(scores, score(start, piece), int32s(0, 0, start))

    bounds = int32s(0, cdiv(size, piece))
    return jax.lax.fori_loop(*bounds, step, jnp.zeros((batch, length, size), jnp.float32))


def select(
    scores: Float32[Array, "B T S"], visible: Float[Array, "B T S"], top_k: int
) -> Float[Array, "B T S"]:
    """Membership of the top-k visible entries; ties go to the lowest entry, NaN scores are never chosen."""
    return topk_mask(scores, visible, top_k)
