"""An average of copies of the parameters, made at the end of a round, which a thread carries out while they train on.

Training must not touch what the thread does. So the thread works on copies of the parameters, and while an average is
in flight only this thread moves the references.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_comm.ondevice.flat import DriftSum, Flat, drift_of, read_parts, sample, squared_norm
from lightning_comm.ondevice.limits import drop_unsent_, is_large, limit_, limit_differences_, limit_moved_
from lightning_comm.ondevice.references import References
from lightning_comm.transport.compression.base import Codec, Layout
from lightning_comm.transport.compression.concurrent import Talk
from lightning_comm.transport.recording import Recorder


class DepartedBucket(NamedTuple):
    """A bucket in the background.

    Args:
        layout: The layout of its parameters.
        row: The parameters; then, in place, the difference, the mean of what was sent, and at last the correction of
            the parameters.
        sent: What this rank sent.
        drifts: How far it was from the mean, once that is known.
        large: Whether a move is near the limit of its type, once that is known.

    """

    layout: Layout
    row: Tensor
    sent: Tensor
    drifts: DriftSum
    large: list[bool]


class DepartedAverage:
    """Copies of parameters, from which :meth:`travel` makes corrections; see :meth:`CompressedAverage.depart`.

    Args:
        buckets: The parameters as they were.
        references: What differences are taken from; they move when the mean has arrived.
        codec: Sends the differences.
        recorder: Records what is sent.
        scale: This rank's weight in the mean, times the number of members.
        moderate: What all ranks know of the parameters, as in :meth:`CompressedAverage.average_`.

    Note:
        *Communication.* The thread starts the first message of each bucket, then the second ones where a method has
        any, and so on, in the order of the buckets. So nothing else may be sent on their process group.

    """

    def __init__(
        self,
        buckets: list[DepartedBucket],
        references: References,
        codec: Codec,
        recorder: Recorder,
        scale: float,
        moderate: bool,
    ) -> None:
        self._buckets = buckets
        self._references = references
        self._codec = codec
        self._recorder = recorder
        self._scale = scale
        self._moderate = moderate

    def begin_flight(self) -> None:
        """Keep the members as they are, since this belongs to the ranks that have sent it, until it has landed."""
        self._recorder.members.begin_flight()

    def end_flight(self) -> None:
        """Note that it has landed."""
        self._recorder.members.end_flight()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._buckets[0].row.device if self._buckets else torch.device("cpu")

    @property
    def corrections(self) -> list[Tensor]:
        """The changes that landing adds to the parameters, once all has arrived."""
        return [bucket.row for bucket in self._buckets]

    @property
    def drift(self) -> DriftSum:
        """How far this rank's parameters were from the new reference when they departed, once all has arrived."""
        drift = DriftSum()
        for bucket in self._buckets:
            drift.extend(bucket.drifts)
        return drift

    def travel(self) -> None:
        """Average what has departed, in the thread: move the references, and make corrections of the differences."""
        for bucket in self._buckets:
            torch._foreach_sub_(bucket.layout.split(bucket.row), self._references_of(bucket))
            if not self._moderate and is_large(bucket.row):
                limit_differences_(bucket.row, self._references_of(bucket))
        samples = [sample(bucket.row) for bucket in self._buckets]  # before the scaling, which is in place
        means = [scaled(bucket.row, self._scale, self._moderate) for bucket in self._buckets]
        talks = [
            Talk(self._codec.mean(mean, bucket.layout, bucket.sent))
            for bucket, mean in zip(self._buckets, means, strict=True)
        ]
        while any(talk.more for talk in talks):
            for talk in talks:
                if talk.more:
                    talk.go_on()
        for bucket, mean, talk, own in zip(self._buckets, means, talks, samples, strict=True):
            talk.finish()
            self._settle(bucket, mean, own)

    def _settle(self, bucket: DepartedBucket, mean: Tensor, own_sample: Tensor) -> None:
        """Move the references by the mean, and leave the correction in the bucket's row."""
        large = not self._moderate and (is_large(mean) or is_large(bucket.row))
        if large:
            drop_unsent_(mean, bucket.sent)
            finite = bucket.row.isfinite()
        references, moves = self._references_of(bucket), bucket.layout.split(mean)
        torch._foreach_add_(references, moves)
        if large:
            limit_moved_(references, moves)
        bucket.drifts.add(drift_from(references, own_sample, mean, self._moderate))
        # The correction is the mean less what this rank sent, in units of its weights.
        if self._scale == 0:  # nothing was sent, and the row still holds the difference: all of it is taken back
            torch.sub(mean, bucket.row, out=bucket.row)
        else:  # `mean` is the row itself
            bucket.row.sub_(bucket.sent, alpha=1 / self._scale)
        if large:
            limit_(bucket.row, finite)
        bucket.large.append(large)

    def _references_of(self, bucket: DepartedBucket) -> list[Tensor]:
        return self._references.of(slot.name for slot in bucket.layout.slots)

    def arrived(self) -> None:
        """Record the messages, and end the codec's step: called by the thread that trains, when this one is done."""
        self._recorder.write_held()
        self._codec.end_step()

    @torch.no_grad()
    def correct_(self, tensors: Mapping[str, Tensor]) -> None:
        """Move the parameters, or copies of them, by the mean of what was sent less what this rank sent.

        Args:
            tensors: The parameters by name, wherever they have moved since; those that did not depart stay as they are.

        """
        for bucket in self._buckets:
            corrections = zip(bucket.layout.slots, bucket.layout.split(bucket.row), strict=True)
            found = {slot.name: row for slot, row in corrections if slot.name in tensors}
            weights = [Flat.of(tensors[name]) for name in found]
            if found:
                torch._foreach_add_([each.entries for each in weights], list(found.values()))
            if any(bucket.large):
                limit_moved_([each.entries for each in weights], list(found.values()))
            for each in weights:
                each.write_back()

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state from which a resumed run can land, once all has arrived."""
        return [
            {
                "slots": [tuple(slot) for slot in bucket.layout.slots],
                "correction": bucket.row,
                "drifts": [tuple(drift) for drift in read_parts(list(bucket.drifts))],
            }
            for bucket in self._buckets
        ]


def scaled(row: Tensor, scale: float, moderate: bool) -> Tensor:
    """Return the part of a difference that a rank of this weight sends, in place where it sends anything.

    At weight 0 the difference stays in its row, since all of it is taken back at landing.
    """
    if scale == 0:
        return torch.zeros_like(row)
    if scale != 1:
        row.mul_(scale)
        if not moderate and is_large(row):
            limit_(row)
    return row


def drift_from(references: list[Tensor], own_sample: Tensor, mean: Tensor, moderate: bool) -> tuple[Tensor, Tensor]:
    """Return how far a rank was from the present references, which have moved by the mean."""
    distance_sq, _ = drift_of(mean.numel(), own_sample, sample(mean), moderate=moderate)
    return distance_sq, squared_norm(references, moderate=moderate)
