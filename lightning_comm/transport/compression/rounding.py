"""Stochastic rounding: to one of the two whole numbers beside a value, with the value as the expectation."""

import torch
from torch import Tensor

from lightning_comm.transport.compression.base import Layout

_BITS = 16


def scale_type(values: Tensor) -> torch.dtype:
    """Return the type in which scales of a row are sent: float64 for float64, and float32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def largest_entries(layout: Layout, values: Tensor) -> Tensor:
    """Return the absolute value of each parameter's largest entry, or NaN where one is; 0 where there are none.

    Example:
        >>> from lightning_comm.transport.compression.base import Slot
        >>> layout = Layout((Slot("a", 2, (2,)), Slot("none", 0, (0, 3)), Slot("b", 1, ())))
        >>> largest_entries(layout, torch.tensor([1.0, -3.0, 2.0])).tolist()
        [3.0, 0.0, 2.0]

    """
    if not layout.numel:
        return torch.zeros(len(layout.slots), dtype=scale_type(values), device=values.device)
    rows = [row if row.numel() else values.new_zeros(1) for row in layout.split(values)]
    if values.device.type == "cpu":  # a tenth of the time that the norm takes there
        ends = [row.aminmax() for row in rows]
        largest = torch.maximum(torch.stack([end.max for end in ends]), -torch.stack([end.min for end in ends]))
    else:
        largest = torch.stack(torch._foreach_norm(rows, float("inf")))
    return largest.to(scale_type(values))


def round_stochastically(entries: Tensor, scale: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Return ``entries / scale``, rounded up or down at random, within ``-limit`` and ``limit``.

    The expectation of the result is ``entries / scale`` within 2^-17, since 16 random bits are drawn for an entry.

    Args:
        entries: A row of floating-point numbers, none larger than ``limit * scale``.
        scale: A number on the same device. Where it is 0 or not finite the result is 0.
        limit: The largest result.
        generator: Where random bits come from.

    Returns:
        A row of whole numbers, in float32, or in float64 if the entries are.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> rounded = round_stochastically(torch.full((8000,), 0.25), torch.tensor(1.0), 127, draw)
        >>> sorted(set(rounded.tolist())), abs(float(rounded.mean()) - 0.25) < 0.03
        ([0.0, 1.0], True)

    """
    entries = entries.to(scale_type(entries))  # 16 bits have no room for a number up to 127 and the random bits
    usable = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(usable, scale, torch.inf)  # not times the inverse, which is infinite for the smallest scales
    rounded = torch.addcdiv(_uniform(entries, generator), entries, divisor.to(entries.dtype)).floor_()
    return rounded.nan_to_num_(0.0, 0.0, 0.0).clamp_(-limit, limit)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers in the middle of 2^16 equal parts of [0, 1); each 64 random bits give four of them."""
    words = torch.empty(-(-like.numel() * _BITS // 64), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    parts = words.view(torch.int16)[: like.numel()].to(like.dtype)
    return parts.add_(2 ** (_BITS - 1) + 0.5).mul_(2.0**-_BITS)
