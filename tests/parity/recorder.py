"""Forward hooks on a transformers DeepSeek-V4: what its parts computed and decided in one forward."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from dsv4_jax.config import ModelConfig
from tests.parity.extraction import LAYER_TYPES, array

UNUSED_PICK = -1
"""Fill value of top-k slots without an entry in transformers' indexer."""


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
        swiglu: "routed" / "shared" -> shares of (gates above the limit, ups above it, ups below minus it).
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


class Recorder:
    """Writes down routing, picks, streams, clamping and mixing matrices while `attached`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.streams: list[np.ndarray] = []
        self.routing: dict[int, np.ndarray] = {}
        self.picks: dict[int, np.ndarray] = {}
        self.routing_margin = self.pick_margin = math.inf
        self.swiglu: dict[str, list[np.ndarray]] = {"routed": [], "shared": []}
        self.combs: list[np.ndarray] = []

    def attached(self, model: DeepseekV4ForCausalLM) -> "Attached":
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
        return Attached(handles)

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
        picked.scatter_(-1, torch.where(out == UNUSED_PICK, scores.shape[2], out), True)
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


class Attached:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()
