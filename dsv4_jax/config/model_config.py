"""`ModelConfig`: what a checkpoint says about its model."""

import dataclasses

from dsv4_jax.config.kinds import AttentionKind, DSpark, RouterKind, Yarn
from dsv4_jax.config.rules import field_problems
from dsv4_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one DeepSeek-V4 model. Field names follow the official `config.json`.

    There are no defaults for what a checkpoint determines. `config.rules.field_problems` is run on
    construction, and every broken rule is reported at once.

    Raises:
        ConfigError: a field breaks a rule of `config.rules`.
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
    dspark: DSpark | None = None  # draft head; a checkpoint has this or MTP blocks

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        problems = field_problems(values)
        if problems:
            raise ConfigError("this ModelConfig contradicts itself", problems)

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
