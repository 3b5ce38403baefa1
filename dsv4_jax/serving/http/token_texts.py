"""Tokens as clients see them in lists of log-probabilities: a text, and the exact bytes."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from dsv4_jax.serving.requests import TokenLogprob

SMALLEST = -9999.0
"""Stands for the log-probability of what cannot happen, which JSON cannot write."""


def byte_of_letter() -> dict[str, int]:
    """The letters with which byte-level BPE writes the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(rest)}


_BYTES = byte_of_letter()


class TokenTexts:
    """Texts and bytes of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}

    def bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; of an added token those of its name."""
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        return name.encode()

    def text(self, token: int) -> str:
        """The text of a token; of one that is no whole character `bytes:\\xe4\\xbd`, as OpenAI writes it."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_entry(self, found: TokenLogprob) -> dict[str, Any]:
        """An element of `choices[].logprobs.content` of a chat completion."""
        entry = self._pair(found.token_id, found.logprob)
        return entry | {"top_logprobs": [self._pair(*pair) for pair in found.likeliest]}

    def _pair(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.bytes(token)
        return {"token": self.text(token), "logprob": finite(logprob), "bytes": list(data)}

    def completion_lists(
        self, tokens: Sequence[tuple[int, TokenLogprob | None]], wanted: int, offset: int = 0
    ) -> dict[str, Any]:
        """`choices[].logprobs` of a completion.

        Args:
            tokens: (id, its log-probability, None for the first token of a text, before which is nothing).
            wanted: likeliest tokens a position. offset: characters before the first token.
        """
        lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in tokens:
            text = self.text(token)
            lists["tokens"].append(text)
            lists["text_offset"].append(offset)
            offset += len(text)
            if found is None:
                lists["token_logprobs"].append(None)
                lists["top_logprobs"].append(None)
                continue
            lists["token_logprobs"].append(finite(found.logprob))
            likeliest = dict((self.text(id), finite(each)) for id, each in found.likeliest[:wanted])
            if token not in {id for id, _ in found.likeliest[:wanted]}:
                likeliest.setdefault(text, finite(found.logprob))
            lists["top_logprobs"].append(likeliest)
        return lists


def finite(logprob: float) -> float:
    """A number that JSON can write."""
    return max(float(logprob), SMALLEST)
