"""Masks from scores: the entries with the largest ones are kept."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_comm.transport.pruning.base import Masks

SCOPES = ("global", "layer", "erk")


def keep_largest(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, kept: Mapping[str, Tensor] | None = None
) -> Masks:
    """Return masks that keep the entries with the largest scores; of equal ones the first.

    Args:
        scores: By parameter name.
        sparsity: Share of the entries that are pruned.
        scope: One of :data:`SCOPES`.
        kept: The masks in force: no other entry is kept.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "layer").items()}
        {'a': [False, True], 'b': [False, True]}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "global").items()}
        {'a': [False, True], 'b': [False, True]}

    """
    if kept:
        scores = {
            name: score.float().masked_fill(~kept[name].to(score.device), -torch.inf) if name in kept else score
            for name, score in scores.items()
        }
        masks = keep_largest(scores, sparsity, scope)
        return {name: mask & (scores[name] > -torch.inf) for name, mask in masks.items()}
    if scope == "global":
        return _keep_largest_of_all(scores, sparsity)
    shares = dict.fromkeys(scores, 1 - sparsity) if scope == "layer" else erk_shares(scores, sparsity)
    return {name: _largest(score, max(1, round(shares[name] * score.numel()))) for name, score in scores.items()}


def _keep_largest_of_all(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    rows = [score.reshape(-1).float() for score in scores.values()]
    total = sum(row.numel() for row in rows)
    kept = max(len(rows), round((1 - sparsity) * total))
    everything = torch.cat(rows)
    firsts = torch.tensor([int(row.argmax()) for row in rows])
    starts = torch.tensor([0, *[row.numel() for row in rows[:-1]]]).cumsum(0)
    everything[firsts + starts] = torch.inf  # one of each layer at least
    mask = _largest(everything, kept)
    parts = torch.split(mask, [row.numel() for row in rows])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def erk_shares(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the kept share of each parameter: in proportion to the sum of its dimensions over their product.

    No share is above 1; what a small layer cannot take is spread over the others.
    """
    total = sum(score.numel() for score in scores.values())
    raw = {name: sum(score.shape) / math.prod(score.shape) for name, score in scores.items()}
    full: set[str] = set()
    while len(full) < len(scores):
        budget = (1 - sparsity) * total - sum(scores[name].numel() for name in full)
        scale = budget / sum(raw[name] * scores[name].numel() for name in scores if name not in full)
        over = {name for name in scores if name not in full and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in scores}
        full |= over
    return dict.fromkeys(scores, 1.0)


def _largest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
