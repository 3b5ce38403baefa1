"""A byte-level BPE tokenizer learnt from the corpus, in the file format DeepSeek ships (tokenizer.json)."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv4_jax.config.quantities import integer_problem
from dsv4_jax.errors import ConfigError
from dsv4_jax.training.fill_in_the_middle import FillInTheMiddle

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
BOS_ID, EOS_ID = 0, 1
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE merges; every byte string can be encoded and decoded back exactly.

    The same texts in the same order give the same tokenizer. Id 0 is the begin and id 1 the end of a
    document.

    Args:
        texts: training text only (merges learnt from validation files would leak into the comparison).
        vocab_size: V; the result has fewer entries if the text runs out of pairs to merge.

    Raises:
        ConfigError: if `vocab_size` cannot hold the 256 bytes and the two special tokens.
    """
    if problem := integer_problem("vocab_size", vocab_size, NUM_BYTES + 2):
        raise ConfigError("cannot train a tokenizer", [f"{problem} (all bytes, bos, eos)"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids int32[num_tokens + 2] of each text: bos, the text, eos.

    A text that spells out the name of a special token gets the tokens of its characters, not that id.
    """
    tokenizer.encode_special_tokens = True  # a switch of this object; not part of tokenizer.json
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = False
    return [np.asarray([BOS_ID, *encoding.ids, EOS_ID], np.int32) for encoding in encodings]


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without its added tokens: whatever a text spells, it gets ordinary tokens only.

    `encode_special_tokens` is no substitute: it leaves added tokens that are not marked special, among them
    the role tags of the released models, to whoever writes their names into a text.
    """
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(description))


class TextEncoder:
    """Texts to documents: begin, the text, end. Encoding changes nothing, so threads may share it.

    Args:
        tokenizer: has the special tokens `BOS` and `EOS`.
        middle: tells some of the documents out of order; None: none.

    Raises:
        ConfigError: special tokens that the tokenizer lacks, or a rate that is none; all problems at once.
    """

    def __init__(self, tokenizer: Tokenizer, middle: FillInTheMiddle | None = None) -> None:
        problems = [
            f"the tokenizer has no token {name!r}"
            for name in (BOS, EOS)
            if tokenizer.token_to_id(name) is None
        ]
        problems += [] if middle is None else middle.problems(tokenizer)
        if problems:
            raise ConfigError("this tokenizer cannot encode training documents", problems)
        self._ids = tokenizer.token_to_id
        self._literal = literal(tokenizer)
        self._middle = middle

    def control(self, name: str) -> int | None:
        """The id of a special token; None if the tokenizer has none of this name."""
        return self._ids(name)

    def plain(self, text: str) -> list[int]:
        """Ids of a text, of ordinary tokens only. Raises UnicodeEncodeError for a lone surrogate."""
        text.encode()  # the tokenizer's own complaint about surrogates does not name them
        return self._literal.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def document(self, text: str, draw: np.random.Generator) -> np.ndarray:
        """i32[n]: begin, the text, end, or with the parts of the text in the order prefix, suffix, middle.

        `draw` decides whether and where the text is cut.
        """
        parts = None if self._middle is None else self._middle.parts(text, draw)
        if parts is None or self._middle is None:
            ids = self.plain(text)
        else:
            prefix, middle, suffix = map(self.plain, parts)
            begin, hole, end = (self._ids(name) for name in self._middle.names)
            ids = [begin, *prefix, hole, *suffix, end, *middle]
        return np.asarray([self._ids(BOS), *ids, self._ids(EOS)], np.int32)
