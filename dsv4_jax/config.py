"""What a checkpoint says about its model: one frozen `ModelConfig`, presets, and the layer plan.

Dimension legend of the whole repository (values: Flash / Pro):

    B   batch rows                       T   tokens in this call
    L   layers, 43 / 61                  R   repeats of a scanned unit (leading parameter axis)
    N   residual streams, 4              D   hidden size, 4096 / 7168
    V   vocabulary, 129280               W   sliding window, 128
    H   query heads, 64 / 128            Dh  head width, 512        Dr  rotary width (last), 64
    G   output groups, 8 / 16            J   heads in a group, H / G
    Q   query latent rank, 1024 / 1536   O   output rank of a group, 1024
    m   compression ratio, 4 / 128       w   compressor branches: 2 (CSA) or 1 (HCA)
    S   compressed entries               Dc  compressor width, Dh or Di
    Hi  indexer heads, 64                Di  indexer head width, 128
    Ki  indexer top-k, 512 / 1024        E   routed experts, 256 / 384
    Ke  active experts, 6                F   expert width, 2048 / 3072
"""

import dataclasses
import functools
from typing import Literal

AttentionKind = Literal["window", "csa", "hca"]
RouterKind = Literal["hash", "learned"]


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension of the compressed layers' RoPE (`spec` values in the defaults of the report).

    The attention temperature of YaRN is never applied (attention_factor = 1).
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one DeepSeek-V4 model. Field names follow the official `config.json`.

    There are no defaults for what a checkpoint determines. `config_rules.config_problems` is run on
    construction, and every broken rule is reported at once.

    Raises:
        ConfigError: a field breaks a rule of `config_rules`.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    num_attention_heads: int  # H
    head_dim: int  # Dh
    qk_rope_head_dim: int  # Dr
    q_lora_rank: int  # Q
    o_groups: int  # G
    o_lora_rank: int  # O
    sliding_window: int  # W
    attention_kinds: tuple[AttentionKind, ...]  # one a layer
    router_kinds: tuple[RouterKind, ...]  # one a layer
    csa_ratio: int  # m of CSA layers (their compressor overlaps)
    hca_ratio: int  # m of HCA layers
    rope_theta: float  # window layers, no YaRN
    compress_rope_theta: float  # CSA and HCA layers, with YaRN
    yarn: Yarn
    index_n_heads: int  # Hi
    index_head_dim: int  # Di
    index_topk: int  # Ki
    n_routed_experts: int  # E
    num_experts_per_tok: int  # Ke
    moe_intermediate_size: int  # F
    routed_scaling_factor: float  # gamma_r
    swiglu_limit: float  # c; 0 = no clamp
    hc_mult: int  # N
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_nextn_predict_layers: int  # MTP blocks, 0 or 1
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int | tuple[int, ...] | None  # any of several ends a text
    initializer_range: float

    def __post_init__(self) -> None:
        # Here, not at the top: the rules speak of the kinds and classes defined in this module.
        from dsv4_jax import config_rules, errors

        problems = config_rules.config_problems(self)
        if problems:
            raise errors.ConfigError("this ModelConfig contradicts itself", problems)

    @property
    def num_hidden_layers(self) -> int:
        """L, without the MTP block."""
        return len(self.attention_kinds)

    @property
    def heads_per_group(self) -> int:
        """J = H / G."""
        return self.num_attention_heads // self.o_groups

    def ratio(self, kind: AttentionKind) -> int:
        """Tokens per compressed entry of a layer kind; 0 for window layers."""
        return {"window": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[kind]

    def branches(self, kind: AttentionKind) -> int:
        """w, blocks of tokens that a compressor pools for an entry: CSA's overlap; 0 for window layers."""
        return {"window": 0, "csa": 2, "hca": 1}[kind]


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """`repeats` copies of a unit of consecutive layers; parameters carry a leading axis of that size."""

    first_layer: int
    kinds: tuple[tuple[AttentionKind, RouterKind], ...]  # the unit: (attention, router) of each layer
    repeats: int

    def layer_index(self, block: int, repeat: int) -> int:
        """Layer number in the model of unit position `block` in copy `repeat`."""
        return self.first_layer + repeat * len(self.kinds) + block


MIN_SCANNED_REPEATS = 4
"""Shorter runs are plain layers: a scan slices (on a CPU: copies) each layer's weights out of the stack."""


@functools.lru_cache(maxsize=64)
def layer_stacks(config: ModelConfig) -> tuple[LayerStack, ...]:
    """Splits the layers into runs of a repeating unit, longest first from the left.

    Flash: two window layers, one CSA layer, 20 x (HCA, CSA). Pro: two HCA, one CSA, 29 x (HCA, CSA).
    """
    kinds = tuple(zip(config.attention_kinds, config.router_kinds, strict=True))
    stacks, start = [], 0
    while start < len(kinds):
        best = (1, 1)  # (unit length, repeats)
        for unit in range(1, (len(kinds) - start) // MIN_SCANNED_REPEATS + 1):
            repeats = 1
            while kinds[start + repeats * unit : start + (repeats + 1) * unit] == kinds[start : start + unit]:
                repeats += 1
            if repeats >= MIN_SCANNED_REPEATS and unit * repeats > best[0] * best[1]:
                best = (unit, repeats)
        unit, repeats = best
        stacks.append(LayerStack(start, kinds[start : start + unit], repeats))
        start += unit * repeats
    return tuple(stacks)


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
    from dsv4_jax.quantities import integer_problem  # which speaks of the rules of this module

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
