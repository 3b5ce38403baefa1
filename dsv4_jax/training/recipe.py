"""What the quickstart trains, and for how many steps."""

import dataclasses

from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.optimizer import AdamW


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its hyperparameters, sized for a number of steps a minute."""

    config: ModelConfig
    policy: Policy
    batch_size: int  # B
    seq_len: int  # T
    peak_learning_rate: float
    warmup_fraction: float  # of the steps
    corpus_bytes: int  # at most
    validation_batches: int  # at most, spread over the validation text
    setup_minutes: float  # everything but training steps
    steps_per_minute: int
    min_steps: int = 20
    optimizer: AdamW = AdamW()


def planned_steps(minutes: float, recipe: Recipe) -> int:
    """Steps that fit into `minutes`: a fixed rule, so that the same command gives the same model anywhere."""
    return max(recipe.min_steps, round((minutes - recipe.setup_minutes) * recipe.steps_per_minute))


QUICKSTART = Recipe(
    config=tiny(
        4,
        vocab_size=2048,
        hidden_size=128,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        attention_kinds=("window", "csa", "hca"),
        router_kinds=("hash", "learned", "learned"),
        index_n_heads=4,
        index_head_dim=32,
        index_topk=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        initializer_range=0.05,
    ),
    policy=Policy.of("float32"),
    batch_size=4,
    seq_len=256,
    peak_learning_rate=4e-3,
    warmup_fraction=0.05,
    corpus_bytes=5_000_000,
    validation_batches=12,
    setup_minutes=1.5,
    steps_per_minute=90,
)
"""Calibrated on two CPU cores without AVX-512; faster machines finish sooner."""
