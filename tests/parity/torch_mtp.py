"""The MTP block (depth 1) composed from transformers' parts; transformers itself drops this block on load.

Given the backbone's streams after the last layer, before collapse and final norm:

    x0      = broadcast over streams(E_proj rms(embed(next token); enorm)) + H_proj rms(streams; hnorm)
    x1      = one block of its own: window attention, learned routing, own mHC maps
    logits2 = head(rms(collapse(x1; own maps); own norm))          predicts the token after the next
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_jax.config import ModelConfig
from tests.parity.extraction import array, block_params, head_params, stack_leaves
from tests.parity.oracle import Oracle, randomize, transformers_config


class TorchMtp(torch.nn.Module):
    """One MTP block with random, telling weights; embedding and head are the oracle's."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        one_layer = dataclasses.replace(
            config, attention_kinds=("window",), router_kinds=("learned",), num_nextn_predict_layers=0
        )
        self.config, made = config, transformers_config(one_layer)
        made._experts_implementation = "eager"
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = modeling.DeepseekV4RMSNorm(width, eps)
        self.hnorm = modeling.DeepseekV4RMSNorm(width, eps)
        self.e_proj = torch.nn.Linear(width, width, bias=False)
        self.h_proj = torch.nn.Linear(width, width, bias=False)
        self.block = modeling.DeepseekV4DecoderLayer(copy.deepcopy(made), 0)
        self.hc_head = modeling.DeepseekV4HyperHead(made)
        self.norm = modeling.DeepseekV4RMSNorm(width, eps)
        self.rotary = modeling.DeepseekV4RotaryEmbedding(made)
        randomize(self, config, torch.Generator().manual_seed(seed + 1000))

    @torch.no_grad()
    def forward(self, oracle: Oracle, streams: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Streams float32 [B, T, N, D] and ids int [B, T] -> float32 [B, T - 1, V].

        Row t pairs the stream state of token t with token t + 1 and predicts token t + 2.
        """
        following = torch.as_tensor(ids).long()[:, 1:]
        state = torch.as_tensor(streams)[:, :-1]
        e = self.e_proj(self.enorm(oracle.model.model.embed_tokens(following)))
        x = e.unsqueeze(2) + self.h_proj(self.hnorm(state))
        position = torch.arange(x.shape[1])[None]
        distance = position[0][:, None] - position[0][None, :]
        hidden = (distance < 0) | (distance >= self.config.sliding_window)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[None, None]
        x = self.block(
            x,
            input_ids=following,
            position_embeddings={"main": self.rotary(x, position, layer_type="main")},
            position_ids=position,
            attention_mask=mask,
            past_key_values=None,
        )
        return oracle.model.lm_head(self.norm(self.hc_head(x))).numpy()

    def params(self) -> dict[str, Any]:
        """The `mtp/0` part of our parameter tree."""
        return {
            "e_proj": array(self.e_proj.weight),
            "h_proj": array(self.h_proj.weight),
            "enorm": array(self.enorm.weight),
            "hnorm": array(self.hnorm.weight),
            "norm": array(self.norm.weight),
            "hc_head": head_params(self.hc_head, self.config),
            "block": stack_leaves([block_params(self.block, self.config)]),
        }
