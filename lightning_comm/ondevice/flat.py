"""Rows of real entries made of tensors, and the distance of such rows from a mean."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_RUNS, _RUN_LENGTH = 64, 64  # the entries of a bucket from which its drift is estimated


class Drift(NamedTuple):
    """The distance of this rank from the mean, as squared norms over all averaged entries.

    Both are estimated from 4,096 entries spread over each bucket, within some 5 %: to read all entries twice more would
    cost a good part of what averaging costs. Buckets with no more than that are read whole.
    """

    distance_sq: float
    mean_sq: float

    def plus(self, other: "Drift") -> "Drift":
        """Return the drift over the entries of both."""
        return Drift(self.distance_sq + other.distance_sq, self.mean_sq + other.mean_sq)

    @property
    def relative(self) -> float:
        """The distance as a share of the norm of the mean; 0.0 where the mean is zero."""
        return math.sqrt(self.distance_sq / self.mean_sq) if self.mean_sq != 0 else 0.0


class DriftSum:
    """The parts of a drift, which stay on the device that computed them until :meth:`read`.

    On CUDA :meth:`read` waits for the device, once for all buckets; nothing else waits.
    """

    def __init__(self, *parts: tuple[Tensor, Tensor]) -> None:
        self._parts = list(parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._parts)

    def add(self, part: tuple[Tensor, Tensor]) -> None:
        """Add the result of :func:`drift_of` for one bucket."""
        self._parts.append(part)

    def extend(self, other: "DriftSum") -> None:
        """Add the drift over other entries."""
        self._parts += other

    def read(self) -> Drift:
        """Return the sums."""
        total = Drift(0.0, 0.0)
        for drift in read_parts(self._parts):
            total = total.plus(drift)
        return total


def read_parts(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Drift]:
    """Copy the drift of each bucket to the host, in one copy for each device."""
    found: dict[int, Drift] = {}
    for device in dict.fromkeys(distance.device for distance, _ in parts):
        there = [k for k, (distance, _) in enumerate(parts) if distance.device == device]
        rows = torch.stack([number for k in there for number in parts[k]]).view(-1, 2).tolist()
        found |= {k: Drift(*row) for k, row in zip(there, rows, strict=True)}
    return [found[k] for k in range(len(parts))]


class Flat(NamedTuple):
    """A tensor as a row of real entries: a view where memory allows it, otherwise a copy to be written back."""

    entries: Tensor
    copied_from: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> "Flat":
        """Return the entries in the order in which they lie in memory, those of an expanded tensor once."""
        tensor = distinct(tensor.detach())
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if real.is_contiguous():
            return cls(real.view(-1), None)
        if _fills_its_memory(real):
            # entries in the order of memory, so that channels_last is no special case
            return cls(real.as_strided((real.numel(),), (1,), real.storage_offset()), None)
        return cls(real.reshape(-1).clone(), real)

    @property
    def accumulation_type(self) -> torch.dtype:
        """The type in which entries are summed: float32 for narrower types."""
        return torch.float64 if self.entries.dtype == torch.float64 else torch.float32

    def write_back(self) -> None:
        """Write changed entries back to the tensor, where they are a copy."""
        if self.copied_from is not None:
            self.copied_from.copy_(self.entries.view(self.copied_from.shape))


def distinct(tensor: Tensor) -> Tensor:
    """Return a view that has each entry of an expanded tensor once, so that it can be written to.

    Example:
        >>> distinct(torch.zeros(3, 1).expand(3, 5)).shape
        torch.Size([3, 1])

    """
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether the entries lie next to each other in memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def sample(bucket: Tensor) -> Tensor:
    """Copy evenly spaced runs of entries; runs, since each single entry would cost a fetch from memory."""
    if bucket.numel() <= _RUNS * _RUN_LENGTH:
        return bucket.clone()
    runs = bucket.as_strided((_RUNS, _RUN_LENGTH), (bucket.numel() // _RUNS, 1), bucket.storage_offset())
    return runs.clone(memory_format=torch.contiguous_format).view(-1)


def drift_of(bucket_entries: int, own: Tensor, mean: Tensor, *, moderate: bool = False) -> tuple[Tensor, Tensor]:
    """Estimate how far this rank's part of a bucket was from the mean, from samples of both.

    Args:
        bucket_entries: How many entries the bucket has.
        own: The sample of this rank's entries.
        mean: That of the mean.
        moderate: Whether all entries are known to be so small that a sum of squares cannot overflow.

    Returns:
        The numbers of a :class:`Drift`, for a :class:`DriftSum`.

    """
    share = bucket_entries / own.numel()
    distance_sq, mean_sq = (squared_norm([row], moderate=moderate) for row in (own.sub_(mean), mean))
    return distance_sq * share, mean_sq * share


def squared_norm(rows: list[Tensor], *, moderate: bool = False) -> Tensor:
    """Return the sum of the squares of all entries; infinite, and no error, where that is too large for a float.

    Args:
        rows: The entries.
        moderate: Whether the sum is known to be finite; otherwise the host checks, and on CUDA waits for that.

    """
    norms = torch.stack(torch._foreach_norm(rows)).double()
    if not moderate and not norms.isfinite().all():  # a square was too large; this takes ten times as long
        norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows])
    return norms.square().sum()
