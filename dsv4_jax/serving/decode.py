"""One compiled step for all slots: draw a token, guess what follows, append it all, keep what is right.

All shapes are fixed when the engine starts: nothing is compiled after that, whatever the requests ask for.
Slots that serve nobody draw and append nothing.

A draw depends on (request, position, what the answer holds so far) alone, so the model's own token is known
at every place whose context is right. A draft is kept if it is that token: answers do not depend on drafts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from dsv4_jax.inference import steps
from dsv4_jax.inference.drafters import LONGEST_MATCH, SHORTEST_MATCH, Draft
from dsv4_jax.inference.logit_rules import LogitRules, applied
from dsv4_jax.inference.sampling import NO_TOKEN, keys_at, sample
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters
from dsv4_jax.serving.constraints import WORD
from dsv4_jax.serving.requests import MOST_LOGPROBS
from dsv4_jax.serving.slots import NO_GATE, NO_STOP, Slots
from sharding.compiling import compiled_step


class Drawn(NamedTuple):
    """What a step drew, S rows of W = 1 + drafts places, of which the first `count` are meant."""

    token: Int32[Array, "S W"]  # NO_TOKEN: the logits were no numbers
    count: Int32[Array, "S"]  # 0: the slot was not running
    drafted: Int32[Array, "S"]  # guesses that were tried; of an answer that ended, those up to its end
    logprob: Float32[Array, "S W"]
    likeliest: Int32[Array, "S W k"]
    likeliest_logprobs: Float32[Array, "S W k"]


@compiled_step(static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def decode(
    network: Network,
    draft: Draft | None,
    width: int,
    parameters: Parameters,
    cache: Cache,
    slots: Slots,
    masks: UInt32[Array, "S words"],
    given: Bool[Array, "S"],
) -> tuple[Drawn, Cache, Slots]:
    """One token for every running slot, and as many more as were guessed right.

    A slot that is held (`Slots.held`) sits out the step unless its mask is given; it then draws one token of
    its mask, and tries no guesses.

    Args:
        network, parameters: the model; static and data.
        draft: who guesses; its head must be in the model, and its slot in the cache. None: nobody.
        width: W - 1, guesses that are tried: of those that `draft` makes the first. 0: none are made.
        cache: of S rows, donated. slots: donated.
        masks: a bit a token, the first in the lowest; of slots that are not given, without meaning.
        given: slots whose mask is given.
    """
    model = network.holding(parameters)
    start, draft, num_places = cache.length, draft if width else None, 1 + width
    running, masked = slots.running & (~slots.held | given), slots.held & given
    token = _draw(_masked(slots.logits, masks, masked), slots, slots.rules, start)
    first = jnp.where(running, jnp.maximum(token, 0), 0)
    guesses, meant = _guesses(network, draft, width, parameters, cache, slots, first)
    meant = jnp.where(running & ~masked, jnp.clip(jnp.minimum(meant, slots.last - start), 0), 0)
    ids = jnp.concatenate([first[:, None], guesses], axis=1)
    after = model(spans.appended(ids, start, jnp.where(running, meant + 1, 0)), cache)
    logits = model.logits(model.hidden(after.streams))  # [S, W, V]

    # Place by place: what the model draws there, as long as everything before it was right.
    drawn, rules = [token], slots.rules.counting(first, running)
    right = running
    accepted = jnp.zeros_like(start)
    for place in range(1, num_places):
        right = right & (token != slots.gate)  # what follows is drawn under a mask, which is not here yet
        token = _draw(logits[:, place - 1], slots, rules, start + place)
        right = right & (token == guesses[:, place - 1]) & (place <= meant)
        accepted = accepted + right.astype(jnp.int32)
        rules = rules.counting(jnp.maximum(token, 0), right)
        drawn.append(token)
    tokens = jnp.stack(drawn, axis=1)

    ends = _ends(tokens, slots, start)
    places = jnp.arange(num_places, dtype=jnp.int32)
    first_end = jnp.min(jnp.where(ends, places, num_places), axis=1)
    count = jnp.where(running, jnp.minimum(accepted, first_end) + 1, 0)
    ended = first_end <= accepted
    opened = jnp.any((tokens == slots.gate[:, None]) & (places < count[:, None]), axis=1)
    all_logits = jnp.concatenate([slots.logits[:, None], logits[:, :-1]], axis=1)
    of_all = jax.nn.log_softmax(all_logits, axis=-1)
    likeliest_logprobs, likeliest = jax.lax.top_k(of_all, min(MOST_LOGPROBS, of_all.shape[-1]))
    at = jnp.maximum(tokens, 0)[..., None]
    found = Drawn(
        tokens,
        count,
        jnp.where(ended, jnp.minimum(accepted, first_end), meant),
        jnp.take_along_axis(of_all, at, axis=2)[..., 0],
        likeliest.astype(jnp.int32),
        likeliest_logprobs,
    )
    following = jnp.take_along_axis(logits, accepted[:, None, None], axis=1)[:, 0]
    size = slots.history.shape[1]
    rows = jnp.arange(len(start), dtype=jnp.int32)[:, None]
    where = jnp.where(places < count[:, None], start[:, None] + places, size)
    slots = slots._replace(
        logits=jnp.where(running[:, None], following, slots.logits),
        rules=rules,
        history=slots.history.at[rows, where].set(jnp.maximum(tokens, 0), mode="drop"),
        gate=jnp.where(opened, NO_GATE, slots.gate),
        held=slots.held | opened,
        running=slots.running & ~(running & ended),
    )
    cache = after.cache if draft is None else after.cache.rewind(meant - accepted)
    return found, cache, slots


def _draw(
    logits: Float32[Array, "S V"], slots: Slots, rules: LogitRules, position: Int32[Array, "S"]
) -> Int32[Array, "S"]:
    """The token that each slot draws at a position from logits."""
    stop_ids = jnp.where(slots.stops == NO_STOP, logits.shape[1], slots.stops)
    too_early = position < slots.stop_from
    rows = jnp.arange(len(position), dtype=jnp.int32)[:, None]

    def without_stops(logits: jax.Array) -> jax.Array:
        banned = logits.at[rows, stop_ids].set(-jnp.inf, mode="drop")
        return jnp.where(too_early[:, None], banned, logits)

    allowed = jax.lax.cond(jnp.any(too_early & slots.running), without_stops, lambda x: x, logits)
    allowed = applied(allowed, rules, slots.temperature)
    keys = keys_at(slots.requests, position)
    return sample(allowed, keys, jnp.where(slots.running, slots.temperature, 0.0), slots.top_p)


def _masked(
    logits: Float32[Array, "S V"], masks: UInt32[Array, "S words"], masked: Bool[Array, "S"]
) -> Float32[Array, "S V"]:
    """The logits, of which masked rows keep those of their masks."""

    def cut(logits: jax.Array) -> jax.Array:
        bits = masks[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
        allowed = bits.reshape(len(masks), -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed | ~masked[:, None], logits, -jnp.inf)

    return jax.lax.cond(jnp.any(masked), cut, lambda x: x, logits)


def _ends(tokens: Int32[Array, "S W"], slots: Slots, start: Int32[Array, "S"]) -> Bool[Array, "S W"]:
    """Where an answer ends: by a stop token, by its length, or because nothing could be drawn."""
    stopped = jnp.any(tokens[:, :, None] == slots.stops[:, None], axis=2)
    position = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return stopped | (position >= slots.last[:, None]) | (tokens == NO_TOKEN)


def _guesses(
    network: Network,
    draft: Draft | None,
    width: int,
    parameters: Parameters,
    cache: Cache,
    slots: Slots,
    token: Int32[Array, "S"],
) -> tuple[Int32[Array, "S k"], Int32[Array, "S"]]:
    """What may follow `token`, which is not appended yet, and how much of it is meant."""
    numbers = (slots.requests, slots.temperature, slots.top_p)
    every = functools.partial(jnp.full, token.shape, dtype=jnp.int32)
    match draft:
        case None:
            return jnp.zeros((len(token), 0), jnp.int32), every(0)
        case "lookup":
            return looked_up(slots.history, cache.length, token, width)
        case "mtp":
            guesses = steps.draft_further(network, parameters, cache, token, *numbers)
        case "dspark":
            guesses = steps.draft_block(network, parameters, cache, token, *numbers)[0]
    guesses = guesses[:, :width]
    # Nothing is guessed from a row without tokens, and nothing of what was no number.
    broken = jnp.argmax(jnp.pad(guesses < 0, ((0, 0), (0, 1)), constant_values=True), axis=1)
    meant = jnp.where(cache.length > 0, broken.astype(jnp.int32), 0)
    return jnp.maximum(guesses, 0), meant


def looked_up(
    history: Int32[Array, "S length"], length: Int32[Array, "S"], token: Int32[Array, "S"], most: int
) -> tuple[Int32[Array, "S most"], Int32[Array, "S"]]:
    """What followed the longest earlier occurrence of each row's last tokens, the latest of equal length.

    The same as `inference.drafters.looked_up`, on the device.

    Args:
        history: tokens by position. length: how many each row holds.
        token: the next one, which counts as the last. most: guesses.

    Returns:
        guesses, and how many of them there are: 0 if not even SHORTEST_MATCH tokens occurred before.
    """
    size = history.shape[1]
    rows = jnp.arange(len(token), dtype=jnp.int32)
    line = history.at[rows, length].set(token, mode="drop")
    place = jnp.arange(size, dtype=jnp.int32)
    matched = jnp.zeros(line.shape, jnp.int32)
    going = (place >= 1) & (place <= length[:, None])  # a match that ends before `place`
    for back in range(LONGEST_MATCH):
        last = jnp.take_along_axis(line, jnp.maximum(length - back, 0)[:, None], axis=1)
        shifted = jnp.pad(line, ((0, 0), (back + 1, 0)))[:, :size]  # line[place - 1 - back]
        going = going & (place > back) & (shifted == last)
        matched = matched + going.astype(jnp.int32)
    best = jnp.argmax(matched * size + place, axis=1).astype(jnp.int32)
    long_enough = jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0] >= SHORTEST_MATCH
    at = best[:, None] + jnp.arange(most, dtype=jnp.int32)
    guesses = jnp.take_along_axis(line, jnp.minimum(at, size - 1), axis=1)
    return guesses, jnp.where(long_enough, jnp.minimum(most, length + 1 - best), 0)
