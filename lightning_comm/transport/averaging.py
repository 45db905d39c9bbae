"""Averaging tensors over the ranks, in place and in buckets."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_comm.transport.recording import Pending, Recorder

_RUNS, _RUN_LENGTH = 64, 64  # of entries of a bucket, from which its drift is estimated
_IN_FLIGHT = 3  # buckets: gloo sends two at a time, and the third is packed or unpacked meanwhile


@dataclass(frozen=True)
class Averaging:
    """How a synchronisation is carried out.

    Args:
        bucket_mib: Size of the scratch buckets, in MiB; more than 0. Tensors are copied into buckets, and a bucket is
            one message. Three are in use at a time. The default comes from the tables that ``make benchmark`` prints:
            on a network small buckets hide more of the copying, on loopback larger ones waste less time on latency.

    Raises:
        ValueError: If ``bucket_mib`` is not a positive number.

    Example:
        >>> Averaging(bucket_mib=0.5).bucket_bytes
        524288

    """

    bucket_mib: float = 4.0

    def __post_init__(self) -> None:
        valid = isinstance(self.bucket_mib, (int, float)) and not isinstance(self.bucket_mib, bool)
        if not valid or not (math.isfinite(self.bucket_mib) and self.bucket_bytes >= 8):
            raise ValueError(
                f"Averaging: `bucket_mib` is a size in MiB, so it must be a number > 0, with room for an entry of 8 "
                f"bytes; got {self.bucket_mib!r}. 4 is a good size."
            )

    @property
    def bucket_bytes(self) -> int:
        """The bucket size in bytes."""
        return int(self.bucket_mib * 2**20)


class Drift(NamedTuple):
    """How far this rank was from the mean, as squared norms over all averaged entries.

    Both are estimated from 4,096 entries spread over each bucket, within some 5 %: to read all of them twice more would
    cost a good part of what averaging them does. Buckets that have no more are taken whole.
    """

    distance_sq: float
    mean_sq: float

    def plus(self, other: "Drift") -> "Drift":
        """Return the drift over the entries of both."""
        return Drift(self.distance_sq + other.distance_sq, self.mean_sq + other.mean_sq)

    @property
    def relative(self) -> float:
        """The distance as a share of the norm of the mean; 0.0 where the mean is zero."""
        return math.sqrt(self.distance_sq / self.mean_sq) if self.mean_sq > 0 else 0.0


class Averager:
    """Replaces tensors by their means over the ranks, in place.

    Args:
        recorder: Sends and records.
        bucket_bytes: Size of a bucket; at least one entry of the widest type.

    Note:
        *Communication.* One all-reduce a bucket, in the order of the tensors within each accumulation type. The payload
        is 4 bytes an entry (8 for float64, and twice that for complex types), since narrower types are summed in
        float32.

        *Memory.* Three buckets, whatever the size of the model. They are kept, since fresh memory costs as much time
        as a pass over the model.

    """

    def __init__(self, recorder: Recorder, bucket_bytes: int) -> None:
        self._recorder = recorder
        self._bucket_bytes = bucket_bytes
        self._scratch: dict[torch.device, list[Tensor]] = {}

    def average_(self, tensors: Sequence[Tensor], purpose: str) -> Drift:
        """Replace every tensor by its mean over the ranks.

        Args:
            tensors: Floating-point or complex tensors, in an order and of shapes that are the same on all ranks.
                Storage stays where it is, so optimizers, views and compiled code that hold it go on working.
            purpose: What the records say that the messages were for.

        Returns:
            How far this rank's tensors were from the mean.

        """
        drift = Drift(0.0, 0.0)
        flat = [_Flat.of(tensor) for tensor in tensors]
        for (device, dtype), group in _by_accumulation_type(flat):
            rows = [tensor.entries for tensor in group]
            scratch = self._buckets_of(device, dtype, sum(row.numel() for row in rows))
            travelling: deque[_Travelling] = deque()
            for turn, pieces in enumerate(_buckets(rows, max(1, self._bucket_bytes // dtype.itemsize))):
                if len(travelling) == _IN_FLIGHT:
                    drift = drift.plus(self._unpack(travelling.popleft()))
                used = _pack(pieces, scratch[turn % _IN_FLIGHT])
                own = _sample(used)
                travelling.append(_Travelling(pieces, used, own, self._recorder.all_reduce(used, purpose)))
            while travelling:
                drift = drift.plus(self._unpack(travelling.popleft()))
        for tensor in flat:
            tensor.write_back()
        return drift

    def _buckets_of(self, device: torch.device, dtype: torch.dtype, entries: int) -> list[Tensor]:
        size = min(max(self._bucket_bytes, dtype.itemsize), entries * dtype.itemsize) // dtype.itemsize * dtype.itemsize
        kept = self._scratch.get(device, [])
        if not kept or kept[0].numel() < size:
            kept = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_IN_FLIGHT)]
            self._scratch[device] = kept
        return [bucket[: bucket.numel() // dtype.itemsize * dtype.itemsize].view(dtype) for bucket in kept]

    def _unpack(self, bucket: "_Travelling") -> Drift:
        bucket.pending.wait()
        world_size = self._recorder.world_size
        for piece, total in zip(bucket.pieces, _like(bucket.pieces, bucket.sums), strict=True):
            torch.div(total, world_size, out=piece)
        return _drift_of(bucket.sums.numel(), bucket.own_sample, _sample(bucket.sums).div_(world_size))


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


class _Travelling(NamedTuple):
    """A bucket on its way: where its entries come from, its sums once they are there, and a sample from before."""

    pieces: list[Tensor]
    sums: Tensor
    own_sample: Tensor
    pending: Pending


class _Flat(NamedTuple):
    """A tensor as a row of real entries: a view where memory allows it, otherwise a copy to be written back."""

    entries: Tensor
    copied_from: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> "_Flat":
        tensor = tensor.detach()
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if real.is_contiguous():
            return cls(real.view(-1), None)
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


def _sample(bucket: Tensor) -> Tensor:
    """Copy evenly spaced runs of entries; runs, since single ones would each cost a fetch from memory."""
    if bucket.numel() <= _RUNS * _RUN_LENGTH:
        return bucket.clone()
    runs = bucket.as_strided((_RUNS, _RUN_LENGTH), (bucket.numel() // _RUNS, 1), bucket.storage_offset())
    return runs.clone(memory_format=torch.contiguous_format).view(-1)


def _drift_of(bucket_entries: int, own: Tensor, mean: Tensor) -> Drift:
    """Estimate how far this rank's part of a bucket was from the mean, from samples of both."""
    share = bucket_entries / own.numel()
    distance, size = torch.linalg.vector_norm(own.sub_(mean)), torch.linalg.vector_norm(mean)
    return Drift(share * float(distance) ** 2, share * float(size) ** 2)


def _like(pieces: list[Tensor], row: Tensor) -> list[Tensor]:
    """Cut a row into views as long as the pieces."""
    return list(torch.split(row, [piece.numel() for piece in pieces]))
