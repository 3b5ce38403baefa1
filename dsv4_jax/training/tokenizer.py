"""A byte-level BPE tokenizer learnt from the corpus, in the file format DeepSeek ships (tokenizer.json)."""

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv4_jax.config.quantities import integer_problem
from dsv4_jax.errors import ConfigError

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
