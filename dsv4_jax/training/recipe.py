"""What the quickstart trains, from which start, and for how many steps."""

import dataclasses

import jax

from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW

OUTPUTS = ("wo_b", "down")
"""The last matrices of a layer's two sublayers, and of the MTP block's: of attention, of routed and of shared
experts."""


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
    optimizer: AdamW | Muon = AdamW()
    zero_outputs: bool = False  # sublayers start by adding nothing: the model is embedding and head at first


def start(recipe: Recipe, seed: int) -> Parameters:
    """A new model as the recipe starts it; `initial_parameters` tells the rest, and which seeds there are.

    V4's initialisation is not published. That the last matrices of the sublayers start at zero is this
    recipe's choice: what it gains is measured by `experiments/quickstart_recipe.py`.
    """
    parameters = initial_parameters(recipe.config, recipe.policy, seed)
    if not recipe.zero_outputs:
        return parameters
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.numpy.zeros_like(leaf) if path[-1].key in OUTPUTS else leaf, parameters
    )


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
    peak_learning_rate=1e-2,
    warmup_fraction=0.05,
    corpus_bytes=5_000_000,
    validation_batches=12,
    setup_minutes=1.5,
    steps_per_minute=65,
    optimizer=Muon(),
    zero_outputs=True,
)
"""Calibrated on two CPU cores without AVX-512; faster machines finish sooner. Optimiser, rate and start are
the best for the same CPU time that `experiments/quickstart_recipe.py` found with the MTP block."""
