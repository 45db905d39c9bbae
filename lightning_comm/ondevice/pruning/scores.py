"""Masks from scores: the entries with the largest ones are kept."""

import math
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from lightning_comm.ondevice.pruning.base import Masks, PruningContext

SCOPES = ("global", "layer", "erk")


def choose(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str,
    context: PruningContext,
    where: str,
    weights: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Return masks that keep the largest scores, and warn of parameters for which scores say little or nothing.

    A parameter with equal scores, such as one that starts at zero, gets no mask, since nothing says which of its
    entries to keep. At a later pruning of the schedule it is judged like the others. If all parameters are like that,
    those with scores other than zero are pruned by the order of their entries.

    Args:
        scores: By parameter name.
        sparsity: Share of the entries that are pruned.
        scope: One of :data:`SCOPES`.
        context: The present masks. A parameter that has one keeps it where there is no score for it.
        where: The class that asks, for messages.
        weights: The parameters; if left out, a score is 0 exactly where its weight is.

    Raises:
        ValueError: If all scores are zero.

    """
    level = [name for name, score in scores.items() if name not in context.kept and _is_level(score)]
    if len(level) == len(scores):  # all equal: chosen by the order of entries, unless zero
        level = [name for name in level if not bool(scores[name].any())]
    scored = {name: score for name, score in scores.items() if name not in level}
    if not scored:
        raise ValueError(f"{where}: {_no_scores(level, weights)}")
    context.warn(
        level,
        f"{where}: not pruned: {{names}}, since all entries score alike, as in a parameter that starts at zero, so "
        "nothing says which of them to keep. At a later pruning of a schedule it is judged again. To prune it, let "
        "it train first, by `PruningSchedule(start_step=...)`; `skip` leaves this message out.",
    )
    masks = keep_largest(scored, sparsity, scope, context.kept)
    _warn_of_small_rests(masks, sparsity, context, where)
    _warn_of_zero_rows(scored if weights is None else weights, masks, context, where)
    return {**{name: mask for name, mask in context.kept.items() if name not in masks}, **masks}


def _no_scores(level: list[str], weights: Mapping[str, Tensor] | None) -> str:
    if weights is None or not any(bool(weights[name].any()) for name in level):
        return (
            f"nothing can be pruned yet: in each parameter that may be, all scores are 0, as in {level[0]!r}. Train "
            "the model first, by `PruningSchedule(start_step=...)`."
        )
    return (
        f"nothing can be pruned by these scores: in each parameter that may be, all are 0, as in {level[0]!r}. Either "
        "the second derivative of the loss by the weights is 0, as where it is linear in them (an absolute error of a "
        "linear model) or a constant (a cross entropy of one output), or the gradient is, as behind layers that start "
        "at zero. Give another `loss`, or use MagnitudePruning; or, in the second case, train the model first, by "
        "`PruningSchedule(start_step=...)`."
    )


def _is_level(score: Tensor) -> bool:
    return score.numel() > 1 and bool((score == score.reshape(-1)[0]).all())


def _warn_of_small_rests(masks: Masks, sparsity: float, context: PruningContext, where: str) -> None:
    shares = {name: (int(mask.sum()), (1 - sparsity) * mask.numel()) for name, mask in masks.items()}
    context.warn(
        [name for name, (left, fair) in shares.items() if left < 0.1 * fair or (left == 1 and fair >= 2)],
        f"{where}: pruned to one entry, or hardly any: {{names}}, whose scores are small beside those of others. Where "
        "the model needs it, name it in `skip`, or take scope='layer', which prunes the same share of each parameter.",
    )


def _warn_of_zero_rows(weights: Mapping[str, Tensor], masks: Masks, context: PruningContext, where: str) -> None:
    context.warn(
        [name for name, mask in masks.items() if name not in context.kept and _loses_zero_rows(weights[name], mask)],
        f"{where}: pruned where whole rows or columns are zero, which so stay zero: {{names}}. Where they only start "
        "at zero and should be trained, name the parameter in `skip`, or prune when it has been trained, by "
        "`PruningSchedule(start_step=...)`.",
    )


def _loses_zero_rows(weight: Tensor, mask: Tensor) -> bool:
    """Whether a whole row or column is zero, and nothing of it is kept."""
    live = (weight != 0) | mask
    return any(not bool(live.transpose(0, way).flatten(1).any(1).all()) for way in range(min(2, weight.dim())))


def keep_largest(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, kept: Mapping[str, Tensor] | None = None
) -> Masks:
    """Return masks that keep the entries with the largest scores; among equal ones the first.

    Args:
        scores: By parameter name.
        sparsity: Share of the entries that are pruned.
        scope: One of :data:`SCOPES`.
        kept: The present masks: no other entry is kept.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "layer").items()}
        {'a': [False, True], 'b': [False, True]}
        >>> {name: mask.tolist() for name, mask in keep_largest(scores, 0.5, "global").items()}
        {'a': [False, True], 'b': [False, True]}

    """
    empty = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items() if not score.numel()}
    scores = {name: score for name, score in scores.items() if name not in empty}
    if not scores:
        return empty
    if empty:
        return {**keep_largest(scores, sparsity, scope, kept), **empty}
    if kept:
        scores = {
            name: _wide(score).masked_fill(~kept[name].to(score.device), -torch.inf) if name in kept else score
            for name, score in scores.items()
        }
        masks = keep_largest(scores, sparsity, scope)
        return {name: mask & (scores[name] > -torch.inf) for name, mask in masks.items()}
    if scope == "global":
        return _keep_largest_of_all(scores, sparsity)
    shares = dict.fromkeys(scores, 1 - sparsity) if scope == "layer" else erk_shares(scores, sparsity)
    return {name: _largest(score, max(1, round(shares[name] * score.numel()))) for name, score in scores.items()}


def _keep_largest_of_all(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    rows = [_wide(score).reshape(-1) for score in scores.values()]  # concatenated in the widest of their types
    total = sum(row.numel() for row in rows)
    kept = max(len(rows), round((1 - sparsity) * total))
    everything = torch.cat(rows)
    starts = accumulate((row.numel() for row in rows[:-1]), initial=0)
    # at least one of each layer, found on the device of the scores, so that nothing is copied from the host
    firsts = torch.stack([row.argmax() + start for row, start in zip(rows, starts, strict=True)])
    everything.index_fill_(0, firsts, torch.inf)
    mask = _largest(everything, kept)
    parts = torch.split(mask, [row.numel() for row in rows])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def erk_shares(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return the kept share of each parameter: in proportion to the sum of its dimensions over their product.

    No share is above 1; what exceeds it in a small layer is spread over the others.
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


def _wide(score: Tensor) -> Tensor:
    """Return scores in float32, those of float64 as they are: float32 may not distinguish them."""
    return score if score.dtype == torch.float64 else score.float()


def _largest(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.view(scores.shape)
