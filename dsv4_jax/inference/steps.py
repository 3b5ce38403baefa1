"""The compiled steps of a model: one jit each over (static network, parameter pytree, ...).

Everything that runs a model for its tokens calls these and nothing else. They trust their arguments;
`LanguageModel` checks them. Caches are donated: go on with the returned one.
"""

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.inference.sampling import keys_at, sample
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache, pinned_cache
from sharding.compiling import compiled_step

RUNNING = -1
"""In place of a stop token: this row goes on. No token has this id."""


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6, 7, 8), static_argnames=("stream_dtype", "dspark")
)
def empty_cache(
    config,
    batch,
    capacity,
    dtype,
    max_rewind,
    row_dtype,
    format,
    as_bits,
    placement,
    max_length,
    stream_dtype,
    dspark=False,
):
    """As `model.cache.new_cache`, on the mesh of a placement or, for None, on one device. `max_length`, which
    decides no shape, may be any number without compiling."""
    how = (dtype, max_rewind, row_dtype, format, as_bits)
    slots = {"stream_dtype": stream_dtype, "dspark": dspark}
    empty = new_cache(config, batch, capacity, *how, max_length=max_length, **slots)
    return empty if placement is None else pinned_cache(empty, placement.pinned)


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


@compiled_step(static_argnums=0, donate_argnums=2)
def extend(network, parameters, cache, tokens, num_valid):
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    return model.logits(model.hidden(after.streams)), after.cache


@compiled_step(static_argnums=0, donate_argnums=2)
def extend_further(network, parameters, cache, tokens, num_valid):
    """Appends tokens, and predicts one token further with the MTP block (report, section 2.1).

    MTP row t joins the backbone's streams of token t with token t + 1 and predicts token t + 2. So a call on
    a row of n tokens starts with the token before it, which had no successor until now.

    Args:
        network, parameters: of a model with an MTP block.
        cache: with a slot for it (`new_cache(mtp=True)`), donated. Any other step keeps the slot up to date
            too, and `Cache.rewind` takes back its rows with the tokens.
        tokens: i32[B, T].
        num_valid: i32[B], tokens to append a row, 0..T.

    Returns:
        logits f32[B, T, V], as `extend`; further f32[B, T, V], whose row j scores the token at position
        max(n - 1, 0) + j + 2 of a row that held n tokens; and the cache. Of `further` the first num_valid[b]
        rows mean something, one fewer in a row that was empty.
    """
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    return model.logits(model.hidden(after.streams)), model.logits(after.further), after.cache


@functools.partial(jax.jit, static_argnums=0)
def draft(network, parameters, cache, token):
    """Scores the token after the next one: what follows `token`, which is drawn but not appended yet.

    Args:
        network, parameters: of a model with an MTP block.
        cache: with a slot for it, not donated and not changed. Rows without tokens have nothing to draft
            from; what comes back for them means nothing.
        token: i32[B], the next token of each row, at position n of a row of n tokens.

    Returns:
        f32[B, V], scores of the tokens at position n + 1, from the backbone's streams of token n - 1. They
        are the row of `extend_further` for that token, once `token` is appended.
    """
    model = network.holding(parameters)
    config = network.config
    none = jnp.zeros((len(token), 1, config.hc_mult, config.hidden_size), network.policy.compute_dtype)
    span = spans.appended(token[:, None], cache.length, jnp.ones_like(token))
    return model.logits(model.predict_appended(none, span, cache)[0])[:, 0]


@compiled_step(static_argnums=0, donate_argnums=(2, 5))
def prefill(network, parameters, cache, tokens, num_valid, last):
    """Appends a chunk; `last` f32[B, V] is updated for rows whose prompt has tokens in it."""
    model = network.holding(parameters)
    after = model(spans.appended(tokens, cache.length, num_valid), cache)
    # Only each row's last real token meets the head.
    at = jnp.maximum(num_valid - 1, 0)[:, None, None, None]
    streams = jnp.take_along_axis(after.streams, at, axis=1)
    logits = model.logits(model.hidden(streams))[:, 0]
    logits = jnp.where(num_valid[:, None] > 0, logits, last)
    return model.operations.pinned(logits, "B V"), after.cache


@compiled_step(static_argnums=0, donate_argnums=(2, 3))
def decode(network, parameters, cache, logits, requests, temperature, top_p, stopped, stops):
    """Draws a token a row, appends it, and returns (token, next logits, stopped, cache).

    The tokens are whole on every device, so that each of several processes can read them.
    `requests`, keys, `temperature` and `top_p` are [B] (see `sampling`). `stopped` i32[B] is the stop token
    that a row drew, RUNNING while it drew none. A token is `sampling.NO_TOKEN` where logits are no numbers;
    what follows it means nothing.
    """
    model = network.holding(parameters)
    drawn = sample(logits, keys_at(requests, cache.length), temperature, top_p)
    token = jnp.where(stopped == RUNNING, drawn, stopped)
    stopped = jnp.where(jnp.isin(token, stops), token, RUNNING)
    ids = jnp.maximum(token, 0)[:, None]
    after = model(spans.appended(ids, cache.length, jnp.ones_like(token)), cache)
    pinned = model.operations.pinned
    logits = pinned(model.logits(model.hidden(after.streams))[:, 0], "B V")
    return pinned(token, ""), logits, pinned(stopped, "B"), after.cache


@functools.partial(jax.jit, static_argnums=0)
def draw(network, logits, requests, position, temperature, top_p):
    """Draws the tokens at i32[B] `position` from f32[B, V] `logits`: i32[B], whole on every device."""
    token = sample(logits, keys_at(requests, position), temperature, top_p)
    return token if network.operations is None else network.operations.pinned(token, "")


@functools.partial(jax.jit, static_argnums=0)
def draft_further(network, parameters, cache, token, requests, temperature, top_p):
    """One draft a row, i32[B, 1], from the MTP block: drawn from the scores of `draft` with the very numbers
    that will draw the token itself, so that close scores give the same token at any temperature."""
    scores = draft(network, parameters, cache, token)
    drawn = sample(scores, keys_at(requests, cache.length + 1), temperature, top_p)
    return drawn[:, None]


@functools.partial(jax.jit, static_argnums=0)
def draft_block(network, parameters, cache, token, requests, temperature, top_p):
    """The drafts of the DSpark head for the K positions after `token`, which is drawn and not appended yet.

    Args:
        network, parameters: of a model with such a head.
        cache: with a slot for it, of rows of n >= 1 tokens; neither donated nor changed.
        token: i32[B], the next token of each row, at position n.
        requests, temperature, top_p: as `decode`. A draft is drawn with the very numbers that will draw the
            token of its position; at temperature 0 it is the argmax.

    Returns:
        ids i32[B, K] for positions n + 1 .. n + K, their corrected logits f32[B, K, V], and the logits of
        being accepted f32[B, K].
    """
    model = network.holding(parameters)
    head, spark = model.dspark, network.config.dspark
    ids = jnp.full((len(token), spark.block_size), spark.noise_token_id, jnp.int32)
    ids = ids.at[:, 0].set(jnp.maximum(token, 0))
    slots = head.block(model.embedding(ids), cache.length, cache.dspark)
    base = model.logits(slots.hidden)

    def correct(token, slot):
        base, collapsed, place = slot
        followed = head.follow(jnp.maximum(token, 0))
        logits = base + head.correction(followed)
        drawn = sample(logits, keys_at(requests, cache.length + 1 + place), temperature, top_p)
        return drawn, (drawn, logits, head.confidence_logit(collapsed, followed))

    by_slot = (
        *(jnp.moveaxis(x, 1, 0) for x in (base, slots.collapsed)),
        jnp.arange(ids.shape[1], dtype=jnp.int32),
    )
    found = jax.lax.scan(correct, token, by_slot)[1]
    return tuple(jnp.moveaxis(x, 0, 1) for x in found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(network, parameters, cache, token, drafts, num_drafts, requests, temperature, top_p):
    """Appends each row's token and the drafts after it as far as the model draws them itself.

    A draw depends on (request, position) alone, so the model's own token is known at every place whose
    context is right. A draft is accepted if it is that token: what is generated does not depend on drafts,
    at any temperature (spec of inference, section 6: distribution-preserving, and reproducible).

    Args:
        network, parameters: of a model.
        cache: of rows of n tokens, donated; its `max_rewind` is at least k. What was appended for drafts
            that were not accepted is taken back.
        token: i32[B], drawn for position n and not appended yet.
        drafts: i32[B, k], for positions n + 1 .. n + k.
        num_drafts: i32[B], how many of them are meant, 0..k; -1: the row rests, and nothing is appended.
        requests, temperature, top_p: as `decode`.

    Returns:
        drawn i32[B, 1 + k], of which the first accepted[b] + 1 are the row's next tokens, positions
        n + 1 and on; accepted i32[B]; next i32[B], the last of those, drawn and not appended; and the cache.
        Tokens and counts are whole on every device. A token may be `sampling.NO_TOKEN`, as in `decode`.
    """
    model = network.holding(parameters)
    start = cache.length
    ids = jnp.maximum(jnp.concatenate([token[:, None], drafts], axis=1), 0)
    after = model(spans.appended(ids, start, num_drafts + 1), cache)
    logits = model.logits(model.hidden(after.streams))
    batch, width = ids.shape
    position = start[:, None] + jnp.arange(1, width + 1, dtype=jnp.int32)
    keys = jax.vmap(keys_at, in_axes=(None, 1), out_axes=1)(requests, position)
    each = (jnp.broadcast_to(number[:, None], ids.shape).reshape(-1) for number in (temperature, top_p))
    drawn = sample(logits.reshape(batch * width, -1), keys.reshape(-1), *each).reshape(batch, width)
    meant = jnp.arange(width - 1, dtype=jnp.int32) < num_drafts[:, None]
    right = (drawn[:, :-1] == drafts) & (drafts >= 0) & meant
    accepted = jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    following = jnp.take_along_axis(drawn, accepted[:, None], axis=1)[:, 0]
    cache = after.cache.rewind(jnp.maximum(num_drafts, 0) - accepted)
    pinned = model.operations.pinned
    return pinned(drawn, ""), pinned(accepted, ""), pinned(following, "B"), cache
