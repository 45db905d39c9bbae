"""Sums and differences near the limits of a type: one pass finds that nothing is large, as ever."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MODERATE = 2.0**40  # below it no sum of entries or of their squares is too large for fp32
MODERATE_DIFFERENCES = 2.0**14  # weights below it have differences whose sums are not too large even for fp16


def are_moderate(rows: Iterable[Tensor], limit: float = MODERATE) -> Tensor:
    """Return, as a boolean where the rows are, whether all entries are finite and below a limit.

    They are read once; the host does not wait. All rows must be on one device.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for row in rows:
        if row.numel():
            by_type.setdefault(row.dtype, []).append(row)
    largest = [torch.stack(torch._foreach_norm(group, float("inf"))).double() for group in by_type.values()]
    return (torch.cat(largest) < limit).all() if largest else torch.tensor(True)  # `nan` is not


def is_large(row: Tensor) -> bool:
    """Whether an entry is so large (or not a number) that to add it to a finite one may give an infinite one."""
    info = torch.finfo(row.dtype)
    smallest, largest = row.aminmax()
    return not bool(torch.maximum(largest, -smallest) < info.max * info.eps / 8)  # so that `nan` counts as large


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
    """Make finite what a finite move has brought beyond the limit."""
    for row, move in zip(rows, moves, strict=True):
        limit_(row, move.isfinite() & (move != 0))


def drop_unsent_(mean: Tensor, sent: Tensor) -> None:
    """Count entries as not sent whose mean is infinite; it is the same on all ranks."""
    unsent = mean.isinf()
    mean.masked_fill_(unsent, 0.0)
    sent.masked_fill_(unsent, 0.0)
