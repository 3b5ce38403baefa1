"""Log-probabilities of the tokens of a prompt, for `echo` with `logprobs`: a chunk at a time."""

import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from dsv4_jax.language_model import LanguageModel
from dsv4_jax.serving.requests import MOST_LOGPROBS, TokenLogprob


@jax.jit
def _scored(
    logits: Float32[Array, "1 T V"], following: Int32[Array, "T"]
) -> tuple[Float32[Array, "T"], Int32[Array, "T k"], Float32[Array, "T k"]]:
    logprobs = jax.nn.log_softmax(logits[0], axis=-1)
    best, ids = jax.lax.top_k(logprobs, min(MOST_LOGPROBS, logits.shape[-1]))
    return jnp.take_along_axis(logprobs, following[:, None], axis=1)[:, 0], ids.astype(jnp.int32), best


class PromptScores:
    """Scores prompts of one model; one at a time, in the caller's thread.

    The programs have one shape, so that nothing is compiled after the first call; memory is one row of the
    cache and the logits of one chunk.

    Args:
        lm: the model. max_length: longest prompt. chunk: tokens at once.
    """

    def __init__(self, lm: LanguageModel, max_length: int, chunk: int) -> None:
        self._lm, self._max_length, self._chunk = lm, max_length, chunk
        self._lock = threading.Lock()

    def score(self, ids: Sequence[int]) -> list[TokenLogprob | None]:
        """For each token its log-probability after those before it, and the likeliest there; the first has
        None.

        Raises:
            ValueError: for an empty or too long prompt, or ids outside the vocabulary.
            FloatingPointError: if the logits are no numbers.
        """
        if not 1 <= len(ids) <= self._max_length:
            raise ValueError(f"a prompt of {len(ids)} tokens must have 1 to {self._max_length}")
        with self._lock:
            return self._score(ids)

    def _score(self, ids: Sequence[int]) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None]
        cache: Any = self._lm.new_cache(1, self._max_length)
        for start in range(0, len(ids), self._chunk):
            piece = ids[start : start + self._chunk]
            following = ids[start + 1 : start + 1 + len(piece)]
            tokens = np.zeros((1, self._chunk), np.int32)
            tokens[0, : len(piece)] = piece
            targets = np.zeros(self._chunk, np.int32)
            targets[: len(following)] = following
            logits, cache = self._lm.extend(cache, tokens, np.array([len(piece)], np.int32))
            scores, likeliest, best = jax.device_get(_scored(logits, targets))
            if not np.isfinite(best[: len(piece), 0]).all():
                raise FloatingPointError("the logits are not finite numbers")
            for row, token in enumerate(following):
                pairs = tuple(zip(likeliest[row].tolist(), best[row].tolist(), strict=True))
                found.append(TokenLogprob(int(token), float(scores[row]), pairs))
        return found
