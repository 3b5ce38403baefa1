"""The models on which we must agree with transformers: schedules, ratios and sizes that differ on purpose."""

import dataclasses

from dsv4_jax.config import ModelConfig, Yarn, tiny


@dataclasses.dataclass(frozen=True)
class Case:
    """One random model and the tokens it is run on; `seed` draws both."""

    config: ModelConfig
    batch: int
    length: int
    seed: int = 0


SECTION_16: ModelConfig = dataclasses.replace(
    tiny(5),
    attention_kinds=("window", "hca", "csa", "csa", "hca"),
    router_kinds=("hash", "hash", "learned", "learned", "hash"),
    sliding_window=8,
    hca_ratio=8,
    index_topk=3,
)
"""All kinds, a hash layer after learned ones, window 8, ratios 4 and 8."""

IRREGULAR: ModelConfig = dataclasses.replace(
    SECTION_16,
    attention_kinds=("window", "hca", "csa"),
    router_kinds=("hash", "learned", "learned"),
    vocab_size=97,
    hidden_size=45,
    num_attention_heads=6,
    head_dim=23,
    qk_rope_head_dim=6,
    q_lora_rank=19,
    o_groups=3,
    o_lora_rank=7,
    sliding_window=5,
    csa_ratio=2,
    hca_ratio=6,
    yarn=Yarn(factor=4.0, beta_fast=8.0, beta_slow=1.0, original_max_position_embeddings=64),
    max_position_embeddings=256,
    index_n_heads=17,
    index_head_dim=8,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=13,
    hc_mult=3,
)
"""Nothing divides anything; YaRN's ramp lies inside the tested positions."""


def shallow(config: ModelConfig) -> ModelConfig:
    """Two layers are enough where compiling costs more than it shows."""
    return dataclasses.replace(config, attention_kinds=("csa", "hca"), router_kinds=("hash", "learned"))


FLASH: ModelConfig = tiny(
    10,
    attention_kinds=("window", "csa", *("hca", "csa") * 4),
    router_kinds=("hash", "hash", *("learned",) * 8),
    qk_rope_head_dim=16,
)
"""Flash's schedule without its second window layer, which is the first one's program again."""

CASES = {
    # (HCA, CSA) x 4 is one scanned stack. 300 tokens: several query blocks, two HCA entries.
    "flash": Case(FLASH, batch=1, length=300),
    # Window 8 lets early tokens go out of reach of everything but the compressed entries.
    "pro": Case(tiny(4, like="pro", sliding_window=8, routed_scaling_factor=2.5), batch=1, length=261),
    "section16": Case(SECTION_16, batch=2, length=37),
    "irregular": Case(IRREGULAR, batch=2, length=41),
}
