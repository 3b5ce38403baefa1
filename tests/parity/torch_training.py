"""Training steps in PyTorch on a transformers DeepSeek-V4: autograd, torch's optimisers, losses by hand.

The loss is the report's without the MTP term, which transformers' model lacks: mean cross entropy of the
next token, and the sequence-wise balance loss of layers that learn their routing. After a step the selection
biases move by the rule.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from tests.parity.oracle import Oracle

BALANCE_WEIGHT = 1e-4
BIAS_SPEED = 1e-3


class Measured(NamedTuple):
    """Of one step, before its update."""

    main: float
    balance: float
    grad_norm: float


def adamw(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """The report's numbers; decay on matrices, embedding and head."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and not name.endswith("position_bias")]
    others = [p for name, p in named if p.ndim < 2 or name.endswith("position_bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-20)


def sgd(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """Without momentum and decay."""
    return torch.optim.SGD(model.parameters(), lr=rate)


def step(
    oracle: Oracle, optimizer: torch.optim.Optimizer, ids: np.ndarray, max_norm: float | None
) -> Measured:
    """One step on whole rows int [B, T]; the oracle's model is changed in place."""
    model, rows = oracle.model, len(ids)
    routed: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def note(module: Any, args: Any, out: Any) -> None:
        if hasattr(module, "e_score_correction_bias"):
            routed.append((module, module.score_fn(out[0]), out[2]))

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]
    tokens = torch.as_tensor(ids).long()
    logits = model(tokens, use_cache=False).logits[:, :-1]
    for hook in hooks:
        hook.remove()
    main = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    losses, loads = [], []
    for module, scores, chosen in routed:
        count, top_k = module.num_experts, module.top_k
        picked = torch.nn.functional.one_hot(chosen, count).sum(1).float()
        loads.append(picked.sum(0))
        share = (scores / scores.sum(-1, keepdim=True)).view(rows, -1, count).mean(1)
        frequency = picked.view(rows, -1, count).mean(1) * count / top_k
        losses.append((frequency * share).sum(-1).mean())
    balance = sum(losses)
    optimizer.zero_grad()
    (main + BALANCE_WEIGHT * balance).backward()
    # The indexer's parameters have no gradient, and torch leaves them alone: they do not decay either.
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
    if max_norm is not None and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    optimizer.step()
    with torch.no_grad():
        for (module, _, _), load in zip(routed, loads, strict=True):
            module.e_score_correction_bias += BIAS_SPEED * torch.sign(load.mean() - load)
    return Measured(main.item(), balance.item() / len(losses), norm.item())
