"""Limits of number types: whether sums and differences may overflow, found in one pass, and finite replacements."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MODERATE = 2.0**40  # below it no sum of entries or of their squares is too large for fp32
MODERATE_DIFFERENCES = 2.0**14  # weights below it have differences whose sums are not too large even for fp16


def are_moderate(rows: Iterable[Tensor], limit: float = MODERATE) -> Tensor:
    """Return, as a boolean on the rows' device, whether all entries are finite and below a limit.

    The rows are read once; the host does not wait. All rows must be on one device.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for row in rows:
        if row.numel():
            by_type.setdefault(row.dtype, []).append(row)
    largest = [torch.stack(torch._foreach_norm(group, float("inf"))).double() for group in by_type.values()]
    return (torch.cat(largest) < limit).all() if largest else torch.tensor(True)  # false for `nan`


def is_large(row: Tensor) -> bool:
    """Whether an entry is NaN, or so large that adding it to a finite one may give infinity."""
    info = torch.finfo(row.dtype)
    smallest, largest = row.aminmax()
    return not bool(
        torch.maximum(largest, -smallest) < info.max * info.eps / 8
    )  # negated, so that `nan` counts as large


def limit_(row: Tensor, where: Tensor | None = None) -> None:
    """Replace infinite entries, all or some, by the largest finite ones, in place."""
    over = row.isinf() if where is None else row.isinf() & where
    row.copy_(torch.where(over, row.sign() * torch.finfo(row.dtype).max, row))


def limit_differences_(difference: Tensor, references: list[Tensor]) -> None:
    """Make differences from finite references finite; 0 where weight and reference are the same infinite number."""
    reference = torch.cat(references)
    difference.masked_fill_(difference.isnan() & reference.isinf(), 0.0)
    info = torch.finfo(difference.dtype)
    limit_(difference, reference.abs() > info.max * info.eps / 8)  # otherwise it was the weight that is infinite


def limit_moved_(rows: list[Tensor], moves: Sequence[Tensor]) -> None:
    """Make entries finite that a finite move has brought to infinity."""
    for row, move in zip(rows, moves, strict=True):
        limit_(row, move.isfinite() & (move != 0))


def drop_unsent_(mean: Tensor, sent: Tensor) -> None:
    """Treat entries whose mean is infinite as not sent; the mean is the same on all ranks."""
    unsent = mean.isinf()
    mean.masked_fill_(unsent, 0.0)
    sent.masked_fill_(unsent, 0.0)
