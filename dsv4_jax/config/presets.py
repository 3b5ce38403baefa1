"""The released models as configurations, and a tiny one that has every feature."""

import dataclasses
from typing import Literal

from dsv4_jax.config.kinds import Yarn
from dsv4_jax.config.model_config import ModelConfig
from dsv4_jax.config.quantities import integer_problem


def _schedule(*runs: tuple[str, int]) -> tuple[str, ...]:
    return tuple(kind for kinds, count in runs for _ in range(count) for kind in kinds.split())


def v4_flash() -> ModelConfig:
    """DeepSeek-V4-Flash: 43 layers, 284B parameters, 13B active (report, section 4.2)."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=4096,
        num_attention_heads=64,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1024,
        o_groups=8,
        o_lora_rank=1024,
        sliding_window=128,
        attention_kinds=_schedule(("window", 2), ("csa hca", 20), ("csa", 1)),
        router_kinds=_schedule(("hash", 3), ("learned", 40)),
        csa_ratio=4,
        hca_ratio=128,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        yarn=Yarn(16.0, 32.0, 1.0, 65536),
        index_n_heads=64,
        index_head_dim=128,
        index_topk=512,
        n_routed_experts=256,
        num_experts_per_tok=6,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
        swiglu_limit=10.0,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        hc_eps=1e-6,
        rms_norm_eps=1e-6,
        num_nextn_predict_layers=1,
        max_position_embeddings=1048576,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.02,
    )


def v4_pro() -> ModelConfig:
    """DeepSeek-V4-Pro: 61 layers, 1.6T parameters, 49B active (report, section 4.2)."""
    return dataclasses.replace(
        v4_flash(),
        hidden_size=7168,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        attention_kinds=_schedule(("hca", 2), ("csa hca", 29), ("csa", 1)),
        router_kinds=_schedule(("hash", 3), ("learned", 58)),
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    )


def tiny(
    num_layers: int = 7,
    *,
    like: Literal["flash", "pro"] = "flash",
    vocab_size: int = 512,
    **overrides: object,
) -> ModelConfig:
    """A small model that keeps every feature: all layer kinds, both routers, MTP, real 4 / 128 ratios.

    Args:
        num_layers: at least 4, so that window (or leading HCA), CSA, HCA, hash and learned layers occur.
        like: whose schedule the first two layers follow (window or HCA).
        vocab_size: V.
        overrides: any `ModelConfig` field.
    """
    problem = integer_problem("num_layers", num_layers, 4)
    if problem:
        raise ValueError(f"{problem}, to hold every layer kind")
    first = "window" if like == "flash" else "hca"
    kinds = [first, first] + ["csa" if i % 2 == 0 else "hca" for i in range(2, num_layers)]
    fields: dict[str, object] = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=16,
        attention_kinds=tuple(kinds),
        router_kinds=_schedule(("hash", 3), ("learned", num_layers - 3)),
        index_n_heads=16,
        index_head_dim=16,
        index_topk=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        max_position_embeddings=65536,
    )
    return dataclasses.replace(v4_flash(), **(fields | overrides))
