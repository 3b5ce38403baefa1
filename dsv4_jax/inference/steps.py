"""The compiled steps of a model: one jit each over (static network, parameter pytree, ...).

Everything that runs a model for its tokens calls these and nothing else. They trust their arguments;
`LanguageModel` checks them. Caches are donated: go on with the returned one.
"""

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.inference.sampling import keys_at, sample
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache

RUNNING = -1
"""In place of a stop token: this row goes on. No token has this id."""

empty_cache = jax.jit(new_cache, static_argnums=(0, 1, 2, 3, 4, 5, 6, 7))


@functools.partial(jax.jit, static_argnums=0)
def logits(network, parameters, span):
    model = network.holding(parameters)
    return model.logits(model.hidden(model(span).streams))


@functools.partial(jax.jit, static_argnums=0)
def streams(network, parameters, span):
    model = network.holding(parameters)
    e = model.embedding(span.ids)
    first = jnp.broadcast_to(e[:, :, None], (*e.shape[:2], model.config.hc_mult, e.shape[2]))
    taps = model(span, collect=frozenset({"streams"})).taps
    return jnp.stack([first, *(tap["streams"] for tap in taps)])


@functools.partial(jax.jit, static_argnums=(0, 2))
def layer(network, parameters, index, streams, span):
    return network.holding(parameters).layer(index, streams, span)


@functools.partial(jax.jit, static_argnums=(0, 3))
def taps(network, parameters, span, collect):
    return network.holding(parameters)(span, collect=collect).taps


@functools.partial(jax.jit, static_argnums=0)
def mtp_logits(network, parameters, span):
    model = network.holding(parameters)
    return model.logits(model.predict_further(model(span).streams, span)[0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(network, parameters, cache, tokens, num_valid):
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    return model.logits(model.hidden(after.streams)), after.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 5))
def prefill(network, parameters, cache, tokens, num_valid, last):
    """Appends a chunk; `last` f32[B, V] is updated for rows whose prompt has tokens in it."""
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    # Only each row's last real token meets the head.
    at = jnp.maximum(num_valid - 1, 0)[:, None, None, None]
    streams = jnp.take_along_axis(after.streams, at, axis=1)
    logits = model.logits(model.hidden(streams))[:, 0]
    return jnp.where(num_valid[:, None] > 0, logits, last), after.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def decode(network, parameters, cache, logits, requests, temperature, top_p, stopped, stops):
    """Draws a token a row, appends it, and returns (token, next logits, stopped, cache).

    `requests`, keys, `temperature` and `top_p` are [B] (see `sampling`). `stopped` i32[B] is the stop token
    that a row drew, RUNNING while it drew none.
    """
    model = network.holding(parameters)
    drawn = sample(logits, keys_at(requests, cache.length), temperature, top_p)
    token = jnp.where(stopped == RUNNING, drawn, stopped)
    stopped = jnp.where(jnp.isin(token, stops), token, RUNNING)
    after = model(spans.appended(token[:, None], cache.length, jnp.ones_like(token)), cache)
    return token, model.logits(model.hidden(after.streams))[:, 0], stopped, after.cache
