"""The kinds of layers and of routers, YaRN's and DSpark's numbers: what a `ModelConfig` is made of."""

import dataclasses
from typing import Literal

AttentionKind = Literal["window", "csa", "hca"]
RouterKind = Literal["hash", "learned"]


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension of the compressed layers' RoPE (official values: 16, 32, 1 and 65536).

    The attention temperature of YaRN is never applied (attention_factor = 1).
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


DSPARK_STAGES = 3
"""Blocks of a DSpark draft head. No key of config.json says so: `num_nextn_predict_layers` does not."""


@dataclasses.dataclass(frozen=True)
class DSpark:
    """The draft head of the 0731 and 0813 releases (`dspark_*` keys of config.json)."""

    block_size: int  # drafts of one pass; the weights do not depend on it
    noise_token_id: int  # fills the unknown slots of a block
    target_layer_ids: tuple[int, ...]  # whose output streams it reads, in this order
    markov_rank: int  # Mr
