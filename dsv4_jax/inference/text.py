"""Text in, text out: which ids a prompt becomes, and which text drawn ids become while they arrive.

The one place that decides it, for Python callers and the command line alike:

- A prompt gets one BOS id in front, unless its text begins with BOS already, as V4's chat encoder writes it.
- Names of special tokens in a prompt become their ids (that is how a chat prompt is written). Do not join
  text of strangers into a prompt without removing such names.
- Special tokens that the model draws are not shown.
"""

import copy
from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""

MAX_UNFINISHED = 3
"""A character has at most 4 bytes, so an unfinished one shows as at most 3 replacements."""

KEPT = 8
"""Ids kept as context when older ones are dropped: an unfinished character and what is before it."""


def prompt_ids(tokenizer: Tokenizer, text: str, bos_token_id: int | None) -> list[int]:
    """The ids of a whole prompt, with one BOS in front if the model has one.

    A tokenizer.json may ask for truncation or padding, which belong to training batches: a prompt is
    neither cut nor filled up.
    """
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if bos_token_id is None or ids[:1] == [bos_token_id]:
        return ids
    return [bos_token_id, *ids]


class TextStream:
    """Decodes ids one at a time; the pieces together are the text of all ids decoded at once.

    The work for an id does not depend on how many came before: only the last few are decoded again, which
    is enough because UTF-8 finds its characters again from any byte. (`tokenizers.decoders.DecodeStream`
    keeps everything since the last whole character, without end if none comes, and drops an unfinished one.)
    A byte-level decoder, as all of V4's, gives exactly the same text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._hidden = {token.content for token in added if token.special} | {None}
        self._ids: list[int] = []
        self._shown = 0  # characters of the text of `_ids` that were given out

    def add(self, token_id: int) -> str:
        """The characters that this id completes; "" if there are none."""
        if self._tokenizer.id_to_token(token_id) in self._hidden:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        settled = len(text)
        while settled > max(len(text) - MAX_UNFINISHED, 0) and text[settled - 1] == REPLACEMENT:
            settled -= 1
        piece = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        if len(self._ids) >= 2 * KEPT:
            self._ids = self._ids[-KEPT:]
            self._shown += len(self._decode(self._ids)) - len(text)
        return piece

    def finish(self) -> str:
        """What is left at the end: replacements of a character that never became whole, or ""."""
        rest = self._decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
