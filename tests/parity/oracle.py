"""The parity oracle: transformers' DeepSeek-V4 in eager float32, with weights nothing can hide behind.

`Oracle(config, seed)` builds a random `DeepseekV4ForCausalLM` for one of our `ModelConfig`s and records
what its parts decide. Every tensor is drawn so that a wrong use of it moves the logits: norms are not one,
biases and sinks are not zero, the mHC mixing matrices are far from symmetric, every hash row lists distinct
experts, and the SwiGLU inputs go beyond the clamp in routed and shared experts.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_jax.config import ModelConfig
from tests.parity.extraction import LAYER_TYPES, model_params
from tests.parity.recorder import Capture, Recorder

torch.set_num_threads(1)  # matrices of a few rows: more threads only fight over the cores

ROUTER_TYPES = {"hash": "hash_moe", "learned": "moe"}


def transformers_config(config: ModelConfig) -> DeepseekV4Config:
    """Our config in transformers' words, written out by hand (not by `dsv4_jax.config.io`)."""
    # transformers computes int(head_dim * factor); the half keeps odd head widths from rounding down.
    partial = (config.qk_rope_head_dim + 0.5) / config.head_dim
    if config.qk_rope_head_dim == config.head_dim:
        partial = 1.0
    rope = {
        "main": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": partial,
        },
        "compress": {
            "rope_type": "yarn",
            "rope_theta": config.compress_rope_theta,
            "partial_rotary_factor": partial,
            "factor": config.yarn.factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "attention_factor": 1.0,
        },
    }
    made = DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        q_lora_rank=config.q_lora_rank,
        num_experts_per_tok=config.num_experts_per_tok,
        n_routed_experts=config.n_routed_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        max_position_embeddings=config.max_position_embeddings,
        layer_types=[LAYER_TYPES[kind] for kind in config.attention_kinds],
        compress_rates={LAYER_TYPES["csa"]: config.csa_ratio, LAYER_TYPES["hca"]: config.hca_ratio},
        mlp_layer_types=[ROUTER_TYPES[kind] for kind in config.router_kinds],
        hc_mult=config.hc_mult,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        swiglu_limit=config.swiglu_limit,
        sliding_window=config.sliding_window,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        index_n_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_topk=config.index_topk,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=None,
        eos_token_id=None,
        partial_rotary_factor=partial,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert made.qk_rope_head_dim == config.qk_rope_head_dim, made.qk_rope_head_dim
    return made


@torch.no_grad()
def randomize(module: torch.nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Overwrites every parameter and buffer-held weight of a transformers module with telling values."""

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    def gain(name: str) -> float:
        """Standard deviation of an output for unit inputs, by the parameter's name."""
        if ".experts.gate_up_proj" in name or ".shared_experts.gate_proj" in name:
            return 7.0  # beyond +-swiglu_limit = 10 in about one of seven
        if ".shared_experts.up_proj" in name:
            return 7.0
        if ".experts.down_proj" in name or ".shared_experts.down_proj" in name:
            return 0.05
        return 1.5 if name.endswith(("mlp.gate.weight", "lm_head.weight")) else 1.0

    for name, tensor in list(module.named_parameters()) + list(module.named_buffers()):
        last = name.rsplit(".", 1)[-1]
        if last.endswith("inv_freq"):
            continue
        if last == "tid2eid":
            tensor.copy_(hash_table(config, generator))
        elif last == "e_score_correction_bias":
            normal(tensor, 0.3)
        elif last == "sinks":
            normal(tensor, 1.5)
        elif last == "position_bias":
            normal(tensor, 1.0)
        elif last in ("fn", "hc_fn"):
            normal(tensor, 1.0 / math.sqrt(tensor.shape[-1]))
        elif last in ("base", "hc_base"):
            normal(tensor, 1.0)
        elif last in ("scale", "hc_scale"):
            uniform(tensor, 0.6, 1.4)
        elif "norm" in name and tensor.ndim == 1:
            uniform(tensor, 0.5, 1.5)
        elif "embed_tokens" in name:
            normal(tensor, 1.0)
        else:
            assert tensor.ndim >= 2, (name, tuple(tensor.shape))
            normal(tensor, gain(name) / math.sqrt(tensor.shape[-1]))


def hash_table(config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """int64 [V, Ke]: distinct experts in every row, in no particular order."""
    draws = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
    return draws.argsort(-1)[:, : config.num_experts_per_tok]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Greedy choices and the smallest gap between the two best logits among them."""

    tokens: list[int]
    margin: float


class Oracle:
    """A random transformers model for `config` (float32, eager) and its weights in our parameter tree."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self.model = DeepseekV4ForCausalLM(transformers_config(config)).float().eval()
        assert self.model.config._attn_implementation == "eager"
        randomize(self.model, config, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """One forward without a cache: int [B, T] -> float32 [B, T, V]."""
        return self.model(torch.as_tensor(ids).long(), use_cache=False).logits.numpy()

    @torch.no_grad()
    def capture(self, ids: np.ndarray) -> Capture:
        """One forward without a cache, with everything the parts decided."""
        seen = Recorder(self.config)
        with seen.attached(self.model):
            out = self.model(torch.as_tensor(ids).long(), use_cache=False)
        shape = tuple(ids.shape)
        return Capture(
            logits=out.logits.numpy(),
            streams=seen.streams,
            routing={k: np.sort(v.reshape(*shape, -1), -1) for k, v in seen.routing.items()},
            routing_margin=seen.routing_margin,
            picks=seen.picks,
            pick_margin=seen.pick_margin,
            swiglu={k: np.mean(v, axis=0) for k, v in seen.swiglu.items()},
            combs=np.stack(seen.combs),
        )

    def greedy_choices(self, prompt: list[int], continuation: list[int]) -> Greedy:
        """What a forward without a cache would choose at each step of `continuation`.

        Later tokens change nothing before them, so one forward over the whole sequence shows every step: if
        the choices equal the continuation, it is the greedy one.
        """
        rows = self.logits(np.array([prompt + continuation]))[0, len(prompt) - 1 : -1]
        best = np.sort(rows, -1)
        return Greedy(rows.argmax(-1).tolist(), float((best[:, -1] - best[:, -2]).min()))

    @torch.no_grad()
    def greedy_cached(self, prompt: list[int], count: int) -> list[int]:
        """Greedy continuation by transformers' own `generate` and cache."""
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logits_cached(self, ids: np.ndarray, chunks: list[int]) -> np.ndarray:
        """Logits through transformers' cache, fed `chunks` tokens at a time."""
        ids, past, start, parts = torch.as_tensor(ids).long(), None, 0, []
        for size in chunks:
            out = self.model(ids[:, start : start + size], past_key_values=past, use_cache=True)
            past, start = out.past_key_values, start + size
            parts.append(out.logits)
        assert start == ids.shape[1]
        return torch.cat(parts, 1).numpy()

    def params(self) -> dict[Any, Any]:
        """The weights as our nested parameter dict, without `mtp` (see `extraction`)."""
        return model_params(self.model, self.config)
