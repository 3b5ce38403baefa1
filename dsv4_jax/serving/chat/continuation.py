"""One running text: what is asked for next usually begins with what its cache holds already."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dsv4_jax.arguments import capacity
from dsv4_jax.inference import generate, steps
from dsv4_jax.inference.sampling import NO_TOKEN, checked_sampling, request_keys
from dsv4_jax.model.geometry import allocated_length

if TYPE_CHECKING:
    from dsv4_jax.language_model import LanguageModel
    from dsv4_jax.model.cache import Cache


class Continuation:
    """Continues prompts, one after the other, and computes only what the cache does not hold.

    The cache is used again where a prompt begins with everything that it holds: the last prompt and the
    tokens that were drawn. Otherwise, as after reasoning that the next prompt leaves out, it is filled anew.

    Attributes:
        num_reused: tokens of the last prompt that were in the cache.
    """

    def __init__(self, model: "LanguageModel") -> None:
        self.num_reused = 0
        self._model = model
        self._cache: Cache | None = None
        self._held: list[int] = []
        self._room = 0

    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, *, temperature: float, top_p: float, seed: int
    ) -> Iterator[int]:
        """Yields new ids, the stop token included; the tokens are those of `LanguageModel.stream_ids`.

        Args:
            prompt: ids, at least one.
            max_new_tokens: at most this many.
            temperature, top_p, seed: of the draws.

        Raises:
            ValueError: for a prompt that is too long for the model, or sampling values out of their range.
            FloatingPointError: for logits that are no numbers.
        """
        model = self._model
        heat, nucleus = checked_sampling(temperature, top_p)
        needed = capacity(len(prompt) + max_new_tokens, model.config)
        cache, held = self._cache, self._held
        self._cache, self._held = None, []  # the cache is consumed: a fault below must not leave it here
        if (
            cache is None
            or needed > self._room
            or list(prompt[: len(held)]) != held
            or len(prompt) == len(held)
        ):
            self._room = allocated_length(model.config, needed)  # all that its arrays hold
            cache, held = model.new_cache(1, self._room), []
        self.num_reused = len(held)
        put = model.network.put
        logits, cache = generate.prefill(model.network, model.parameters, cache, [prompt[len(held) :]])
        held = list(prompt)
        self._cache, self._held = cache, held
        stop_ids = model.stop_token_ids
        stops, stopped = generate.padded_stops(stop_ids), put(np.full((1,), steps.RUNNING, np.int32), "B")
        drawing = [
            put(each, "B") for each in (request_keys([seed], 1), np.full(1, heat), np.full(1, nucleus))
        ]
        for _ in range(max_new_tokens):
            self._cache = None
            token, logits, stopped, cache = steps.decode(
                model.network, model.parameters, cache, logits, *drawing, stopped, stops
            )
            drawn = int(np.asarray(jax.device_get(token))[0])
            if drawn == NO_TOKEN:
                raise FloatingPointError(
                    f"logits are not finite numbers, no token can be drawn at position {len(held)}"
                )
            held.append(drawn)
            self._cache = cache
            yield drawn
            if drawn in stop_ids:
                return
