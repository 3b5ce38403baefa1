"""Partial interleaved rotary embedding, with YaRN on the compressed layers (report, section 2.3)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from dsv4_jax.config import ModelConfig


class Rotation(NamedTuple):
    """Angles of a set of positions: cos and sin, f32[..., Dr / 2]."""

    cos: Float32[Array, "... pairs"]
    sin: Float32[Array, "... pairs"]

    @property
    def inverse(self) -> "Rotation":
        """The rotation by the negative position."""
        return Rotation(self.cos, -self.sin)


def window_frequencies(config: ModelConfig) -> np.ndarray:
    """f32[Dr / 2] of window layers: theta = rope_theta, no YaRN."""
    return _plain(config.rope_theta, config.qk_rope_head_dim)


def compressed_frequencies(config: ModelConfig) -> np.ndarray:
    """f32[Dr / 2] of CSA and HCA layers: theta = compress_rope_theta with YaRN, at every length.

    Pairs that turn more than beta_fast times within the original context keep their frequency, those that
    turn less than beta_slow times are slowed by `factor`, with a linear ramp between.
    """
    theta, width, yarn = config.compress_rope_theta, config.qk_rope_head_dim, config.yarn

    def pair_turning(turns: float) -> float:
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / span, 0, 1).astype(np.float32)
    base = _plain(theta, width)
    return (base * (1 - ramp) + base / np.float32(yarn.factor) * ramp).astype(np.float32)


def _plain(theta: float, width: int) -> np.ndarray:
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.power(np.float32(theta), exponent)).astype(np.float32)


def rotation(positions: Int32[Array, "..."], frequencies: np.ndarray) -> Rotation:
    """Angles as a float32 product of position and frequency, as the official code computes them.

    Args:
        positions: tokens from the start of the segment.
        frequencies: f32[Dr / 2], radians per token.
    """
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "... width"], by: Rotation) -> Float[Array, "... width"]:
    """Rotates channel pairs (2j, 2j + 1) of the LAST Dr channels; the first channels pass through.

    Args:
        x: any float dtype; leading axes must broadcast against those of `by`.
        by: angles whose leading axes match `x`'s (add axes for heads before calling).

    Returns:
        Same shape and dtype as `x`; the rotation itself is float32.
    """
    width = 2 * by.cos.shape[-1]
    passed, turned = x[..., :-width], x[..., -width:]
    pairs = turned.astype(jnp.float32).reshape(*turned.shape[:-1], width // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    y = jnp.stack([even * by.cos - odd * by.sin, even * by.sin + odd * by.cos], axis=-1)
    return jnp.concatenate([passed, y.reshape(turned.shape).astype(x.dtype)], axis=-1)
