"""Averaging parameters through what a compression sends of their differences to a common reference.

Longer than other files, since blocking averages and those in the background share references and buckets.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_comm.core.plain_settings import difference, plain
from lightning_comm.ondevice.flat import DriftSum, Flat, drift_of, read_parts, sample, squared_norm
from lightning_comm.ondevice.limits import drop_unsent_, is_large, limit_, limit_differences_, limit_moved_
from lightning_comm.transport.averaging import IN_FLIGHT, copy_each
from lightning_comm.transport.background_tasks import Errand, Errands
from lightning_comm.transport.compression.base import Codec, Compression, Context, Layout, Slot
from lightning_comm.transport.compression.concurrent import Talk
from lightning_comm.transport.recording import Recorder


class DifferenceAverager:
    r"""Brings the ranks' parameters together as far as a compression sends what sets them apart.

    All ranks hold alike a reference :math:`x`, which was every rank's weights when it was made. At a synchronisation
    each rank sends :math:`s = C(d)` of its difference :math:`d = w - x`, all learn the mean :math:`m` of what was sent,
    and then

    .. math:: x \leftarrow x + m, \qquad w \leftarrow x + (d - s)

    so a rank's weights move by :math:`m - s`. What is dropped, :math:`d - s`, stays in the rank's own weights and is
    part of its next difference. No residual is kept besides, which would count it twice.

    The mean over the ranks of the weights moves by :math:`m - \bar s`: by nothing, where the codec returns exactly
    the mean of what was sent, and otherwise by the rounding of that mean (16 bits in ``Cast``, the second rounding of
    ``Int8``), which is the same on all ranks. After a synchronisation ranks are *not* equal, but the references are.

    *Weighted.* Where rank k counts for :math:`w_k` of the mean and not equally, it sends :math:`s = C(a d)` with
    :math:`a = w_k` times the number of ranks, so that :math:`m` is :math:`\sum_k w_k d_k` where nothing is dropped, and
    moves by :math:`m - s/a`; what it keeps is :math:`d - s/a`. Then the weighted mean of the ranks' weights moves by
    :math:`m - \bar s` too. A rank of weight 0 sends zeros, and takes up the reference.

    *Near the limits.* A difference or a weight that is too large for its type becomes the largest finite number. Where
    the mean of what was sent is infinite (a sum that is too large, or a type of the wire that is too narrow), which all
    ranks see alike, nothing counts as sent, and the entry waits in each rank's own weights. Where reference and weights
    are the same ``inf``, their difference is 0.

    Args:
        recorder: Sends and records.
        compression: What to send of a difference.
        bucket_bytes: Size from which a bucket is full; it holds whole parameters.

    Note:
        *Communication.* For each bucket what the compression sends for it, in the order of the parameters within each
        accumulation type. Three buckets are on their way at a time.

        *Memory.* The reference, as large as the parameters in their accumulation type (fp32, or fp64 for float64), and
        for each bucket on its way four rows of its size.

    """

    def __init__(self, recorder: Recorder, compression: Compression, bucket_bytes: int) -> None:
        self._compression = compression
        self._recorder = recorder
        self._codec = compression.codec(Context(recorder, "parameters", feedback=False))
        self._bucket_bytes = bucket_bytes
        self._reference: dict[str, Tensor] = {}
        self._flights: list[_Flight] = []
        self._errands = Errands()
        self._errand: Errand | None = None
        # of the last departure, for each bucket its row and what was sent: fresh memory costs as much as two passes
        self._kept_rows: dict[tuple[Slot, ...], tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        """The parameters that have a reference; the same on all ranks."""
        return set(self._reference)

    @property
    def references(self) -> list[Tensor]:
        """What the differences are taken from, one row for each name."""
        return list(self._reference.values())

    @property
    def codec(self) -> Codec:
        """What sends the differences."""
        return self._codec

    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the references anew from parameters that are equal on all ranks."""
        self._reference = {}
        self.refer_to(tensors)

    def refer_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Make references of further parameters that are equal on all ranks; those of the others stay."""
        for name, tensor in tensors.items():
            flat = Flat.of(tensor)
            self._reference[name] = flat.entries.to(flat.accumulation_type, copy=True)

    def forget(self, names: set[str]) -> None:
        """Drop references, because the parameters are averaged in full."""
        self._reference = {name: row for name, row in self._reference.items() if name not in names}

    @torch.no_grad()
    def average_(
        self, tensors: Mapping[str, Tensor], weight: float | None = None, *, moderate: bool = False
    ) -> DriftSum:
        """Bring the parameters together, in place.

        Args:
            tensors: Parameters that have a reference, by name, in an order that is the same on all ranks.
            weight: What this rank counts for in the mean; those of all ranks sum to 1. ``None`` on all ranks: equally.
            moderate: Whether all ranks know that no entry of the parameters and references of any of them is infinite,
                not a number, or above :data:`~lightning_comm.ondevice.limits.MODERATE_DIFFERENCES`. Then nothing can
                be near a limit, and the host need not look at each bucket, for which it would wait on CUDA.

        Returns:
            How far this rank's parameters were from the new reference, the mean as far as it is known.

        """
        drift, scale = DriftSum(), self._scale(weight)
        travelling: deque[_Travelling] = deque()
        self._codec.begin_step()
        for bucket in self._buckets(tensors):
            if len(travelling) == IN_FLIGHT:
                drift.add(self._take(travelling.popleft()))
            started = self._start(bucket, scale, moderate)
            for earlier in travelling:  # in this order on every rank, and never from a callback
                if earlier.talk.more:
                    earlier.talk.go_on()
            travelling.append(started)
        while travelling:
            drift.add(self._take(travelling.popleft()))
        self._codec.end_step()
        return drift

    def _scale(self, weight: float | None) -> float:
        return 1.0 if weight is None else weight * self._recorder.world_size

    # ---- in the background -------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether an average has departed and not landed."""
        return bool(self._flights)

    @property
    def corrections(self) -> list[Tensor]:
        """What landing would move the parameters by, once all has arrived."""
        return [flight.row for flight in self._flights]

    @torch.no_grad()
    def depart(self, tensors: Mapping[str, Tensor], weight: float | None = None, *, moderate: bool = False) -> None:
        """Note the parameters of now, and let a thread average their differences; they themselves stay as they are.

        Args:
            tensors: Parameters that have a reference, by name, in an order that is the same on all ranks.
            weight: What this rank counts for in the mean, as in :meth:`average_`.
            moderate: What all ranks know of the parameters of now, as there.

        Note:
            *Communication.* The thread starts the first message of each bucket, then the second ones where a method has
            any, and so on, in the order of the buckets. So nothing else may be sent on their process group.

            *Memory.* Two rows as large as the parameters, which are kept, and what is on its way; on a rank of weight
            0 one more meanwhile.

        """
        self._codec.begin_step()
        self._flights = [self._noted(bucket) for bucket in self._buckets(tensors)]
        self._kept_rows = {flight.layout.slots: (flight.row, flight.sent) for flight in self._flights}
        device = self._flights[0].row.device if self._flights else torch.device("cpu")
        scale = self._scale(weight)
        self._errand = self._errands.start(lambda: self._travel(scale, moderate), device)

    def _noted(self, rows: list["_Row"]) -> "_Flight":
        layout = _layout_of(rows)
        row, sent = self._kept_rows.get(layout.slots) or (_empty(layout, rows), _empty(layout, rows))
        # all that must be done before training goes on: a copy takes two thirds of the time of a difference
        copy_each(layout.split(row), [each.weights.entries for each in rows])
        return _Flight(layout, row, sent, DriftSum(), [])

    def _travel(self, scale: float, moderate: bool) -> None:
        """Average what has departed: move the references, and make corrections of the differences."""
        for flight in self._flights:
            torch._foreach_sub_(flight.layout.split(flight.row), self._references_of(flight))
            if not moderate and is_large(flight.row):
                limit_differences_(flight.row, self._references_of(flight))
        samples = [sample(flight.row) for flight in self._flights]
        means = [_scaled(flight.row, scale, moderate) for flight in self._flights]
        talks = [
            Talk(self._codec.mean(mean, flight.layout, flight.sent))
            for flight, mean in zip(self._flights, means, strict=True)
        ]
        while any(talk.more for talk in talks):
            for talk in talks:
                if talk.more:
                    talk.go_on()
        for flight, mean, talk, own in zip(self._flights, means, talks, samples, strict=True):
            talk.finish()
            self._settle(flight, mean, own, scale, moderate)

    def _settle(self, flight: "_Flight", mean: Tensor, own_sample: Tensor, scale: float, moderate: bool) -> None:
        """Move the references by the mean, and leave the correction in the flight's row."""
        large = not moderate and (is_large(mean) or is_large(flight.row))
        if large:
            drop_unsent_(mean, flight.sent)
            finite = flight.row.isfinite()
        references, moves = self._references_of(flight), flight.layout.split(mean)
        torch._foreach_add_(references, moves)
        if large:
            limit_moved_(references, moves)
        flight.drifts.add(_drift(references, own_sample, mean, moderate))
        if scale == 0:
            torch.sub(mean, flight.row, out=flight.row)
        else:
            flight.row.sub_(flight.sent, alpha=1 / scale)
        if large:
            limit_(flight.row, finite)
        flight.large.append(large)

    def _references_of(self, flight: "_Flight") -> list[Tensor]:
        return [self._reference[slot.name] for slot in flight.layout.slots]

    def arrive(self) -> None:
        """Wait until all has arrived. Changes no parameter."""
        if self._errand is not None:
            errand, self._errand = self._errand, None
            errand.join()
            self._recorder.write_held()
            self._codec.end_step()

    @property
    def is_sending(self) -> bool:
        """Whether messages have departed that :meth:`arrive` has not waited for."""
        return self._errand is not None

    def is_quiet(self, timeout_s: float) -> bool:
        """Wait for so long at most, and return whether nothing is on its way any more, for whatever reason."""
        return self._errand is None or self._errand.is_over(timeout_s)

    @torch.no_grad()
    def land_(self, tensors: Mapping[str, Tensor]) -> DriftSum:
        """Move the parameters by the mean of what was sent less what this rank sent.

        Args:
            tensors: The parameters by name, among them those that departed, wherever they have moved since.

        Returns:
            How far this rank's parameters were from the new reference when they departed.

        """
        self.correct_(tensors)
        drift = DriftSum()
        for flight in self._flights:
            drift.extend(flight.drifts)
        self._flights = []
        return drift

    @torch.no_grad()
    def correct_(self, tensors: Mapping[str, Tensor]) -> None:
        """Move the parameters, or copies of them, as landing would, and let the average fly on.

        Args:
            tensors: The parameters by name; those that did not depart stay as they are.

        """
        self.arrive()
        for flight in self._flights:
            corrections = zip(flight.layout.slots, flight.layout.split(flight.row), strict=True)
            found = {slot.name: row for slot, row in corrections if slot.name in tensors}
            weights = [Flat.of(tensors[name]) for name in found]
            if found:
                torch._foreach_add_([each.entries for each in weights], list(found.values()))
            if any(flight.large):
                limit_moved_([each.entries for each in weights], list(found.values()))
            for each in weights:
                each.write_back()

    # ---- buckets -----------------------------------------------------------------------------------------------------

    def _buckets(self, tensors: Mapping[str, Tensor]) -> Iterator[list["_Row"]]:
        """Put whole parameters of one device and type together until a bucket is full."""
        open_buckets: dict[tuple[torch.device, torch.dtype], list[_Row]] = {}
        filled_bytes: Counter[tuple[torch.device, torch.dtype]] = Counter()
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            row = _Row(name, tuple(tensor.shape), Flat.of(tensor), self._reference[name])
            key = (row.reference.device, row.reference.dtype)
            open_buckets.setdefault(key, []).append(row)
            filled_bytes[key] += row.reference.nbytes
            if filled_bytes[key] >= self._bucket_bytes:
                del filled_bytes[key]
                yield open_buckets.pop(key)
        yield from open_buckets.values()

    def _start(self, rows: list["_Row"], scale: float, moderate: bool) -> "_Travelling":
        layout = _layout_of(rows)
        difference = _empty(layout, rows)
        copy_each(layout.split(difference), [row.weights.entries for row in rows])
        torch._foreach_sub_(layout.split(difference), [row.reference for row in rows])
        large = not moderate and is_large(difference)
        if large:
            limit_differences_(difference, [row.reference for row in rows])
        own = sample(difference)
        difference = _scaled(difference, scale, moderate)
        mean, sent = difference.clone(), torch.empty_like(difference)
        talk = Talk(self._codec.mean(mean, layout, sent))
        return _Travelling(rows, difference, mean, sent, own, scale, large, moderate, talk)

    def _take(self, bucket: "_Travelling") -> tuple[Tensor, Tensor]:
        bucket.talk.finish()
        large = bucket.large or (not bucket.moderate and is_large(bucket.mean))
        if large:
            drop_unsent_(bucket.mean, bucket.sent)
            finite = bucket.difference.isfinite()
        dropped = bucket.difference.sub_(bucket.sent)
        if bucket.scale not in (0, 1):
            dropped.div_(bucket.scale)
        if large:
            limit_(dropped, finite)
        sizes = [row.reference.numel() for row in bucket.rows]
        moved, left = list(torch.split(bucket.mean, sizes)), list(torch.split(dropped, sizes))
        references, weights = [row.reference for row in bucket.rows], [row.weights.entries for row in bucket.rows]
        torch._foreach_add_(references, moved)
        if large:
            limit_moved_(references, moved)
        # not `w + (m - s)`: so what was sent in full ends exactly at the reference, and equal on all ranks
        sums = [each.clone() for each in left] if large else left
        torch._foreach_add_(sums, references)
        copy_each(weights, sums)
        if large:
            limit_moved_(weights, left)
        for row in bucket.rows:
            row.weights.write_back()
        return _drift(references, bucket.own_sample, bucket.mean, bucket.moderate)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, by parameter name, once what is in flight has arrived.

        The references are the same on all ranks.
        """
        self.arrive()
        return {
            "in_flight": [
                {
                    "slots": [tuple(slot) for slot in flight.layout.slots],
                    "correction": flight.row,
                    "drifts": [tuple(drift) for drift in read_parts(list(flight.drifts))],
                }
                for flight in self._flights
            ],
            "reference": dict(self._reference),
            "compression": plain(self._compression),
            "codec": self._codec.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` returned; under another compression, its references alone."""
        self._reference = {}
        for name, row in state["reference"].items():  # wherever it was read to, and whatever width the run had
            of = parameters[name]
            self._reference[name] = row.to(of.device, Flat.of(of).accumulation_type, copy=True)
        self._flights = []
        for saved in state.get("in_flight", []):
            slots = tuple(Slot(name, numel, tuple(shape)) for name, numel, shape in saved["slots"])
            row = saved["correction"].to(self._reference[slots[0].name].device, copy=True)
            drifts = DriftSum(*(tuple(torch.tensor(drift, dtype=torch.float64)) for drift in saved["drifts"]))
            self._flights.append(_Flight(Layout(slots), row, row, drifts, [is_large(row)]))  # its messages have arrived
        if difference(state["compression"], self._compression) is None:
            self._codec.load_state_dict(state["codec"])


def _layout_of(rows: list["_Row"]) -> Layout:
    return Layout(tuple(Slot(row.name, row.reference.numel(), row.shape) for row in rows))


def _empty(layout: Layout, rows: list["_Row"]) -> Tensor:
    return torch.empty(layout.numel, dtype=rows[0].reference.dtype, device=rows[0].reference.device)


def _scaled(row: Tensor, scale: float, moderate: bool) -> Tensor:
    """Return what a rank that counts for so much has to send of a difference, in place where it sends anything.

    Where nothing is sent the difference stays in its row, since all of it is taken back at landing.
    """
    if scale == 0:
        return torch.zeros_like(row)
    if scale != 1:
        row.mul_(scale)
        if not moderate and is_large(row):
            limit_(row)
    return row


def _drift(references: list[Tensor], own_sample: Tensor, mean: Tensor, moderate: bool) -> tuple[Tensor, Tensor]:
    """Return how far a rank was from the references of now, which have moved by the mean."""
    distance_sq, _ = drift_of(mean.numel(), own_sample, sample(mean), moderate=moderate)
    return distance_sq, squared_norm(references, moderate=moderate)


class _Row(NamedTuple):
    """A parameter in a bucket."""

    name: str
    shape: tuple[int, ...]
    weights: Flat
    reference: Tensor


class _Travelling(NamedTuple):
    """A bucket on its way.

    Args:
        rows: The parameters in it.
        difference: What is to be sent: the difference, times `scale`.
        mean: The same, which becomes the mean.
        sent: What this rank sent.
        own_sample: Of the difference itself.
        scale: What this rank counts for in the mean, times the number of ranks.
        large: Whether an entry of the difference is near the limit of its type.
        moderate: Whether it is known that nothing of this bucket is.
        talk: Its messages.

    """

    rows: list[_Row]
    difference: Tensor
    mean: Tensor
    sent: Tensor
    own_sample: Tensor
    scale: float
    large: bool
    moderate: bool
    talk: Talk


class _Flight(NamedTuple):
    """A bucket in the background.

    Args:
        layout: What lies in it.
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
