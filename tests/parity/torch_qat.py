"""The official quantisation simulation of one layer, composed in torch from the specification.

Real float8 casts, FP4 by nearest neighbour on the written-out grid, scales from frexp; one sequence, one
query at a time, explicit index lists. Shares no code with the model. `on` names the active switches.
"""

import math
from typing import Any

import numpy as np
import torch

from dsv4_jax.config import ModelConfig
from tests.parity.float64_equations import frequencies

torch.set_num_threads(1)  # as in `oracle`: matrices of a few rows

FP4_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def power_of_two(ratio: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2 ratio)."""
    fraction, exponent = torch.frexp(ratio)  # ratio = fraction * 2^exponent, 0.5 <= fraction < 1
    return torch.ldexp(torch.ones_like(ratio), exponent - (fraction == 0.5).int())


def in_groups(x: torch.Tensor, group: int, f) -> torch.Tensor:
    """f over consecutive groups of channels; the last may be smaller."""
    return torch.cat([f(piece) for piece in x.split(group, dim=-1)], dim=-1)


def qdq8(x: torch.Tensor, group: int) -> torch.Tensor:
    def one(piece):
        scale = power_of_two(piece.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)
        return (piece / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return in_groups(x, group, one)


def to_fp4(x: torch.Tensor) -> torch.Tensor:
    size = x.abs().clamp(max=6)
    distance = (size[..., None] - FP4_GRID).abs()
    nearest = distance.min(-1, keepdim=True).values
    tied = distance == nearest
    # Of two equally near points the one with an even code.
    order = torch.where(tied, torch.arange(8) % 2, 9)
    return torch.copysign(FP4_GRID[order.argmin(-1)], x)


def qdq4(x: torch.Tensor) -> torch.Tensor:
    def one(piece):
        scale = power_of_two(piece.abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126) / 6)
        return to_fp4(piece / scale) * scale

    return in_groups(x, 32, one)


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def hadamard(x: torch.Tensor) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < x.shape[-1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return bf16((bf16(x) @ matrix) * x.shape[-1] ** -0.5)


class Official:
    """One model's layers under a set of switches."""

    def __init__(self, config: ModelConfig, on: frozenset[str]) -> None:
        self.config, self.on = config, on

    def act(self, x):
        return qdq8(x, 128) if "act_fp8" in self.on else x

    def entry(self, x):
        if "kv_fp8" not in self.on:
            return x
        still = x.shape[-1] - self.config.qk_rope_head_dim
        return torch.cat([qdq8(x[..., :still], 64), x[..., still:]], -1)

    def index_vector(self, x):
        return qdq4(hadamard(x)) if "idx_hadamard_fp4" in self.on else x

    def score(self, x):
        return bf16(x) if "idx_score_bf16" in self.on else x

    def expert_weight(self, w):
        return qdq4(w) if "expert_fp4" in self.on else w

    def rms(self, x, weight):
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)

    def rope(self, x, position, freqs):
        angle = position * torch.as_tensor(freqs, dtype=torch.float64)
        turned = x.clone()
        tail = torch.view_as_complex(x[..., -2 * len(freqs) :].double().reshape(*x.shape[:-1], -1, 2))
        tail = torch.view_as_real(tail * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        turned[..., -2 * len(freqs) :] = tail.float()
        return turned

    def compress(self, x, p, ratio, freqs, finish):
        value = torch.einsum("td,wcd->twc", x, p["wkv"])
        gate = torch.einsum("td,wcd->twc", x, p["wgate"]) + p["ape"][torch.arange(len(x)) % ratio]
        entries = []
        for block in range(len(x) // ratio):
            now = slice(block * ratio, (block + 1) * ratio)
            values, gates = value[now, -1], gate[now, -1]
            if value.shape[1] == 2 and block:
                before = slice((block - 1) * ratio, block * ratio)
                values = torch.cat([value[before, 0], values])
                gates = torch.cat([gate[before, 0], gates])
            pooled = (torch.softmax(gates, 0) * values).sum(0)
            entries.append(finish(self.rope(self.rms(pooled, p["norm"]), block * ratio, freqs)))
        return entries

    def attention(self, x, p, kind):
        c, ratio = self.config, self.config.ratio(kind)
        freqs = frequencies(c, kind != "window")
        latent = self.act(self.rms(self.act(x) @ p["wq_a"].T, p["q_norm"]))
        queries = self.rms(torch.einsum("tq,gjcq->tgjc", latent, p["wq_b"]), 1.0)
        kv = self.rms(self.act(x) @ p["wkv"].T, p["kv_norm"])
        window = [self.entry(self.rope(row, t, freqs)) for t, row in enumerate(kv)]
        entries = self.compress(x, p["compressor"], ratio, freqs, self.entry) if ratio else []
        if kind == "csa":
            keys = self.compress(x, p["indexer"]["compressor"], ratio, freqs, self.index_vector)
            heads = torch.einsum("tq,hcq->thc", latent, p["indexer"]["wq_b"])
            constant = (c.index_head_dim * c.index_n_heads) ** -0.5
            mixing = self.score(self.score(x @ p["indexer"]["weights_proj"].T) * constant)
        out = []
        for t in range(len(x)):
            visible = list(range(min(len(entries), (t + 1) // ratio))) if ratio else []
            if kind == "csa" and len(visible) > c.index_topk:
                qi = self.index_vector(self.rope(heads[t], t, freqs))
                dots = self.score(qi @ torch.stack([keys[s] for s in visible]).T).relu()
                scores = self.score(self.score(dots * mixing[t][:, None]).sum(0))
                visible = sorted(visible, key=lambda s: (-float(scores[s]), s))[: c.index_topk]
            seen = torch.stack(
                window[max(0, t - c.sliding_window + 1) : t + 1] + [entries[s] for s in visible]
            )
            logits = torch.einsum("gjc,sc->gjs", self.rope(queries[t], t, freqs), seen) * c.head_dim**-0.5
            joint = torch.softmax(torch.cat([logits, p["attn_sink"][..., None]], -1), -1)[..., :-1]
            o = self.rope(torch.einsum("gjs,sc->gjc", joint, seen), -t, freqs)
            a = torch.einsum("gojc,gjc->go", p["wo_a"], o)
            out.append(self.act(a.flatten()) @ p["wo_b"].flatten(1).T)
        return torch.stack(out)

    def expert(self, x, gate_up, down, weight):
        gate, up = x @ gate_up[0].T, x @ gate_up[1].T
        if limit := self.config.swiglu_limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = torch.nn.functional.silu(gate) * up
        if "act_fp8" in self.on:  # the official order: weighted, rounded, multiplied
            return self.act(hidden * weight) @ down.T
        return (hidden @ down.T) * weight

    def moe(self, x, ids, p):
        c, out = self.config, []
        seen = self.act(x)
        gate_up, down = (self.expert_weight(p["experts"][name]) for name in ("gate_up", "down"))
        for row, small, token in zip(x, seen, ids, strict=True):
            scores = torch.nn.functional.softplus(p["gate"]["weight"] @ row).sqrt()
            if "tid2eid" in p["gate"]:
                chosen = p["gate"]["tid2eid"][token].tolist()
            else:
                biased = scores + p["gate"]["bias"]
                chosen = sorted(range(len(scores)), key=lambda e: (-float(biased[e]), e))
                chosen = chosen[: c.num_experts_per_tok]
            total = sum(float(scores[e]) for e in chosen)
            y = self.expert(small, p["shared"]["gate_up"], p["shared"]["down"], 1.0)
            for e in chosen:
                weight = c.routed_scaling_factor * scores[e] / max(total, 1e-20)
                y = y + self.expert(small, gate_up[e], down[e], weight)
            out.append(y)
        return torch.stack(out)

    def maps(self, streams, hc):
        c, n = self.config, self.config.hc_mult
        z = torch.einsum("knd,nd->k", hc["fn"], streams) * torch.rsqrt(
            streams.square().mean() + c.rms_norm_eps
        )
        base, scale = hc["base"], hc["scale"]
        pre = torch.sigmoid(z[:n] * scale[0] + base[:n]) + c.hc_eps
        post = 2 * torch.sigmoid(z[n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = torch.softmax((z[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n), 1) + c.hc_eps
        comb = comb / (comb.sum(0, keepdim=True) + c.hc_eps)
        for _ in range(c.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
            comb = comb / (comb.sum(0, keepdim=True) + c.hc_eps)
        return pre, post, comb

    def sublayer(self, streams, hc, norm, f):
        maps = [self.maps(x, hc) for x in streams]
        y = f(self.rms(torch.stack([pre @ x for (pre, _, _), x in zip(maps, streams, strict=True)]), norm))
        return torch.stack(
            [
                torch.outer(post, row) + comb.T @ x
                for (_, post, comb), row, x in zip(maps, y, streams, strict=True)
            ]
        )

    @torch.no_grad()
    def layer(self, streams: np.ndarray, ids: np.ndarray, params: dict[str, Any], kind: str) -> np.ndarray:
        """Streams [T, N, D] before a layer -> after it, float32."""
        p = as_torch(params)
        x = torch.tensor(np.asarray(streams))
        x = self.sublayer(x, p["hc_attn"], p["attn_norm"], lambda u: self.attention(u, p["attn"], kind))
        x = self.sublayer(x, p["hc_ffn"], p["ffn_norm"], lambda u: self.moe(u, ids, p["ffn"]))
        assert math.isfinite(float(x.abs().max()))
        return x.numpy()


def as_torch(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: as_torch(value) for key, value in tree.items()}
    return torch.tensor(np.asarray(tree))
