"""What a request may ask of its logits before a token is drawn: penalties, biases, and tokens left out.

Each row by its own numbers; a row that asks for nothing keeps its logits bit for bit. The order is that of
other engines: repetition, frequency and presence penalties, then biases; top-k and min-p cut what temperature
has scaled, and top-p (`sampling.sample`) cuts last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


class LogitRules(NamedTuple):
    """One row a request. Neutral values: penalties 0, repetition 1, bias 0, top_k 0 and min_p 0."""

    presence: Float32[Array, "B"]  # taken from tokens that the output has
    frequency: Float32[Array, "B"]  # taken for every time that the output has them
    repetition: Float32[Array, "B"]  # divides positive logits of tokens in prompt or output, times others
    bias: Float32[Array, "B V"]  # added
    counts: Int32[Array, "B V"]  # how often the output has each token
    seen: Bool[Array, "B V"]  # tokens of the prompt
    top_k: Int32[Array, "B"]  # keep the k likeliest, 0 keeps all
    min_p: Float32[Array, "B"]  # keep tokens of at least this share of the likeliest one's probability

    @staticmethod
    def neutral(batch: int, vocab_size: int) -> "LogitRules":
        """Rules that change nothing."""
        # Arrays of their own: donated buffers must not be the same twice.
        none = lambda dtype: jnp.zeros((batch,), dtype)  # noqa: E731
        return LogitRules(
            none(jnp.float32),
            none(jnp.float32),
            jnp.ones((batch,), jnp.float32),
            jnp.zeros((batch, vocab_size), jnp.float32),
            jnp.zeros((batch, vocab_size), jnp.int32),
            jnp.zeros((batch, vocab_size), bool),
            none(jnp.int32),
            none(jnp.float32),
        )

    def counting(self, token: Int32[Array, "B"], drawn: Bool[Array, "B"]) -> "LogitRules":
        """After these rows have drawn these tokens."""
        rows = jnp.arange(len(token), dtype=jnp.int32)
        return self._replace(counts=self.counts.at[rows, token].add(drawn.astype(jnp.int32), mode="drop"))


def applied(
    logits: Float32[Array, "B V"], rules: LogitRules, temperature: Float32[Array, "B"]
) -> Float32[Array, "B V"]:
    """The logits to draw from; tokens left out get -inf. A row of neutral rules comes back as it is."""

    def penalised(logits: jax.Array) -> jax.Array:
        repeated = rules.seen | (rules.counts > 0)
        factor = rules.repetition[:, None]
        logits = jnp.where(repeated, jnp.where(logits > 0, logits / factor, logits * factor), logits)
        logits = logits - rules.frequency[:, None] * rules.counts
        return logits - rules.presence[:, None] * (rules.counts > 0) + rules.bias

    def cut(logits: jax.Array) -> jax.Array:
        size = logits.shape[-1]
        order = jnp.sort(logits, axis=-1, descending=True)
        last = jnp.where(rules.top_k > 0, jnp.minimum(rules.top_k, size), size) - 1
        smallest = jnp.take_along_axis(order, last[:, None], axis=1)
        # softmax(z / t) of a token over that of the likeliest is exp((z - max) / t)
        scaled = (logits - order[:, :1]) / jnp.maximum(temperature, 1e-5)[:, None]
        likely = (rules.min_p[:, None] <= 0) | (scaled >= jnp.log(jnp.maximum(rules.min_p, 1e-30))[:, None])
        return jnp.where((logits >= smallest) & likely, logits, -jnp.inf)

    plain = (rules.presence == 0) & (rules.frequency == 0) & (rules.repetition == 1)
    plain &= jnp.all(rules.bias == 0, axis=-1)
    whole = (rules.top_k == 0) & (rules.min_p <= 0)
    changed = jax.lax.cond(jnp.all(plain), lambda x: x, penalised, logits)
    logits = jnp.where(plain[:, None], logits, changed)
    changed = jax.lax.cond(jnp.all(whole), lambda x: x, cut, logits)
    return jnp.where(whole[:, None], logits, changed)
