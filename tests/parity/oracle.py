"""The parity oracle: transformers' DeepSeek-V4 in eager float32, with weights nothing can hide behind.

`Oracle(config, seed)` builds a random `DeepseekV4ForCausalLM` for one of our `ModelConfig`s and records
what its parts decide. Every tensor is drawn so that a wrong use of it moves the logits: norms are not one,
biases and sinks are not zero, the mHC mixing matrices are far from symmetric, every hash row lists distinct
experts, and the SwiGLU inputs go beyond the clamp in routed and shared experts.

`Oracle.params()` copies the weights tensor by tensor into our parameter tree. It is independent of
`dsv4_jax.checkpoint` on purpose: the two disagree if either is wrong.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_jax.config import ModelConfig, layer_stacks

torch.set_num_threads(1)  # matrices of a few rows: more threads only fight over the cores

LAYER_TYPES = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}
ROUTER_TYPES = {"hash": "hash_moe", "learned": "moe"}
ROUTING_NEVER = -1
"""Fill value of unused top-k slots in transformers' indexer."""


def transformers_config(config: ModelConfig) -> DeepseekV4Config:
    """Our config in transformers' words, written out by hand (not by `dsv4_jax.config_io`)."""
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
class Capture:
    """What one full forward of the oracle did; layers are indices into `streams` from 1 on.

    Attributes:
        logits: float32 [B, T, V].
        streams: L + 1 arrays float32 [B, T, N, D]: embedded input, then the output of every layer.
        routing: layer -> int [B, T, Ke], expert ids sorted within a token.
        routing_margin: smallest gap between the last chosen and the first rejected score (learned layers).
        picks: CSA layer -> bool [B, T, S], True where entry s was selected for query t.
        pick_margin: smallest such gap among indexer scores, where a choice had to be made.
        swiglu: "routed" / "shared" -> (share of gates above the limit, of ups above it, of ups below minus it).
        combs: float32 [sublayers, B, T, N, N].
    """

    logits: np.ndarray
    streams: list[np.ndarray]
    routing: dict[int, np.ndarray]
    routing_margin: float
    picks: dict[int, np.ndarray]
    pick_margin: float
    swiglu: dict[str, np.ndarray]
    combs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Tokens of a greedy continuation and the smallest gap between the two best logits on the way."""

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
        seen = _Recorder(self.config)
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

    @torch.no_grad()
    def greedy_full(self, prompt: list[int], count: int) -> Greedy:
        """Greedy continuation where every step runs the whole sequence again, without a cache."""
        ids, margin = list(prompt), math.inf
        for _ in range(count):
            row = self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
            best = row.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
        return Greedy(ids[len(prompt) :], margin)

    @torch.no_grad()
    def greedy_cached(self, prompt: list[int], count: int) -> list[int]:
        """The same through transformers' own `generate` and cache."""
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
        """The weights as our nested parameter dict (numpy, float32; hash tables int32), without `mtp`."""
        model, config = self.model.model, self.config
        tree: dict[Any, Any] = {
            "embed": array(model.embed_tokens.weight),
            "head": array(self.model.lm_head.weight),
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


class _Recorder:
    """Forward hooks that write down routing, picks, streams, clamping and mixing matrices."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.streams: list[np.ndarray] = []
        self.routing: dict[int, np.ndarray] = {}
        self.picks: dict[int, np.ndarray] = {}
        self.routing_margin = self.pick_margin = math.inf
        self.swiglu: dict[str, list[np.ndarray]] = {"routed": [], "shared": []}
        self.combs: list[np.ndarray] = []

    def attached(self, model: DeepseekV4ForCausalLM) -> "_Attached":
        handles = []
        for index, layer in enumerate(model.model.layers):
            hook = functools.partial(self._router, index)
            handles.append(layer.mlp.gate.register_forward_hook(hook))
            handles.append(layer.mlp.experts.register_forward_hook(self._experts))
            handles.append(layer.mlp.shared_experts.register_forward_hook(self._shared))
            handles.append(layer.attn_hc.register_forward_hook(self._comb))
            handles.append(layer.ffn_hc.register_forward_hook(self._comb))
            handles.append(layer.register_forward_hook(self._layer))
            if layer.self_attn.layer_type == LAYER_TYPES["csa"]:
                indexer = layer.self_attn.compressor.indexer
                handles.append(indexer.scorer.register_forward_hook(self._scores))
                hook = functools.partial(self._indexer, index)
                handles.append(indexer.register_forward_hook(hook))
        return _Attached(handles)

    def _layer(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if not self.streams:
            self.streams.append(array(args[0]))
        self.streams.append(array(out))

    def _comb(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        self.combs.append(array(out[1]))

    def _router(self, layer: int, module: torch.nn.Module, args: Any, out: Any) -> None:
        logits, _, indices = out
        self.routing[layer] = indices.numpy()
        if hasattr(module, "e_score_correction_bias"):
            scores = module.score_fn(logits) + module.e_score_correction_bias
            ranked = scores.sort(-1, descending=True).values
            if module.top_k < module.num_experts:
                gap = ranked[:, module.top_k - 1] - ranked[:, module.top_k]
                self.routing_margin = min(self.routing_margin, float(gap.min()))

    def _scores(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        self._last_scores = out

    def _indexer(self, layer: int, module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        scores, top_k = self._last_scores, module.index_topk
        picked = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)
        picked.scatter_(-1, torch.where(out == ROUTING_NEVER, scores.shape[2], out), True)
        self.picks[layer] = picked[..., :-1].numpy()
        tokens = torch.arange(scores.shape[1])
        visible = torch.arange(scores.shape[2]) < ((tokens + 1) // module.compress_rate)[:, None]
        if scores.shape[2] > top_k:
            ranked = scores.masked_fill(~visible, -math.inf).sort(-1, descending=True).values
            gap = (ranked[..., top_k - 1] - ranked[..., top_k])[:, visible.sum(-1) > top_k]
            if gap.numel():
                self.pick_margin = min(self.pick_margin, float(gap.min()))

    def _clamped(self, gate: torch.Tensor, up: torch.Tensor) -> np.ndarray:
        limit = self.config.swiglu_limit
        shares = [(gate > limit), (up > limit), (up < -limit)]
        return np.array([share.float().mean().item() for share in shares])

    def _shared(self, module: modeling.DeepseekV4MLP, args: Any, out: torch.Tensor) -> None:
        self.swiglu["shared"].append(self._clamped(module.gate_proj(args[0]), module.up_proj(args[0])))

    def _experts(self, module: modeling.DeepseekV4Experts, args: Any, out: torch.Tensor) -> None:
        hidden, chosen, _ = args
        weight = module.gate_up_proj[chosen[:, 0]]  # each token's first expert is sample enough
        gate, up = torch.einsum("td,tfd->tf", hidden, weight).chunk(2, -1)
        self.swiglu["routed"].append(self._clamped(gate, up))


class _Attached:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
