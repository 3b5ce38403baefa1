"""From logits to a token: temperature, nucleus, and a draw, each row by its own numbers and key.

A draw depends on (request seed, position of the drawn token) alone: a request's tokens stay the same in any
slot of any batch. Rows of one seed are different requests, see `request_keys`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key

from dsv4_jax.config.quantities import checked_seed, sampling_problems, seed_problem

NO_TOKEN = -2
"""In place of a token whose logits are no numbers. It is no id, and not `steps.RUNNING` either."""


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


def request_keys(seed: int | Sequence[int], batch: int) -> Key[Array, "B"]:
    """One key a row.

    Args:
        seed: one for the batch: row r is the r-th request of that seed. Or one a row, each the first request
            of its seed: the row then draws what it draws alone, as the only row of a batch with that seed.
        batch: B.

    Raises:
        ValueError: for seeds that are no integers in 0 .. 2^63 - 1, or not one a row; all problems at once.
    """
    if not isinstance(seed, (list, tuple, np.ndarray)) or not np.ndim(seed):
        return _requests(jnp.stack([key_of(seed)] * batch), jnp.arange(batch, dtype=jnp.int32))
    problems = [f"row {row}: {problem}" for row, one in enumerate(seed) if (problem := seed_problem(one))]
    if len(seed) != batch:
        problems.append(f"{len(seed)} seeds were given for {batch} rows")
    if problems:
        raise ValueError("; ".join(problems))
    return _requests(jnp.stack([key_of(one) for one in seed]), jnp.zeros((batch,), jnp.int32))


@jax.jit
def _requests(keys: Key[Array, "B"], number: Int32[Array, "B"]) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in)(keys, number)


def keys_at(requests: Key[Array, "B"], position: Int32[Array, "B"]) -> Key[Array, "B"]:
    """The keys that draw the tokens for these positions, one a request."""
    return jax.vmap(jax.random.fold_in)(requests, position)


def sample(
    logits: Float32[Array, "B V"],
    keys: Key[Array, "B"],
    temperature: Float32[Array, "B"],
    top_p: Float32[Array, "B"],
) -> Int32[Array, "B"]:
    """One token a row. Temperature 0 is the argmax (lowest id on a tie); otherwise a Gumbel-max draw.

    No row's token depends on another row. A row whose largest logit is no finite number, as that of any row
    with a NaN, has no distribution to draw from: it gets NO_TOKEN at every temperature.

    Args:
        logits: of the last position.
        keys: of the rows' draws.
        temperature: divides the row's logits, with the official floor of 1e-5.
        top_p: probability mass kept, most likely tokens first; 1 keeps all.
    """
    greedy = jax.lax.argmax(logits, 1, jnp.int32)  # of a row with a NaN the first one
    largest = jnp.take_along_axis(logits, greedy[:, None], axis=1)[:, 0]
    scaled = logits / jnp.maximum(temperature, 1e-5)[:, None]

    def nucleus(scaled: jax.Array) -> jax.Array:
        order = jnp.sort(scaled, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1)
        # Keep a token if the mass before it is below top_p: the most likely one always stays.
        last = jnp.sum(mass < top_p[:, None], axis=-1, keepdims=True, dtype=jnp.int32)
        smallest = jnp.take_along_axis(order, jnp.minimum(last, order.shape[-1] - 1), axis=-1)
        # A mass of 1 keeps all, also what rounding of the sum would cut.
        return jnp.where((scaled >= smallest) | (top_p[:, None] >= 1.0), scaled, -jnp.inf)

    def draw(scaled: jax.Array) -> jax.Array:
        sampled = temperature > 0
        kept = jax.lax.cond(jnp.any(sampled & (top_p < 1.0)), nucleus, lambda x: x, scaled)
        noise = jax.vmap(functools.partial(jax.random.gumbel, shape=kept.shape[1:], dtype=kept.dtype))(keys)
        return jnp.where(sampled, jax.lax.argmax(kept + noise, 1, jnp.int32), greedy)

    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, scaled)
    return jnp.where(jnp.isfinite(largest), drawn, NO_TOKEN)
