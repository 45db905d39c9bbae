"""Averaging tensors over the ranks, in place and in buckets."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_comm.transport.recording import Pending, Recorder

_IN_FLIGHT = 2  # buckets: one is packed or unpacked while the other travels


@dataclass(frozen=True)
class Averaging:
    """How a synchronisation is carried out.

    Args:
        bucket_mib: Size of the scratch buckets, in MiB; more than 0. Tensors are copied into buckets, and a bucket is
            one message. Two are in use at a time. The default comes from the table that ``make benchmark`` prints: from
            8 MiB on the size makes no difference on loopback.

    Raises:
        ValueError: If ``bucket_mib`` is not a positive number.

    Example:
        >>> Averaging(bucket_mib=0.5).bucket_bytes
        524288

    """

    bucket_mib: float = 8.0

    def __post_init__(self) -> None:
        valid = isinstance(self.bucket_mib, (int, float)) and not isinstance(self.bucket_mib, bool)
        if not valid or not (math.isfinite(self.bucket_mib) and self.bucket_bytes >= 8):
            raise ValueError(
                f"Averaging: `bucket_mib` is a size in MiB, so it must be a number > 0, with room for an entry of 8 "
                f"bytes; got {self.bucket_mib!r}. 8 is a good size."
            )

    @property
    def bucket_bytes(self) -> int:
        """The bucket size in bytes."""
        return int(self.bucket_mib * 2**20)


class Drift(NamedTuple):
    """How far this rank was from the mean, as squared norms over all averaged entries."""

    distance_sq: float
    mean_sq: float

    @property
    def relative(self) -> float:
        """The distance as a share of the norm of the mean; 0.0 where the mean is zero."""
        return math.sqrt(self.distance_sq / self.mean_sq) if self.mean_sq > 0 else 0.0


def average_(tensors: Sequence[Tensor], recorder: Recorder, purpose: str, bucket_bytes: int) -> Drift:
    """Replace every tensor by its mean over the ranks, in place.

    Args:
        tensors: Floating-point or complex tensors, in an order and of shapes that are the same on all ranks. Storage
            stays where it is, so optimizers, views and compiled code that hold it go on working.
        recorder: Sends and records.
        purpose: What the records say that the messages were for.
        bucket_bytes: Size of a bucket; at least one entry of the widest type.

    Returns:
        How far this rank's tensors were from the mean.

    Note:
        *Communication.* One all-reduce a bucket, in the order of ``tensors`` within each accumulation type. The payload
        is 4 bytes an entry (8 for float64, and twice that for complex types), since narrower types are summed in
        float32.

        *Memory.* Two buckets, whatever the size of the model.

    """
    drift = Drift(0.0, 0.0)
    flat = [_Flat.of(tensor) for tensor in tensors]
    for (device, dtype), group in _by_accumulation_type(flat):
        capacity = max(1, bucket_bytes // dtype.itemsize)
        size = min(capacity, sum(tensor.entries.numel() for tensor in group))
        scratch = [torch.empty(size, dtype=dtype, device=device) for _ in range(_IN_FLIGHT) if size]
        travelling: deque[tuple[list[Tensor], Tensor, Pending]] = deque()
        for turn, pieces in enumerate(_buckets([tensor.entries for tensor in group], capacity)):
            if len(travelling) == _IN_FLIGHT:
                drift = _unpack(*travelling.popleft(), recorder.world_size, drift)
            used = _pack(pieces, scratch[turn % _IN_FLIGHT])
            travelling.append((pieces, used, recorder.all_reduce(used, purpose)))
        while travelling:
            drift = _unpack(*travelling.popleft(), recorder.world_size, drift)
    for tensor in flat:
        tensor.write_back()
    return drift


def broadcast_(tensors: Iterable[Tensor], recorder: Recorder, purpose: str, bucket_bytes: int) -> None:
    """Replace every tensor, of any type, by that of rank 0, in place.

    Note:
        *Communication.* One broadcast a bucket of bytes, on each device. *Memory.* One bucket.

    """
    by_device: dict[torch.device, list[_Flat]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(_Flat.of(tensor))
    for device, group in by_device.items():
        rows = [flat.entries.view(torch.uint8) for flat in group]
        scratch = torch.empty(min(bucket_bytes, sum(row.numel() for row in rows)), dtype=torch.uint8, device=device)
        for pieces in _buckets(rows, bucket_bytes):
            used = _pack(pieces, scratch)
            recorder.broadcast(used, purpose).wait()
            torch._foreach_copy_(pieces, _like(pieces, used))
        for flat in group:
            flat.write_back()


class _Flat(NamedTuple):
    """A tensor as a row of real entries: a view where memory allows it, otherwise a copy to be written back."""

    entries: Tensor
    copied_from: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> "_Flat":
        tensor = tensor.detach()
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if _fills_its_memory(real):
            # entries in the order of memory, so that channels_last is no special case
            return cls(real.as_strided((real.numel(),), (1,), real.storage_offset()), None)
        return cls(real.reshape(-1).clone(), real)

    def write_back(self) -> None:
        if self.copied_from is not None:
            self.copied_from.copy_(self.entries.view(self.copied_from.shape))


def _fills_its_memory(tensor: Tensor) -> bool:
    """Whether the entries lie next to each other in memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _by_accumulation_type(flat: list[_Flat]) -> list[tuple[tuple[torch.device, torch.dtype], list[_Flat]]]:
    groups: dict[tuple[torch.device, torch.dtype], list[_Flat]] = {}
    for tensor in flat:
        dtype = torch.float64 if tensor.entries.dtype == torch.float64 else torch.float32
        groups.setdefault((tensor.entries.device, dtype), []).append(tensor)
    return list(groups.items())


def _buckets(rows: list[Tensor], capacity: int) -> Iterator[list[Tensor]]:
    """Cut the rows, one after the other, into lists of views of ``capacity`` entries in all."""
    pieces: list[Tensor] = []
    room = capacity
    for row in rows:
        start = 0
        while start < row.numel():
            piece = row[start : start + room]
            pieces.append(piece)
            start += piece.numel()
            room -= piece.numel()
            if room == 0:
                yield pieces
                pieces, room = [], capacity
    if pieces:
        yield pieces


def _pack(pieces: list[Tensor], bucket: Tensor) -> Tensor:
    used = bucket[: sum(piece.numel() for piece in pieces)]
    torch._foreach_copy_(_like(pieces, used), pieces)
    return used


def _unpack(pieces: list[Tensor], used: Tensor, pending: Pending, world_size: int, drift: Drift) -> Drift:
    pending.wait()
    mean = used.div_(world_size)
    means = _like(pieces, mean)
    # The pieces are overwritten below, so their place serves for the difference: no third bucket.
    torch._foreach_sub_(pieces, means)
    distances = torch.stack(torch._foreach_norm(pieces, 2, mean.dtype))
    torch._foreach_copy_(pieces, means)
    mean_sq = float(torch.linalg.vector_norm(mean)) ** 2
    return Drift(drift.distance_sq + float(distances.square().sum()), drift.mean_sq + mean_sq)


def _like(pieces: list[Tensor], row: Tensor) -> list[Tensor]:
    """Cut a row into views as long as the pieces."""
    return list(torch.split(row, [piece.numel() for piece in pieces]))
