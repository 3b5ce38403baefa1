"""The kinds of layers and of routers, and YaRN's numbers: what a `ModelConfig` is made of."""

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
