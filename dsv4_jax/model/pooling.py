"""The entries of a call's blocks, before any rounding of the cache format: in XLA and by the kernel.

CSA and its indexer (two branches) pool 2m rows: branch 0 of the block before, then branch 1 of the block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dsv4_jax.model.norm import rms_norm
from dsv4_jax.model.rope import rotate
from dsv4_jax.model.span import Blocks, block_rows
from pallas_kernels.compressor import compressor


def pool(kv: Float[Array, "B P rows Dc"], logits: Float[Array, "B P rows Dc"]) -> Float[Array, "B P Dc"]:
    """sum_j softmax_j(logits)[channel] * kv[j], float32, independently for every channel."""
    weight = jax.nn.softmax(logits.astype(jnp.float32), axis=2)
    return (weight * kv.astype(jnp.float32)).sum(axis=2)


def entries_xla(
    kv: Float[Array, "B rows w Dc"],
    gate: Float[Array, "B rows w Dc"],
    ape: Float32[Array, "m w Dc"],
    norm: Float32[Array, " Dc"],
    blocks: Blocks,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B P Dc"]:
    """Pools, normalises and rotates the blocks; pooled rows and entries are rounded to `dtype`.

    Args:
        kv, gate: projected rows, those of the call or of a ring, as `blocks.source` counts them.
        ape: positional bias of a row by its place in its own block.
        norm: weight of the RMS norm.
        blocks: where the blocks' rows are.
        eps: of the norm, dimensionless.
        dtype: of the entries.
    """
    ratio, branches, _ = ape.shape
    own = branches - 1
    values = block_rows(kv[:, :, own], blocks.source, ratio)
    logits = block_rows(gate[:, :, own], blocks.source, ratio) + ape[:, own]
    if branches == 2:
        before = [_previous(rows[:, :, 0], blocks, ratio) for rows in (kv, gate)]
        absent = blocks.is_first[..., None, None]
        values = jnp.concatenate([jnp.where(absent, 0, before[0]), values], axis=2)
        earlier = jnp.where(absent, -jnp.inf, before[1] + ape[:, 0])
        logits = jnp.concatenate([earlier, logits], axis=2)
    pooled = pool(values, logits).astype(dtype)
    return rotate(rms_norm(pooled, norm, eps), blocks.rotation)


def entries_by_kernel(
    kv: Float[Array, "B rows w Dc"],
    gate: Float[Array, "B rows w Dc"],
    ape: Float32[Array, "m w Dc"],
    norm: Float32[Array, " Dc"],
    blocks: Blocks,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> Float[Array, "B P Dc"]:
    """As `entries_xla`. The kernel wants a block's rows side by side, and the block before it in the list."""
    ratio, branches, _ = ape.shape
    is_first, cos, sin = blocks.is_first, *blocks.rotation
    before = 0
    if blocks.source is not None:
        source = blocks.source
        if branches == 2:
            # The block before the first new one was emitted by an earlier call: list it again, drop it.
            source, before = jnp.concatenate([blocks.previous[:, :1], source], axis=1), 1
            is_first = jnp.pad(is_first, ((0, 0), (1, 0)), constant_values=True)
            cos, sin = (jnp.pad(x, ((0, 0), (1, 0), (0, 0))) for x in (cos, sin))
        kv, gate = (block_rows(x, source, ratio).reshape(x.shape[0], -1, *x.shape[2:]) for x in (kv, gate))
    how = {"is_first": is_first, "eps": eps, "interpret": interpret}
    return compressor(kv, gate, ape, norm, cos, sin, **how)[:, before:].astype(dtype)


def _previous(rows: Float[Array, "B rows Dc"], blocks: Blocks, ratio: int) -> Float[Array, "B P m Dc"]:
    if blocks.previous is not None:
        return block_rows(rows, blocks.previous, ratio)
    grouped = block_rows(rows, None, ratio)
    return jnp.concatenate([jnp.zeros_like(grouped[:, :1]), grouped[:, :-1]], axis=1)
