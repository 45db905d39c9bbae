"""An average of tensors over the members of a round, in place and in buckets, and the user's settings of averages.

Longer than other files, since a good part is what a user reads of the settings.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.arguments import is_number, is_whole
from lightning_comm.ondevice.buckets import copy_each, cut_into_buckets, pack, split_like, write_means
from lightning_comm.ondevice.flat import DriftSum, Flat, drift_of, sample
from lightning_comm.ondevice.model_tensors import DifferenceScope
from lightning_comm.ondevice.share import Share, is_finite
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.names import compression_of
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.recording import Pending, Recorder

_DEFAULT_MIB, _OTHER_MIB = {"nccl": 25.0}, 4.0  # by backend; that of NCCL is DDP's, and not measured
IN_FLIGHT = 3  # buckets: gloo sends two at a time, and the third is packed or unpacked meanwhile


@dataclass(frozen=True)
class Averaging:
    """How a synchronisation is carried out.

    Args:
        bucket_mib: Size of a bucket in MiB, more than 0; a bucket is one message, and three are in use at a time.
            ``None`` leaves it to the backend: 4, and 25 under NCCL.
        compression: What to send of the parameters: a :class:`Compression`, such as ``Cast("bf16")``, or its name:
            ``"bf16"``, ``"fp16"``, ``"int8"``, ``"powersgd"``, ``"topk"``; ``None``: all in full. A
            :class:`SparseMask`, alone or in a list with one more, prunes the model and sends what is left.
        overlap_steps: For how many optimizer steps of the next round an average is in flight before it is applied; at
            most the length of the round less one. 0 waits at the end of the round.

    Raises:
        ValueError: If ``bucket_mib`` is not a positive number, the compression is unknown or cannot be used here, or
            ``overlap_steps`` is not a whole number >= 0.

    Note:
        *Communication.* One all-reduce a bucket, or what the compression sends of it. Buffers, weight averages and
        optimizer state are sent in full, and so is everything at the end of a run, in evaluations and in checkpoints.

        *Memory.* Three buckets. With a compression a copy of the parameters, and twelve buckets while they are sent;
        with ``overlap_steps`` three copies, and the messages under way.

        What ``overlap_steps`` means for staleness, evaluations and checkpoints: ``docs/techniques/local_update.md``.

    Example:
        >>> Averaging().bucket_bytes_under("gloo"), Averaging().bucket_bytes_under("nccl")
        (4194304, 26214400)
        >>> Averaging(bucket_mib=0.5).bucket_bytes_under("nccl")
        524288
        >>> Averaging(compression="bf16").compression
        Cast(dtype='bf16')
        >>> Averaging(overlap_steps=3).method
        Full()

    """

    bucket_mib: float | None = None
    compression: Compression | str | list[Compression | str] | None = None
    overlap_steps: int = 0

    def __post_init__(self) -> None:
        if self.bucket_mib is not None and not _is_size(self.bucket_mib):
            raise ValueError(
                f"Averaging: `bucket_mib` is a size in MiB, so it must be a number > 0, with room for an entry of 8 "
                f"bytes; got {self.bucket_mib!r}. None leaves it to the backend; 4 is a good size for gloo."
            )
        if self.compression is not None:
            object.__setattr__(self, "compression", _usable(compression_of(self.compression, "Averaging")))
        if not is_whole(self.overlap_steps) or self.overlap_steps < 0:
            raise ValueError(
                f"Averaging: `overlap_steps` counts optimizer steps, so it must be a whole number >= 0; got "
                f"{self.overlap_steps!r}. 0 waits for the average at the end of a round."
            )

    @property
    def method(self) -> Compression | None:
        """How differences to a common reference are sent, or ``None`` where parameters are averaged as they are."""
        if self.compression is None:
            return Full() if self.overlap_steps else None
        return compression_of(self.compression, "Averaging")

    @property
    def difference_scope(self) -> DifferenceScope:
        """Of which parameters differences to a common reference are sent, and not the parameters themselves."""
        method = self.method
        return "none" if method is None else "all" if isinstance(method, Full) else "real"

    def bucket_bytes_under(self, backend: str | None) -> int:
        """Return the bucket size in bytes, where a backend of torch sends the buckets."""
        mib = _DEFAULT_MIB.get(backend or "", _OTHER_MIB) if self.bucket_mib is None else self.bucket_mib
        return int(mib * 2**20)


def _is_size(mib: object) -> bool:
    return is_number(mib) and math.isfinite(mib) and int(mib * 2**20) >= 8


def _usable(compression: Compression) -> Compression:
    """Refuse methods under which ranks would drift apart without bound."""
    if isinstance(compression, NoSync):
        raise ValueError(
            f"Averaging: `compression` must send something, since ranks that train apart would never meet; got "
            f"{compression!r}. To see what a run without communication costs, give FixedPeriod a period as long as it."
        )
    if isinstance(compression.then if isinstance(compression, SparseMask) else compression, Ternary):
        raise ValueError(
            f"Averaging: `compression` must drop less than it is given, since what it drops stays in the weights and "
            f"comes back in the next round; got {compression!r}, whose rounding error is many times as large as what "
            "it rounds, so that ranks drift ever further apart. Int8() or TopK(0.01) keep them together."
        )
    return compression


class Average(Protocol):
    """A method that averages tensors over all members, in place: in full, or as far as a compression sends them."""

    def average_(
        self, tensors: Mapping[str, Tensor], weight: float | None = None, *, moderate: bool = False
    ) -> DriftSum:
        """Average the tensors; block until that is done.

        Args:
            tensors: The tensors, by name, in an order and of shapes that are the same on all ranks. Storage stays where
                it is, so optimizers, views and compiled code that hold it go on working.
            weight: This rank's weight in the mean; those of all ranks sum to 1, and all are a :class:`Share` or
                none is. ``None`` on all ranks: equally.
            moderate: Whether all ranks know that no entry of any of them is so large that a sum may have no room in its
                type. Then the host need not look at each bucket, for which it would wait on CUDA. The result is the
                same.

        Returns:
            How far this rank's tensors were from the mean, as far as that is known.

        """
        ...


class FullAverage:
    """Replaces tensors by their means over the ranks, in place.

    Args:
        recorder: Sends and records.
        bucket_bytes: Size of a bucket; at least one entry of the widest type.

    A mean of finite numbers is finite, the mean of equal numbers is that number (also ``inf`` and ``nan``), and a rank
    of weight 0 contributes nothing, whatever it holds. Equal numbers stay equal bit for bit, unless weights are
    plain numbers: then they may change in the last digit. Where more than two ranks count, that takes more than a sum
    that is divided, which loses digits; see :meth:`Share.part_`.

    Note:
        *Communication.* One all-reduce a bucket, in the order of the tensors within each accumulation type. The payload
        is 4 bytes an entry (8 for float64, and twice that for complex types), since narrower types are summed in
        float32. A bucket whose sums are not all finite, which all ranks see alike, has one number more, which says
        whether a sum may just have been too large; if so, those entries once more.

        *Memory.* Three buckets, whatever the size of the model. They are kept, since to allocate memory takes as long
        as a pass over the model.

    """

    def __init__(self, recorder: Recorder, bucket_bytes: int) -> None:
        self._recorder = recorder
        self._bucket_bytes = bucket_bytes
        self._scratch: dict[torch.device, list[Tensor]] = {}

    def average_(
        self,
        tensors: Mapping[str, Tensor],
        weight: float | None = None,
        *,
        moderate: bool = False,
        purpose: str = "parameters",
    ) -> DriftSum:
        """Replace every tensor by its mean over the ranks.

        Args:
            tensors: Floating-point or complex tensors, as for :meth:`Average.average_`.
            weight: This rank's weight, as there.
            moderate: Whether all ranks know that no entry is infinite, not a number, or above
                :data:`~lightning_comm.ondevice.limits.MODERATE`.
            purpose: The purpose of the messages in the ledger.

        Returns:
            How far this rank's tensors were from the mean.

        """
        drift, members = DriftSum(), self._recorder.members
        if weight is None and members.size > 2:
            weight = members.share()
        flat = [Flat.of(tensor) for tensor in tensors.values()]
        for (device, dtype), group in _by_accumulation_type(flat):
            rows = [tensor.entries for tensor in group]
            scratch = self._buckets_of(device, dtype, sum(row.numel() for row in rows))
            travelling: deque[_Travelling] = deque()
            for turn, pieces in enumerate(cut_into_buckets(rows, max(1, self._bucket_bytes // dtype.itemsize))):
                if len(travelling) == IN_FLIGHT:
                    drift.add(self._unpack(travelling.popleft(), weight, moderate))
                used = pack(pieces, scratch[turn % IN_FLIGHT])
                own = sample(used)
                # in the accumulation type, and after the sample, which is of this rank's own
                _weigh(used, weight, moderate)
                travelling.append(_Travelling(pieces, used, own, self._recorder.all_reduce(used, purpose), purpose))
            while travelling:
                drift.add(self._unpack(travelling.popleft(), weight, moderate))
        for tensor in flat:
            tensor.write_back()
        return drift

    def _unpack(self, bucket: "_Travelling", weight: float | None, moderate: bool) -> tuple[Tensor, Tensor]:
        bucket.pending.wait()
        sums = bucket.sums
        ranks = self._recorder.world_size if weight is None else 1
        # a tensor, since CUDA multiplies by the reciprocal of a number, and 3 x times that is not always x
        divisor = torch.full((), ranks, dtype=sums.dtype, device=sums.device)
        if moderate or is_finite(sums):
            own, mean = bucket.own_sample, sample(sums).div_(divisor)
            write_means(bucket.pieces, sums, None if ranks == 1 else divisor)
            return drift_of(sums.numel(), own, mean, moderate=moderate)
        where = (~sums.isfinite()).nonzero().flatten()
        mended = self._mean_of_large(where, bucket, weight)
        means = sums.div_(divisor)
        if mended is not None:
            means[where] = mended
        copy_each(bucket.pieces, split_like(bucket.pieces, means))
        return drift_of(means.numel(), bucket.own_sample, sample(means))

    def _mean_of_large(self, where: Tensor, bucket: "_Travelling", weight: float | None) -> Tensor | None:
        """Return the mean of entries whose sum is not finite, or ``None`` if no sum was just too large.

        All ranks have the same sums, so all are here for the same entries.
        """
        own = torch.cat([piece.to(bucket.sums.dtype) for piece in bucket.pieces])[where]
        ranks, largest = self._recorder.world_size, torch.finfo(own.dtype).max
        counts = weight is None or weight > 0
        may_overflow = (own.isfinite() & (own.abs() > largest / (2 * ranks))).any() & counts
        vote = may_overflow.to(own.dtype).view(1)
        self._recorder.all_reduce(vote, bucket.purpose, dist.ReduceOp.MAX).wait()
        if vote.item() == 0:  # a rank holds `inf` or `nan`, as in an attention mask
            return None
        _weigh(own, weight)
        scale = 2.0 ** (ranks.bit_length() + 1)  # a power of two, which rounds nothing that is large
        own.div_(scale)
        self._recorder.all_reduce(own, bucket.purpose).wait()
        if weight is None:
            own.div_(torch.full((), ranks, dtype=own.dtype, device=own.device))
        rounded = own.isfinite() & (own.abs() > largest / scale)
        return torch.where(rounded, own.sign() * largest, own * scale)

    def _buckets_of(self, device: torch.device, dtype: torch.dtype, entries: int) -> list[Tensor]:
        size = min(max(self._bucket_bytes, dtype.itemsize), entries * dtype.itemsize) // dtype.itemsize * dtype.itemsize
        kept = self._scratch.get(device, [])
        if not kept or kept[0].numel() < size:
            kept = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(IN_FLIGHT)]
            self._scratch[device] = kept
        return [bucket[: bucket.numel() // dtype.itemsize * dtype.itemsize].view(dtype) for bucket in kept]


def broadcast_(tensors: Iterable[Tensor], recorder: Recorder, purpose: str, bucket_bytes: int) -> None:
    """Replace every tensor, of any type, by that of rank 0, in place.

    Note:
        *Communication.* One broadcast a bucket of bytes, on each device. *Memory.* One bucket.

    """
    by_device: dict[torch.device, list[Flat]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(Flat.of(tensor))
    for device, group in by_device.items():
        rows = [flat.entries.view(torch.uint8) for flat in group]
        scratch = torch.empty(min(bucket_bytes, sum(row.numel() for row in rows)), dtype=torch.uint8, device=device)
        for pieces in cut_into_buckets(rows, bucket_bytes):
            used = pack(pieces, scratch)
            recorder.broadcast(used, purpose).wait()
            copy_each(pieces, split_like(pieces, used))
        for flat in group:
            flat.write_back()


class _Travelling(NamedTuple):
    """A bucket on its way: where its entries come from, its sums once they are there, and a sample from before."""

    pieces: list[Tensor]
    sums: Tensor
    own_sample: Tensor
    pending: Pending
    purpose: str


def _weigh(row: Tensor, weight: float | None, moderate: bool = False) -> None:
    """Replace entries by what this rank contributes to their sum."""
    if weight == 0:
        row.fill_(-0.0)  # the one number that changes no sum, not even that of others' -0.0
    elif isinstance(weight, Share):
        weight.part_(row, moderate=moderate)
    elif weight is not None:
        row.mul_(weight)


def _by_accumulation_type(flat: list[Flat]) -> list[tuple[tuple[torch.device, torch.dtype], list[Flat]]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Flat]] = {}
    for tensor in flat:
        groups.setdefault((tensor.entries.device, tensor.accumulation_type), []).append(tensor)
    return list(groups.items())
