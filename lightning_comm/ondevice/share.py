"""The share of a rank in a weighted mean, computed so that the mean of equal numbers is exactly that number."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PIECE = 2**16  # entries that are processed at a time, so that they stay in the processor's cache
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SIGN_AND_EXPONENT = {torch.float32: -(2**23), torch.float64: -(2**52)}


class Share(float):
    """The weight of one rank in a mean, with its place among those of all ranks.

    The weights of all ranks, one after the other, fill the interval from 0 to 1; this one reaches from ``begin`` to
    ``end``.

    Example:
        >>> [(float(share), share.begin, share.end) for share in (Share.of([3, 0, 1], rank) for rank in range(3))]
        [(0.75, 0.0, 0.75), (0.0, 0.75, 0.75), (0.25, 0.75, 1.0)]

    """

    begin: float
    end: float

    def __new__(cls, weight: float, begin: float, end: float) -> "Share":
        """Create a share from a weight and its interval."""
        share = super().__new__(cls, weight)
        share.begin, share.end = begin, end
        return share

    @classmethod
    def of(cls, counts: Sequence[float], rank: int) -> "Share":
        """Return the share of one rank, where ranks count in proportion to ``counts``."""
        total, before = sum(counts), sum(counts[:rank])
        return cls(counts[rank] / total, before / total, (before + counts[rank]) / total)

    def part_(self, row: Tensor, *, moderate: bool = False) -> None:
        """Replace every entry by this rank's part of it, in place.

        Args:
            row: The entries.
            moderate: Whether they are known to be finite and far from the limits of their type; otherwise the host
                checks, and on CUDA waits for that.

        If all ranks hold the same number, their parts sum to exactly that number, in any order of addition, and no
        partial sum is larger. For that, a number is cut only at multiples of its own last digit (:func:`_up_to`). So a
        part differs from weight times entry by two such digits at most.

        Note:
            *Memory.* On a CPU a few pieces of the row, otherwise three such rows, for a moment.

        """
        for piece in torch.split(row, _PIECE) if row.device.type == "cpu" else [row]:
            self._part(piece, moderate)

    def _part(self, row: Tensor, moderate: bool = False) -> None:
        powers = (row.view(_BITS[row.dtype]) & _SIGN_AND_EXPONENT[row.dtype]).view(row.dtype)
        part = row if self.end == 1 else _up_to(self.end, row, powers)
        if self.begin > 0:
            part = part - _up_to(self.begin, row, powers)
        if moderate or is_finite(part):
            torch.copysign(part, row, out=row)  # a part of -0.0 is -0.0, which changes no sum
            return
        large = row.isfinite() & (row.abs() > torch.finfo(row.dtype).max / 2)
        part = torch.where(row.isfinite(), part.copysign(row), row)
        if large.any():
            fourth = row[large] / 4
            self._part(fourth)
            part[large] = fourth * 4  # both exact, since these entries are large
        row.copy_(part)


def _up_to(share: float, row: Tensor, powers: Tensor) -> Tensor:
    """Return ``share`` of each entry, rounded to a multiple of the last digit of the entry itself.

    Args:
        share: From 0 to 1.
        row: The entries.
        powers: Of two: for each entry the largest that is not larger.

    """
    if share > 0.5:
        return row - _up_to(1 - share, row, powers)  # exact
    total = row * share
    total += powers  # to between this power and the next, where numbers have the entry's spacing: this rounds
    total -= powers  # exact
    return total


def is_finite(row: Tensor) -> bool:
    """Whether all entries are certainly finite; also false where their sum overflows. One pass."""
    return bool(row.sum().isfinite())
