"""From drawn tokens to what a caller sees: text without stop texts, log-probabilities, why it ended."""

import dataclasses

from tokenizers import Tokenizer

from dsv4_jax.inference.text import TextStream
from dsv4_jax.serving.chat.stops import StopStrings
from dsv4_jax.serving.decode import Drawn
from dsv4_jax.serving.requests import FinishReason, Output, Sampling, TokenLogprob


@dataclasses.dataclass(frozen=True)
class Shown:
    """What one token adds, and how the answer ended with it, if it did."""

    output: Output
    by_text: bool = False  # a stop text ended it: the device does not know


class AnswerText:
    """The text of one answer, token by token.

    Args:
        tokenizer: None gives no text. sampling: its stop texts and its length. stops: token ids that end it.
    """

    def __init__(self, tokenizer: Tokenizer | None, sampling: Sampling, stops: frozenset[int]) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._texts = StopStrings(sampling.stop)
        self._stops, self._most = stops, sampling.max_tokens
        self._count = 0

    def add(self, token: int) -> Shown:
        """Takes the next token, which may be the last."""
        self._count += 1
        is_stop = token in self._stops
        text, found = "", None
        if self._stream is not None and not is_stop:
            text, found = self._texts.add(self._stream.add(token))
        by_text = found is not None
        reason: FinishReason | None = "stop" if is_stop or by_text else None
        if reason is None and self._count >= self._most:
            reason = "length"
        if reason is not None and not by_text:
            text += self._rest()
        return Shown(Output((token,), text, finish_reason=reason), by_text)

    def _rest(self) -> str:
        """What was held back, at the end."""
        if self._stream is None:
            return ""
        text, found = self._texts.add(self._stream.finish())
        return text + self._texts.flush() if found is None else text


def logprob(drawn: Drawn, slot: int, place: int, wanted: int | None) -> tuple[TokenLogprob, ...]:
    """Of a token that a slot drew, from arrays of the host; () if it was not asked for."""
    if wanted is None:
        return ()
    at = (slot, place)
    ids, logprobs = (row[at][:wanted].tolist() for row in (drawn.likeliest, drawn.likeliest_logprobs))
    pairs = tuple(zip(ids, logprobs, strict=True))
    return (TokenLogprob(int(drawn.token[at]), float(drawn.logprob[at]), pairs),)
