"""Prompt in, tokens out: chunked prefill, then one compiled step a token."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.inference import steps
from dsv4_jax.inference.sampling import NO_TOKEN, checked_sampling, request_keys
from dsv4_jax.inference.steps import RUNNING
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters

PREFILL_CHUNKS = (2048, 512, 128, 32)
"""Compiled chunk lengths, longest first; the rest of a prompt is padded up to the shortest that holds it."""

STOPS_GROUP = 8
"""Stop ids are padded to a multiple of it, so that runs with other lists share their compiled step."""


def chunks(length: int) -> list[int]:
    """Chunk lengths that cover a prompt of `length` tokens with at most one padded chunk."""
    plan = []
    while length > 0:
        fitting = [size for size in PREFILL_CHUNKS if size <= length]
        size = fitting[0] if fitting else PREFILL_CHUNKS[-1]
        plan.append(size)
        length -= size
    return plan


def prefill(
    network: Network, parameters: Parameters, cache: Cache, prompts: Sequence[Sequence[int]]
) -> tuple[jax.Array, Cache]:
    """Appends ragged prompts to an empty or running cache.

    Returns:
        f32[B, V], the logits after each row's last prompt token, and the cache.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    logits = network.put(np.zeros((len(prompts), network.config.vocab_size), np.float32), "B V")
    start = 0
    for size in chunks(int(lengths.max())):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)] = piece
        num_valid = np.clip(lengths - start, 0, size).astype(np.int32)
        piece = network.put(tokens, "B"), network.put(num_valid, "B")
        logits, cache = steps.prefill(network, parameters, cache, *piece, logits)
        start += size
    return logits, cache


def stream(
    network: Network,
    parameters: Parameters,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    seed: int | Sequence[int],
    stop_token_ids: Sequence[int],
) -> Iterator[np.ndarray]:
    """Yields i32[B] a step, until every row has stopped or the budget is spent.

    A row that drew a stop token keeps yielding that token: its output is padded with it.
    Every draw depends on the row's request (see `request_keys`) and on its position alone.

    Raises:
        ValueError: for seeds or sampling values outside their range, or seeds that are not one a row.
        FloatingPointError: when the logits of a row that still runs are not numbers; it names the rows and
            the positions of the tokens that could not be drawn.
    """
    heat, nucleus = checked_sampling(temperature, top_p)
    requests = request_keys(seed, len(prompts))
    if max_new_tokens == 0:
        return
    logits, cache = prefill(network, parameters, cache, prompts)
    stops = padded_stops(stop_token_ids)
    stopped = network.put(np.full((len(prompts),), RUNNING, np.int32), "B")
    drawing = (requests, *(np.full(len(prompts), value) for value in (heat, nucleus)))
    drawing = tuple(network.put(each, "B") for each in drawing)
    for step in range(max_new_tokens):
        token, logits, stopped, cache = steps.decode(
            network, parameters, cache, logits, *drawing, stopped, stops
        )
        drawn = np.asarray(token)
        if broken := np.flatnonzero(drawn == NO_TOKEN).tolist():
            places = "; ".join(f"row {row}, position {len(prompts[row]) + step}" for row in broken)
            raise FloatingPointError(f"logits are not finite numbers, no token can be drawn: {places}")
        yield drawn
        if stop_token_ids and np.isin(drawn, stop_token_ids).all():  # `stopped`, where other hosts hold it
            return


def padded_stops(stop_token_ids: Sequence[int]) -> jax.Array:
    """i32[n], n a positive multiple of STOPS_GROUP, filled up with what no row can draw."""
    padding = STOPS_GROUP - len(stop_token_ids) % STOPS_GROUP
    return jnp.asarray([*stop_token_ids, *[RUNNING] * padding], jnp.int32)
