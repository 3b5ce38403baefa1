"""The hyper-connections once more, in torch, token by token and entry by entry."""

import torch


def sinkhorn(logits: torch.Tensor, num_iters: int, eps: float) -> torch.Tensor:
    """One token's [N, N] matrix, [j, k]."""
    n = logits.shape[0]
    mix = torch.stack([torch.softmax(logits[j], dim=0) for j in range(n)]) + eps
    for t in range(num_iters):
        if t:
            mix = torch.stack([mix[j] / (mix[j].sum() + eps) for j in range(n)])
        mix = torch.stack([mix[:, k] / (mix[:, k].sum() + eps) for k in range(n)], dim=1)
    return mix


def normalise(v: torch.Tensor, eps: float) -> torch.Tensor:
    """v / rms(v)."""
    return v / torch.sqrt((v * v).mean() + eps)


def pre(streams, fn, base, scale, norm_weight, num_iters, hc_eps, norm_eps):
    """One token: streams [N, D]; returns the sublayer's input, pre, post, comb."""
    n = streams.shape[0]
    z = fn.reshape(fn.shape[0], -1) @ normalise(
        streams.reshape(-1), norm_eps
    )  # normalised before the product
    gate = torch.sigmoid(scale[0] * z[:n] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(scale[1] * z[n : 2 * n] + base[n : 2 * n])
    comb = sinkhorn((scale[2] * z[2 * n :] + base[2 * n :]).reshape(n, n), num_iters, hc_eps)
    return norm_weight * normalise(gate @ streams, norm_eps), gate, post, comb


def post(streams, update, weights, comb):
    """One token: X' = post y^T + comb^T X."""
    return torch.outer(weights, update) + comb.T @ streams


def collapse(streams, fn, base, scale, hc_eps, norm_eps):
    """One token: the head's weighted sum."""
    z = fn.reshape(fn.shape[0], -1) @ normalise(streams.reshape(-1), norm_eps)
    return (torch.sigmoid(scale * z + base) + hc_eps) @ streams
