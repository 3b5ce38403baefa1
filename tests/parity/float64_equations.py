"""A second oracle: the model's equations in float64, one sequence, one query at a time.

Nothing here is clever. Each function is one formula of the report; windows, blocks and visibility are
explicit index lists per query instead of masks, so that a masking mistake cannot be repeated here. It reads
our parameter tree, which makes it a check of the tree's orientation as well. MTP included.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4_jax.config import ModelConfig, layer_stacks

F64 = np.float64


@dataclasses.dataclass
class Record:
    """What `forward` did: final logits [T, V], streams per layer [T, N, D], and the discrete choices.

    routing: layer -> list of sets of expert ids, one per token. picks: CSA layer -> list of sets of entries.
    mtp_logits: [T - 1, V] or None; row t predicts token t + 2.
    """

    logits: np.ndarray
    streams: list[np.ndarray]
    routing: dict[int, list[set[int]]]
    picks: dict[int, list[set[int]]]
    mtp_logits: np.ndarray | None


def as_float64(tree: Any) -> Any:
    """The parameter tree with float leaves in float64."""
    if isinstance(tree, Mapping):
        return {key: as_float64(value) for key, value in tree.items()}
    leaf = np.asarray(tree)
    return leaf if leaf.dtype.kind in "iu" else leaf.astype(F64)


def rms(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    exp = np.exp(x - x.max(axis, keepdims=True))
    return exp / exp.sum(axis, keepdims=True)


def frequencies(config: ModelConfig, compressed: bool) -> np.ndarray:
    """Angles per position of the Dr / 2 pairs; YaRN on compressed layers only."""
    n = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    base = theta ** (-np.arange(0, n, 2, dtype=F64) / n)
    if not compressed:
        return base
    yarn = config.yarn

    def dim(beta: float) -> float:
        turns = yarn.original_max_position_embeddings / (2 * math.pi * beta)
        return n * math.log(turns) / (2 * math.log(theta))

    low, high = max(math.floor(dim(yarn.beta_fast)), 0), min(math.ceil(dim(yarn.beta_slow)), n - 1)
    ramp = (np.arange(n // 2) - low) / ((high - low) or 0.001)
    ramp = np.clip(ramp, 0, 1)
    return base * (1 - ramp) + base / yarn.factor * ramp


def rope(x: np.ndarray, position: float, freqs: np.ndarray) -> np.ndarray:
    """Rotates interleaved pairs of the last 2 * len(freqs) channels of x [..., width]."""
    width = 2 * len(freqs)
    cos, sin = np.cos(position * freqs), np.sin(position * freqs)
    out = x.copy()
    even, odd = x[..., -width::2], x[..., x.shape[-1] - width + 1 :: 2]
    out[..., -width::2] = even * cos - odd * sin
    out[..., x.shape[-1] - width + 1 :: 2] = even * sin + odd * cos
    return out


def mhc_maps(streams: np.ndarray, hc: dict[str, Any], config: ModelConfig) -> tuple[np.ndarray, ...]:
    """One token's streams [N, D] -> pre [N], post [N], comb [N, N] (from stream j to stream k)."""
    n, eps = config.hc_mult, config.hc_eps
    rows = np.einsum("knd,nd->k", hc["fn"], streams)
    z = rows / np.sqrt(np.mean(streams**2) + config.rms_norm_eps)
    pre = sigmoid(z[:n] * hc["scale"][0] + hc["base"][:n]) + eps
    post = 2 * sigmoid(z[n : 2 * n] * hc["scale"][1] + hc["base"][n : 2 * n])
    comb = softmax((z[2 * n :] * hc["scale"][2] + hc["base"][2 * n :]).reshape(n, n), 1) + eps
    comb = comb / (comb.sum(0, keepdims=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(1, keepdims=True) + eps)
        comb = comb / (comb.sum(0, keepdims=True) + eps)
    return pre, post, comb


def collapse(streams: np.ndarray, hc: dict[str, Any], config: ModelConfig) -> np.ndarray:
    """Streams [T, N, D] -> [T, D]."""
    out = []
    for x in streams:
        z = np.einsum("knd,nd->k", hc["fn"], x) / np.sqrt(np.mean(x**2) + config.rms_norm_eps)
        out.append((sigmoid(z * hc["scale"][0] + hc["base"]) + config.hc_eps) @ x)
    return np.stack(out)


def compress(
    x: np.ndarray, weights: dict[str, Any], ratio: int, freqs: np.ndarray, eps: float
) -> list[np.ndarray]:
    """Normalised inputs [T, D] -> one rotated entry per complete block of `ratio` tokens."""
    branches = weights["wkv"].shape[0]
    ape = weights["ape"][np.arange(len(x)) % ratio]  # [T, w, Dc]
    value = np.einsum("td,wcd->twc", x, weights["wkv"])
    score = np.einsum("td,wcd->twc", x, weights["wgate"]) + ape
    entries = []
    for block in range(len(x) // ratio):
        current = range(block * ratio, (block + 1) * ratio)
        rows = [(value[t, -1], score[t, -1]) for t in current]
        if branches == 2 and block > 0:  # branch 0 serves the NEXT block's entry
            rows += [(value[t - ratio, 0], score[t - ratio, 0]) for t in current]
        pooled = sum(softmax(np.stack([s for _, s in rows]), 0) * np.stack([v for v, _ in rows]))
        entries.append(rope(rms(pooled, weights["norm"], eps), block * ratio, freqs))
    return entries


def attention(
    x: np.ndarray, p: dict[str, Any], kind: str, config: ModelConfig
) -> tuple[np.ndarray, list[set[int]]]:
    """Normalised inputs [T, D] -> outputs [T, D], and the entries each query selected (CSA)."""
    eps, ratio = config.rms_norm_eps, config.ratio(kind)
    freqs = frequencies(config, kind != "window")
    latent = rms(x @ p["wq_a"].T, p["q_norm"], eps)
    queries = rms(np.einsum("tq,gjcq->tgjc", latent, p["wq_b"]), 1.0, eps)
    window = [rope(row, t, freqs) for t, row in enumerate(rms(x @ p["wkv"].T, p["kv_norm"], eps))]
    entries = compress(x, p["compressor"], ratio, freqs, eps) if ratio else []
    picks: list[set[int]] = []
    if kind == "csa":
        keys = compress(x, p["indexer"]["compressor"], ratio, freqs, eps)
        heads = np.einsum("tq,hcq->thc", latent, p["indexer"]["wq_b"])
        mixing = x @ p["indexer"]["weights_proj"].T
    outputs = []
    for t in range(len(x)):
        q = rope(queries[t], t, freqs)
        seen = [window[s] for s in range(max(0, t - config.sliding_window + 1), t + 1)]
        visible = [s for s in range(len(entries)) if s < (t + 1) // ratio]
        if kind == "csa":
            qi = rope(heads[t], t, freqs)
            constant = (config.index_head_dim * config.index_n_heads) ** -0.5
            score = {s: constant * float(mixing[t] @ np.maximum(qi @ keys[s], 0)) for s in visible}
            visible = sorted(visible, key=lambda s: (-score[s], s))[: config.index_topk]
            picks.append(set(visible))
        kv = np.stack(seen + [entries[s] for s in visible])
        logits = np.einsum("gjc,sc->gjs", q, kv) * config.head_dim**-0.5
        joint = softmax(np.concatenate([logits, p["attn_sink"][..., None]], -1), -1)[..., :-1]
        out = rope(np.einsum("gjs,sc->gjc", joint, kv), -t, freqs)
        outputs.append(np.einsum("dgo,gojc,gjc->d", p["wo_b"], p["wo_a"], out, optimize=True))
    return np.stack(outputs), picks


def swiglu(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, limit: float) -> np.ndarray:
    gate, up = gate_up[0] @ x, gate_up[1] @ x
    if limit > 0:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return down @ (gate * sigmoid(gate) * up)


def moe(
    x: np.ndarray, ids: np.ndarray, p: dict[str, Any], config: ModelConfig
) -> tuple[np.ndarray, list[set[int]]]:
    """Normalised inputs [T, D] and token ids [T] -> outputs [T, D] and the experts of each token."""
    out, routing = [], []
    for row, token in zip(x, ids, strict=True):
        scores = np.sqrt(np.logaddexp(0.0, p["gate"]["weight"] @ row))
        if "tid2eid" in p["gate"]:
            chosen = [int(e) for e in p["gate"]["tid2eid"][token]]
        else:
            biased = scores + p["gate"]["bias"]
            order = sorted(range(len(scores)), key=lambda e: (-biased[e], e))
            chosen = order[: config.num_experts_per_tok]
        total = max(float(sum(scores[e] for e in chosen)), 1e-20)
        limit = config.swiglu_limit
        y = swiglu(row, p["shared"]["gate_up"], p["shared"]["down"], limit)
        for e in chosen:
            weight = config.routed_scaling_factor * scores[e] / total
            expert = p["experts"]["gate_up"][e], p["experts"]["down"][e]
            y = y + weight * swiglu(row, *expert, limit)
        out.append(y)
        routing.append(set(chosen))
    return np.stack(out), routing


def sublayer(
    streams: np.ndarray, hc: dict[str, Any], weight: np.ndarray, f: Any, config: ModelConfig
) -> tuple[np.ndarray, Any]:
    """Streams [T, N, D] through f with its mHC maps."""
    maps = [mhc_maps(x, hc, config) for x in streams]
    u = np.stack([pre @ x for (pre, _, _), x in zip(maps, streams, strict=True)])
    y, chosen = f(rms(u, weight, config.rms_norm_eps))
    out = [np.outer(post, row) + comb.T @ x for (_, post, comb), row, x in zip(maps, y, streams, strict=True)]
    return np.stack(out), chosen


def block(
    streams: np.ndarray, ids: np.ndarray, p: dict[str, Any], kind: str, config: ModelConfig
) -> tuple[np.ndarray, list[set[int]], list[set[int]]]:
    """One layer: streams [T, N, D] -> streams, experts, picks."""
    streams, picks = sublayer(
        streams, p["hc_attn"], p["attn_norm"], lambda x: attention(x, p["attn"], kind, config), config
    )
    streams, routing = sublayer(
        streams, p["hc_ffn"], p["ffn_norm"], lambda x: moe(x, ids, p["ffn"], config), config
    )
    return streams, routing, picks


def layer_params(params: dict[Any, Any], config: ModelConfig, layer: int) -> dict[str, Any]:
    """The weights of one layer, picked out of its stack."""

    def pick(tree: Any, repeat: int) -> Any:
        if isinstance(tree, dict):
            return {key: pick(value, repeat) for key, value in tree.items()}
        return tree[repeat]

    for index, stack in enumerate(layer_stacks(config)):
        for position in range(len(stack.kinds)):
            for repeat in range(stack.repeats):
                if stack.layer_index(position, repeat) == layer:
                    return pick(params["stacks"][index]["blocks"][position], repeat)
    raise KeyError(layer)


def forward(params: dict[Any, Any], config: ModelConfig, ids: np.ndarray) -> Record:
    """One document int [T] -> everything of `Record`."""
    params, ids = as_float64(params), np.asarray(ids)
    streams = np.repeat(params["embed"][ids][:, None], config.hc_mult, 1)
    record = Record(np.empty(0), [streams], {}, {}, None)
    for layer, kind in enumerate(config.attention_kinds):
        p = layer_params(params, config, layer)
        streams, record.routing[layer], picks = block(streams, ids, p, kind, config)
        record.streams.append(streams)
        if kind == "csa":
            record.picks[layer] = picks
    hidden = rms(collapse(streams, params["hc_head"], config), params["norm"], config.rms_norm_eps)
    record.logits = hidden @ params["head"].T
    if "mtp" in params and len(ids) > 1:
        record.mtp_logits = mtp(params, config, streams[:-1], ids)
    return record


def mtp(params: dict[Any, Any], config: ModelConfig, streams: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Backbone streams [T - 1, N, D] and ids [T] -> logits [T - 1, V] of the token after the next."""
    p, eps = params["mtp"][0], config.rms_norm_eps
    following = ids[1:]
    e = rms(params["embed"][following], p["enorm"], eps) @ p["e_proj"].T
    x = e[:, None] + rms(streams, p["hnorm"], eps) @ p["h_proj"].T
    weights = {key: value for key, value in _first_repeat(p["block"]).items()}
    x, _, _ = block(x, following, weights, "window", config)
    hidden = rms(collapse(x, p["hc_head"], config), p["norm"], eps)
    return hidden @ params["head"].T


def _first_repeat(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _first_repeat(value) for key, value in tree.items()}
    return tree[0]
