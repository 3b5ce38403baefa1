"""The small models that tests share: every layer kind in as few layers and numbers as the kinds allow.

A test that needs another size says so at its place, as a change of one of these.
"""

import dataclasses

from dsv4_jax.config import ModelConfig, tiny


def all_kinds(**changes: object) -> ModelConfig:
    """Three layers with all three kinds of attention and both routers; `changes` are fields of the config.

    A window of 8, compression by 4 and 16, and 4 chosen entries: some 40 tokens leave the window, complete
    entries of both compressors and give the indexer more of them than it chooses.
    """
    config = dataclasses.replace(
        tiny(),
        vocab_size=61,
        attention_kinds=("window", "csa", "hca"),
        router_kinds=("hash", "learned", "learned"),
        sliding_window=8,
        csa_ratio=4,
        hca_ratio=16,
        index_topk=4,
    )
    return dataclasses.replace(config, **changes)


def compressed_kinds(**changes: object) -> ModelConfig:
    """A CSA and an HCA layer with a router each, for tests of what is around a model: ten tokens use it all.

    300 tokens in the vocabulary leave room for the 256 bytes of a tokenizer and special tokens.
    """
    config = all_kinds(
        vocab_size=300,
        attention_kinds=("csa", "hca"),
        router_kinds=("hash", "learned"),
        sliding_window=4,
        csa_ratio=2,
        hca_ratio=4,
        index_topk=3,
    )
    return dataclasses.replace(config, **changes)
