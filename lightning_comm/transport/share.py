"""What a rank counts for in a mean, such that the mean of equal numbers is that number."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PIECE = 2**16  # entries that are worked on at a time, so that they stay in the processor's cache


class Share(float):
    """The weight of one rank in a mean, which knows where it lies among those of all ranks.

    Those of all ranks, one after the other, fill the line from 0 to 1, and this one reaches from ``begin`` to ``end``.

    Example:
        >>> [(float(share), share.begin, share.end) for share in (Share.of([3, 0, 1], rank) for rank in range(3))]
        [(0.75, 0.0, 0.75), (0.0, 0.75, 0.75), (0.25, 0.75, 1.0)]

    """

    begin: float
    end: float

    def __new__(cls, weight: float, begin: float, end: float) -> "Share":
        """Make a share of a weight and where it lies."""
        share = super().__new__(cls, weight)
        share.begin, share.end = begin, end
        return share

    @classmethod
    def of(cls, counts: Sequence[float], rank: int) -> "Share":
        """Return the share of one rank, where each counts for as much as ``counts`` says."""
        total, before = sum(counts), sum(counts[:rank])
        return cls(counts[rank] / total, before / total, (before + counts[rank]) / total)

    def part_(self, row: Tensor) -> None:
        """Replace every entry by this rank's part of it, in place.

        Where all ranks hold the same number, their parts sum to exactly that number, in whatever order they are added,
        and no partial sum is larger. For that a part is cut off where :func:`_up_to` says, and all cuts through a
        number lie on the grid of the numbers next to it. A part differs from weight times entry by at most a few steps
        of that grid.

        Note:
            *Memory.* Two pieces of the row more, for a moment.

        """
        for piece in torch.split(row, _PIECE):
            self._part(piece)

    def _part(self, row: Tensor) -> None:
        part = row.clone() if self.end == 1 else _up_to(self.end, row)
        if self.begin > 0:
            part -= _up_to(self.begin, row)
        part.copysign_(row)  # a part of -0.0 is -0.0, which changes no sum
        if not is_finite(part):
            large = row.isfinite() & (row.abs() > torch.finfo(row.dtype).max / 2)
            part = torch.where(row.isfinite(), part, row)
            if large.any():
                fourth = row[large] / 4
                self._part(fourth)
                part[large] = fourth * 4  # both exact: nothing is small here
        row.copy_(part)


def _up_to(share: float, row: Tensor) -> Tensor:
    """Return ``share`` of each entry, rounded to a multiple of the last digit of the entry itself."""
    total = row * share
    total += row  # now at least as large as the entry, so a multiple of its last digit
    total -= row  # exact
    return total


def is_finite(row: Tensor) -> bool:
    """Whether the entries are finite for sure; may be wrong where their sum is too large. One pass."""
    return bool(row.sum().isfinite())
