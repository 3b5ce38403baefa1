"""Weights of a transformers DeepSeek-V4 copied tensor by tensor into our parameter tree.

Independent of `dsv4_jax.checkpoint` on purpose: the two disagree if either is wrong.
"""

from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_jax.config import ModelConfig, layer_stacks

LAYER_TYPES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


def model_params(whole: DeepseekV4ForCausalLM, config: ModelConfig) -> dict[Any, Any]:
    """The weights as our nested parameter dict (numpy, float32; hash tables int32), without `mtp`."""
    model = whole.model
    tree: dict[Any, Any] = {
        "embed": array(model.embed_tokens.weight),
        "head": array(whole.lm_head.weight),
        "norm": array(model.norm.weight),
        "hc_head": head_params(model.hc_head, config),
        "stacks": {},
    }
    for index, stack in enumerate(layer_stacks(config)):
        blocks = {}
        for block in range(len(stack.kinds)):
            layers = [stack.layer_index(block, repeat) for repeat in range(stack.repeats)]
            blocks[block] = stack_leaves([block_params(model.layers[i], config) for i in layers])
        tree["stacks"][index] = {"blocks": blocks}
    return tree


def array(tensor: torch.Tensor) -> np.ndarray:
    """A detached numpy copy."""
    return tensor.detach().numpy().copy()


def stack_leaves(trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Equal nested dicts -> one nested dict with a new leading axis."""
    return {
        key: stack_leaves([tree[key] for tree in trees])
        if isinstance(value, dict)
        else np.stack([tree[key] for tree in trees])
        for key, value in trees[0].items()
    }


def head_params(head: modeling.DeepseekV4HyperHead, config: ModelConfig) -> dict[str, Any]:
    """Head collapse: fn [N, N, D], base [N], scale [1]."""
    streams = config.hc_mult
    return {
        "fn": array(head.hc_fn).reshape(streams, streams, config.hidden_size),
        "base": array(head.hc_base),
        "scale": array(head.hc_scale),
    }


def block_params(layer: modeling.DeepseekV4DecoderLayer, config: ModelConfig) -> dict[str, Any]:
    """One transformers decoder layer as one block of our tree (without the leading repeats axis)."""
    c, attention, mlp = config, layer.self_attn, layer.mlp
    groups, per_group, width = c.o_groups, c.heads_per_group, c.head_dim

    def hyper(hc: modeling.DeepseekV4HyperConnection) -> dict[str, Any]:
        rows = (2 + c.hc_mult) * c.hc_mult
        fn = array(hc.fn).reshape(rows, c.hc_mult, c.hidden_size)
        return {"fn": fn, "base": array(hc.base), "scale": array(hc.scale)}

    def pooling(compressor: torch.nn.Module, dim: int) -> dict[str, Any]:
        wkv, ape = array(compressor.kv_proj.weight), array(compressor.position_bias)
        wgate = array(compressor.gate_proj.weight)
        return {
            "wkv": wkv.reshape(-1, dim, c.hidden_size),
            "wgate": wgate.reshape(-1, dim, c.hidden_size),
            "ape": ape.reshape(ape.shape[0], -1, dim),
            "norm": array(compressor.kv_norm.weight),
        }

    attn: dict[str, Any] = {
        "wq_a": array(attention.q_a_proj.weight),
        "q_norm": array(attention.q_a_norm.weight),
        "wq_b": array(attention.q_b_proj.weight).reshape(groups, per_group, width, c.q_lora_rank),
        "wkv": array(attention.kv_proj.weight),
        "kv_norm": array(attention.kv_norm.weight),
        "wo_a": array(attention.o_a_proj.weight).reshape(groups, c.o_lora_rank, per_group, width),
        "wo_b": array(attention.o_b_proj.weight).reshape(c.hidden_size, groups, c.o_lora_rank),
        "attn_sink": array(attention.sinks).reshape(groups, per_group),
    }
    if attention.compressor is not None:
        attn["compressor"] = pooling(attention.compressor, width)
    indexer = getattr(attention.compressor, "indexer", None)
    if indexer is not None:
        wq_b = array(indexer.q_b_proj.weight)
        attn["indexer"] = {
            "wq_b": wq_b.reshape(c.index_n_heads, c.index_head_dim, c.q_lora_rank),
            "weights_proj": array(indexer.scorer.weights_proj.weight),
            "compressor": pooling(indexer, c.index_head_dim),
        }
    gate: dict[str, Any] = {"weight": array(mlp.gate.weight)}
    if mlp.is_hash:
        gate["tid2eid"] = array(mlp.gate.tid2eid).astype(np.int32)
    else:
        gate["bias"] = array(mlp.gate.e_score_correction_bias)
    experts, shared, inner = mlp.experts, mlp.shared_experts, c.moe_intermediate_size
    gate_up = array(experts.gate_up_proj).reshape(c.n_routed_experts, 2, inner, c.hidden_size)
    return {
        "attn_norm": array(layer.input_layernorm.weight),
        "ffn_norm": array(layer.post_attention_layernorm.weight),
        "hc_attn": hyper(layer.attn_hc),
        "hc_ffn": hyper(layer.ffn_hc),
        "attn": attn,
        "ffn": {
            "gate": gate,
            "experts": {"gate_up": gate_up, "down": array(experts.down_proj)},
            "shared": {
                "gate_up": np.stack([array(shared.gate_proj.weight), array(shared.up_proj.weight)]),
                "down": array(shared.down_proj.weight),
            },
        },
    }
