"""From logits to a token: temperature, nucleus, and a draw (inference specification, section 7)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from dsv4_jax.quantities import checked_seed, sampling_problems


def checked_sampling(temperature: Any, top_p: Any) -> tuple[np.float32, np.float32]:
    """Both as float32. Raises ValueError for what is not a number, a temperature that is negative or not
    finite in float32, or a top_p outside (0, 1]; all problems at once."""
    if problems := sampling_problems(temperature, top_p):
        raise ValueError("; ".join(problems))
    return np.float32(temperature), np.float32(top_p)


def key_of(seed: int) -> jax.Array:
    """The key of a seed. Seeds below 2^32 give that of `jax.random.key`, which drops higher bits without x64.

    Raises:
        ValueError: for anything but an integer in 0 .. 2^63 - 1.
    """
    seed = checked_seed(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def sample(
    logits: Float32[Array, "B V"],
    key: jax.Array,
    temperature: Float32[Array, ""],
    top_p: Float32[Array, ""],
) -> Int32[Array, "B"]:
    """One token a row. Temperature 0 is the argmax (lowest id on a tie); otherwise a Gumbel-max draw.

    Args:
        logits: of the last position.
        key: of this step; rows draw independently.
        temperature: divides the logits, with the official floor of 1e-5.
        top_p: probability mass kept, most likely tokens first; 1 keeps all.
    """
    greedy = jax.lax.argmax(logits, 1, jnp.int32)
    scaled = logits / jnp.maximum(temperature, 1e-5)

    def nucleus(scaled: jax.Array) -> jax.Array:
        order = jnp.sort(scaled, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
        # Keep a token if the mass before it is below top_p: the most likely one always stays.
        last = jnp.sum(mass < top_p, axis=-1, keepdims=True, dtype=jnp.int32)
        smallest = jnp.take_along_axis(order, jnp.minimum(last, order.shape[-1] - 1), axis=-1)
        return jnp.where(scaled >= smallest, scaled, -jnp.inf)

    def draw(scaled: jax.Array) -> jax.Array:
        kept = jax.lax.cond(top_p < 1.0, nucleus, lambda x: x, scaled)
        return jax.lax.argmax(kept + jax.random.gumbel(key, kept.shape, kept.dtype), 1, jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda _: greedy, scaled)
