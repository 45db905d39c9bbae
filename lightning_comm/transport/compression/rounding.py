"""Stochastic rounding: to one of the two whole numbers beside a value, with the value as the expectation."""

import torch
from torch import Tensor

_BITS = 16


def round_stochastically(entries: Tensor, scale: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Return ``entries / scale``, rounded up or down at random, within ``-limit`` and ``limit``.

    The expectation of the result is ``entries / scale`` within 2^-17, since 16 random bits are drawn for an entry.

    Args:
        entries: A row of floating-point numbers, none larger than ``limit * scale``.
        scale: A number on the same device. Where it is 0 or not finite the result is 0.
        limit: The largest result.
        generator: Where random bits come from.

    Returns:
        A row of whole numbers, in the entries' own type.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> rounded = round_stochastically(torch.full((8000,), 0.25), torch.tensor(1.0), 127, draw)
        >>> sorted(set(rounded.tolist())), abs(float(rounded.mean()) - 0.25) < 0.03
        ([0.0, 1.0], True)

    """
    usable = torch.isfinite(scale) & (scale > 0)
    inverse = torch.where(usable, 1 / scale, 0)
    rounded = torch.addcmul(_uniform(entries, generator), entries, inverse).floor_()
    return rounded.nan_to_num_(0.0, 0.0, 0.0).clamp_(-limit, limit)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers in the middle of 2^16 equal parts of [0, 1); a word of 64 bits gives four of them."""
    words = torch.empty(-(-like.numel() * _BITS // 64), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    parts = words.view(torch.int16)[: like.numel()].to(like.dtype)
    return parts.add_(2 ** (_BITS - 1) + 0.5).mul_(2.0**-_BITS)
