"""An average of parameters in which each rank sends, compressed, its difference to a reference that all share.

Longer than other files, since the rules that keep ranks from drifting apart are explained where they are applied.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_comm.core import plain_settings
from lightning_comm.ondevice.buckets import copy_each
from lightning_comm.ondevice.flat import DriftSum, Flat, sample
from lightning_comm.ondevice.limits import drop_unsent_, is_large, limit_, limit_differences_, limit_moved_
from lightning_comm.ondevice.references import References
from lightning_comm.transport.averaging import IN_FLIGHT
from lightning_comm.transport.compression.base import Codec, Compression, Context, Layout, Slot
from lightning_comm.transport.compression.concurrent import Talk
from lightning_comm.transport.departed_average import DepartedAverage, DepartedBucket, drift_from, scaled
from lightning_comm.transport.recording import Recorder


class CompressedAverage:
    r"""Averages parameters as far as a compression sends the ranks' differences to a common reference.

    All ranks hold the same reference :math:`x`; when it was made, it was the weights of every rank. At a
    synchronisation each rank sends :math:`s = C(d)`, the compressed form of its difference :math:`d = w - x`. All
    receive the mean :math:`m` of what was sent, and then

    .. math:: x \leftarrow x + m, \qquad w \leftarrow x + (d - s)

    so a rank's weights move by :math:`m - s`. What is dropped, :math:`d - s`, stays in the rank's own weights and is
    part of its next difference. So there is no residual besides: it would count twice what was dropped.

    The mean over the ranks of the weights moves by :math:`m - \bar s`: by nothing, where the codec returns exactly
    the mean of what was sent, and otherwise by the rounding of that mean (16 bits in ``Cast``, the second rounding of
    ``Int8``), which is the same on all ranks. After a synchronisation ranks are *not* equal, but the references are.

    *Weighted.* Where rank k has the weight :math:`w_k` in the mean, it sends :math:`s = C(a d)` with
    :math:`a = w_k` times the number of ranks, so that :math:`m` is :math:`\sum_k w_k d_k` where nothing is dropped, and
    moves by :math:`m - s/a`; what it keeps is :math:`d - s/a`. Then the weighted mean of the ranks' weights moves by
    :math:`m - \bar s` too. A rank of weight 0 sends zeros, and ends at the reference.

    *Near the limits.* A difference or a weight that is too large for its type becomes the largest finite number. Where
    the mean of what was sent is infinite (a sum that is too large, or a type of the wire that is too narrow), which all
    ranks see alike, nothing counts as sent, and the entry waits in each rank's own weights. Where reference and weights
    are the same ``inf``, their difference is 0.

    Args:
        recorder: Sends and records.
        compression: What to send of a difference.
        bucket_bytes: Size from which a bucket is full; it holds whole parameters.
        references: Those of the parameters; left out, none yet.

    Attributes:
        references: What the differences are taken from.

    Note:
        *Communication.* For each bucket what the compression sends for it, in the order of the parameters within each
        accumulation type. Three buckets are on their way at a time.

        *Memory.* The reference, as large as the parameters in their accumulation type (fp32, or fp64 for float64), and
        for each bucket on its way four rows of its size.

    """

    def __init__(
        self,
        recorder: Recorder,
        compression: Compression,
        bucket_bytes: int,
        references: References | None = None,
    ) -> None:
        self._compression = compression
        self._recorder = recorder
        self._codec = compression.codec(Context(recorder, "parameters", feedback=False))
        self._bucket_bytes = bucket_bytes
        self.references = References() if references is None else references
        # Buffers of the last departure, used again: for each bucket the row of its parameters, and what was sent.
        # To allocate them takes as long as two passes over them.
        self._kept_rows: dict[tuple[Slot, ...], tuple[Tensor, Tensor]] = {}

    @property
    def codec(self) -> Codec:
        """What sends the differences."""
        return self._codec

    @torch.no_grad()
    def average_(
        self, tensors: Mapping[str, Tensor], weight: float | None = None, *, moderate: bool = False
    ) -> DriftSum:
        """Bring the parameters together, in place.

        Args:
            tensors: Parameters that have a reference, as for :meth:`Average.average_`.
            weight: This rank's weight, as there.
            moderate: Whether all ranks know that no entry of the parameters and references of any of them is infinite,
                not a number, or above :data:`~lightning_comm.ondevice.limits.MODERATE_DIFFERENCES`.

        Returns:
            How far this rank's parameters were from the new reference, the mean as far as it is known.

        """
        # A pipeline: while the messages of up to IN_FLIGHT buckets are under way, the next bucket is prepared.
        drift, scale = DriftSum(), self._scale(weight)
        travelling: deque[_Travelling] = deque()
        self._codec.begin_step()
        for bucket in self._buckets(tensors):
            if len(travelling) == IN_FLIGHT:
                drift.add(self._take(travelling.popleft()))
            started = self._start(bucket, scale, moderate)
            for earlier in travelling:  # the same order on every rank, or second messages would meet others' first ones
                if earlier.talk.more:
                    earlier.talk.go_on()
            travelling.append(started)
        while travelling:
            drift.add(self._take(travelling.popleft()))
        self._codec.end_step()
        return drift

    @torch.no_grad()
    def depart(
        self, tensors: Mapping[str, Tensor], weight: float | None = None, *, moderate: bool = False
    ) -> DepartedAverage:
        """Copy the present parameters, for a thread to average while training goes on with the parameters themselves.

        Args:
            tensors: Parameters that have a reference, as in :meth:`average_`.
            weight: This rank's weight in the mean.
            moderate: What all ranks know of the present parameters, as there.

        Note:
            *Memory.* Two rows as large as the parameters, which are kept, and the messages under way; on a rank of
            weight 0 one more row meanwhile.

        """
        self._codec.begin_step()
        buckets = [self._noted(bucket) for bucket in self._buckets(tensors)]
        self._kept_rows = {bucket.layout.slots: (bucket.row, bucket.sent) for bucket in buckets}
        return DepartedAverage(buckets, self.references, self._codec, self._recorder, self._scale(weight), moderate)

    def departed_before(self, state: Mapping[str, Any]) -> DepartedAverage:
        """Return what was in flight when :meth:`state_dict` was called; its messages have arrived."""
        buckets = []  # Landing needs the correction alone, so the same row takes the place of what was sent.
        for saved in state.get("in_flight", []):
            slots = tuple(Slot(name, numel, tuple(shape)) for name, numel, shape in saved["slots"])
            (reference,) = self.references.of([slots[0].name])
            row = saved["correction"].to(reference.device, copy=True)
            drifts = DriftSum(*(tuple(torch.tensor(drift, dtype=torch.float64)) for drift in saved["drifts"]))
            buckets.append(DepartedBucket(Layout(slots), row, row, drifts, [is_large(row)]))
        return DepartedAverage(buckets, self.references, self._codec, self._recorder, 1.0, moderate=False)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, by parameter name, besides the average in flight.

        The references are the same on all ranks.
        """
        return {
            "reference": self.references.state_dict(),
            "compression": plain_settings.plain(self._compression),
            "codec": self._codec.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor], *, same: bool) -> None:
        """Restore what :meth:`state_dict` returned; under another compression, its references alone.

        Args:
            state: What was saved on this rank.
            parameters: The model's.
            same: Whether it was saved under the same compression. Agreed by all ranks: settings may hold something of
                a single rank, and a codec sends by its state.

        """
        self.references.load_state_dict(state["reference"], parameters)
        if same:
            self._codec.load_state_dict(state["codec"])

    def _scale(self, weight: float | None) -> float:
        return 1.0 if weight is None else weight * self._recorder.members.size

    def _noted(self, rows: list["_Parameter"]) -> DepartedBucket:
        layout = _layout_of(rows)
        row, sent = self._kept_rows.get(layout.slots) or (_empty(layout, rows), _empty(layout, rows))
        # Training waits for this, so it only copies: to subtract the reference here would take half as long again, and
        # the thread does that.
        copy_each(layout.split(row), [each.weights.entries for each in rows])
        return DepartedBucket(layout, row, sent, DriftSum(), [])

    def _buckets(self, tensors: Mapping[str, Tensor]) -> Iterator[list["_Parameter"]]:
        """Put whole parameters of one device and type together until a bucket is full."""
        open_buckets: dict[tuple[torch.device, torch.dtype], list[_Parameter]] = {}
        filled_bytes: Counter[tuple[torch.device, torch.dtype]] = Counter()
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            row = _Parameter(name, tuple(tensor.shape), Flat.of(tensor), *self.references.of([name]))
            key = (row.reference.device, row.reference.dtype)
            open_buckets.setdefault(key, []).append(row)
            filled_bytes[key] += row.reference.nbytes
            if filled_bytes[key] >= self._bucket_bytes:
                del filled_bytes[key]
                yield open_buckets.pop(key)
        yield from open_buckets.values()

    def _start(self, rows: list["_Parameter"], scale: float, moderate: bool) -> "_Travelling":
        layout = _layout_of(rows)
        difference = _empty(layout, rows)
        copy_each(layout.split(difference), [row.weights.entries for row in rows])
        torch._foreach_sub_(layout.split(difference), [row.reference for row in rows])
        # Where entries are known to be moderate they are not looked at: on CUDA the host would wait for the answer.
        large = not moderate and is_large(difference)
        if large:
            limit_differences_(difference, [row.reference for row in rows])
        own = sample(difference)  # before the scaling: drift is the distance of the weights themselves
        difference = scaled(difference, scale, moderate)
        mean, sent = difference.clone(), torch.empty_like(difference)
        talk = Talk(self._codec.mean(mean, layout, sent))
        return _Travelling(rows, difference, mean, sent, own, scale, large, moderate, talk)

    def _take(self, bucket: "_Travelling") -> tuple[Tensor, Tensor]:
        bucket.talk.finish()
        large = bucket.large or (not bucket.moderate and is_large(bucket.mean))
        if large:
            drop_unsent_(bucket.mean, bucket.sent)
            finite = bucket.difference.isfinite()  # of these alone an infinite rest below is an overflow
        dropped = bucket.difference.sub_(bucket.sent)
        if bucket.scale not in (0, 1):  # at 0 all of it is 0 already, and the rank ends at the reference
            dropped.div_(bucket.scale)
        if large:
            limit_(dropped, finite)
        sizes = [row.reference.numel() for row in bucket.rows]
        moved, left = list(torch.split(bucket.mean, sizes)), list(torch.split(dropped, sizes))
        references, weights = [row.reference for row in bucket.rows], [row.weights.entries for row in bucket.rows]
        torch._foreach_add_(references, moved)
        if large:
            limit_moved_(references, moved)
        # Reference plus rest, and not `w + (m - s)`: an entry that was sent in full ends exactly at the reference, and
        # so equal on all ranks. `limit_moved_` needs the rest as it was, hence the clones.
        sums = [each.clone() for each in left] if large else left
        torch._foreach_add_(sums, references)
        copy_each(weights, sums)
        if large:
            limit_moved_(weights, left)
        for row in bucket.rows:
            row.weights.write_back()
        return drift_from(references, bucket.own_sample, bucket.mean, bucket.moderate)


def _layout_of(rows: list["_Parameter"]) -> Layout:
    return Layout(tuple(Slot(row.name, row.reference.numel(), row.shape) for row in rows))


def _empty(layout: Layout, rows: list["_Parameter"]) -> Tensor:
    return torch.empty(layout.numel, dtype=rows[0].reference.dtype, device=rows[0].reference.device)


class _Parameter(NamedTuple):
    """A parameter in a bucket."""

    name: str
    shape: tuple[int, ...]
    weights: Flat
    reference: Tensor


class _Travelling(NamedTuple):
    """A bucket on its way.

    Args:
        rows: The parameters in it.
        difference: What is to be sent: the difference to the reference, times `scale`.
        mean: A copy of it, in which the codec leaves the mean over the ranks.
        sent: What this rank sent, as the others decode it.
        own_sample: A sample of the difference before it was scaled.
        scale: This rank's weight in the mean, times the number of ranks.
        large: Whether an entry of the difference is near the limit of its type.
        moderate: Whether it is known that nothing of this bucket is.
        talk: The codec's messages for this bucket.

    """

    rows: list[_Parameter]
    difference: Tensor
    mean: Tensor
    sent: Tensor
    own_sample: Tensor
    scale: float
    large: bool
    moderate: bool
    talk: Talk
