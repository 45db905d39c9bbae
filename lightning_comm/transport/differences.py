"""Averaging parameters through what a compression sends of their differences to a common reference."""

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_comm.transport.averaging import IN_FLIGHT
from lightning_comm.transport.compression.base import Codec, Compression, Context, Layout, Slot
from lightning_comm.transport.compression.conversations import Talk
from lightning_comm.transport.flat import Drift, Flat, drift_of, sample
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
        self._codec = compression.codec(Context(recorder, "parameters", feedback=False))
        self._bucket_bytes = bucket_bytes
        self._reference: dict[str, Tensor] = {}
        self._flights: list[_Flight] = []
        self._arrived = True
        # for each bucket its mean and what was sent: fresh memory costs as much time as two passes over it
        self._kept_rows: dict[tuple[Slot, ...], tuple[Tensor, Tensor]] = {}

    @property
    def names(self) -> set[str]:
        """The parameters that have a reference; the same on all ranks."""
        return set(self._reference)

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
    def average_(self, tensors: Mapping[str, Tensor]) -> Drift:
        """Bring the parameters together, in place.

        Args:
            tensors: Parameters that have a reference, by name, in an order that is the same on all ranks.

        Returns:
            How far this rank's parameters were from the new reference, the mean as far as it is known.

        """
        drift = Drift(0.0, 0.0)
        travelling: deque[_Travelling] = deque()
        self._codec.begin_step()
        for bucket in self._buckets(tensors):
            if len(travelling) == IN_FLIGHT:
                drift = drift.plus(self._take(travelling.popleft()))
            started = self._start(bucket)
            for earlier in travelling:  # in this order on every rank, and never from a callback
                if earlier.talk.more:
                    earlier.talk.go_on()
            travelling.append(started)
        while travelling:
            drift = drift.plus(self._take(travelling.popleft()))
        self._codec.end_step()
        return drift

    # ---- in the background -------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> bool:
        """Whether an average has departed and not landed."""
        return bool(self._flights)

    @torch.no_grad()
    def depart(self, tensors: Mapping[str, Tensor]) -> None:
        """Start to send the differences of now, and leave the parameters as they are.

        Args:
            tensors: Parameters that have a reference, by name, in an order that is the same on all ranks.

        Note:
            *Communication.* The first message of each bucket. Second ones, where a method needs what a first brought,
            start in :meth:`advance`, or when they are waited for: at moments that are the same on all ranks.

            *Memory.* Two rows as large as the parameters, which are kept, and what is on its way.

        """
        self._codec.begin_step()
        self._arrived = False
        self._flights = [self._depart(bucket) for bucket in self._buckets(tensors)]

    def _depart(self, rows: list["_Row"]) -> "_Flight":
        layout = _layout_of(rows)
        if layout.slots not in self._kept_rows:
            self._kept_rows[layout.slots] = (_empty(layout, rows), _empty(layout, rows))
        mean, sent = self._kept_rows[layout.slots]
        _differences(rows, layout, mean)  # the codec makes the mean of it, in place
        own = sample(mean)
        return _Flight(layout, mean, sent, own, Talk(self._codec.mean(mean, layout, sent)))

    def advance(self) -> None:
        """Start the messages that need what others brought; blocks until those have arrived."""
        for flight in self._flights:
            if flight.talk is not None and flight.talk.more:
                flight.talk.go_on()

    def arrive(self) -> None:
        """Wait until all has arrived. Changes no parameter."""
        for flight in self._flights:
            if flight.talk is not None:
                flight.talk.finish()
        if not self._arrived:
            self._arrived = True
            self._codec.end_step()

    @torch.no_grad()
    def land_(self, tensors: Mapping[str, Tensor]) -> Drift:
        """Move the references by the mean of what was sent, and the parameters by that less what this rank sent.

        Args:
            tensors: The parameters by name, among them those that departed, wherever they have moved since.

        Returns:
            How far this rank's parameters were from the new reference when they departed.

        """
        self.arrive()
        drift = Drift(0.0, 0.0)
        for flight in self._flights:
            mean, names = flight.mean, [slot.name for slot in flight.layout.slots]
            references = [self._reference[name] for name in names]
            for reference, moved in zip(references, flight.layout.split(mean), strict=True):
                reference.add_(moved)
            drift = drift.plus(_drift(references, flight.own_sample, mean))
            for name, correction in zip(names, flight.layout.split(mean.sub_(flight.sent)), strict=True):
                weights = Flat.of(tensors[name])
                weights.entries.add_(correction)
                weights.write_back()
        self._flights = []
        return drift

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

    def _start(self, rows: list["_Row"]) -> "_Travelling":
        layout = _layout_of(rows)
        difference = _differences(rows, layout, _empty(layout, rows))
        mean, sent = difference.clone(), torch.empty_like(difference)
        own = sample(difference)
        return _Travelling(rows, difference, mean, sent, own, Talk(self._codec.mean(mean, layout, sent)))

    def _take(self, bucket: "_Travelling") -> Drift:
        bucket.talk.finish()
        dropped = bucket.difference.sub_(bucket.sent)
        sizes = [row.reference.numel() for row in bucket.rows]
        for row, moved, left in zip(
            bucket.rows, torch.split(bucket.mean, sizes), torch.split(dropped, sizes), strict=True
        ):
            row.reference.add_(moved)
            # not `w + (m - s)`: so what was sent in full ends exactly at the reference, and equal on all ranks
            torch.add(row.reference, left, out=row.weights.entries)
            row.weights.write_back()
        return _drift([row.reference for row in bucket.rows], bucket.own_sample, bucket.mean)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, by parameter name, once what is in flight has arrived.

        The references are the same on all ranks.
        """
        self.arrive()
        return {
            "in_flight": [
                {
                    "slots": [tuple(slot) for slot in flight.layout.slots],
                    "mean": flight.mean,
                    "sent": flight.sent,
                    "own_sample": flight.own_sample,
                }
                for flight in self._flights
            ],
            "reference": dict(self._reference),
            "compression": repr(self._compression),
            "codec": self._codec.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` returned; under another compression, its references alone."""
        self._reference = {name: row.to(parameters[name].device, copy=True) for name, row in state["reference"].items()}
        self._flights = []
        for saved in state.get("in_flight", []):
            slots = tuple(Slot(name, numel, tuple(shape)) for name, numel, shape in saved["slots"])
            device = self._reference[slots[0].name].device
            mean, sent, own = (saved[key].to(device, copy=True) for key in ("mean", "sent", "own_sample"))
            self._flights.append(_Flight(Layout(slots), mean, sent, own, None))
        if state["compression"] == repr(self._compression):
            self._codec.load_state_dict(state["codec"])


def _layout_of(rows: list["_Row"]) -> Layout:
    return Layout(tuple(Slot(row.name, row.reference.numel(), row.shape) for row in rows))


def _empty(layout: Layout, rows: list["_Row"]) -> Tensor:
    return torch.empty(layout.numel, dtype=rows[0].reference.dtype, device=rows[0].reference.device)


def _differences(rows: list["_Row"], layout: Layout, into: Tensor) -> Tensor:
    """Return the differences of the parameters in a bucket to their references."""
    for row, difference in zip(rows, layout.split(into), strict=True):
        torch.sub(row.weights.entries, row.reference, out=difference)
    return into


def _drift(references: list[Tensor], own_sample: Tensor, mean: Tensor) -> Drift:
    """Return how far a rank was from the references of now, which have moved by the mean."""
    distance_sq = drift_of(mean.numel(), own_sample, sample(mean)).distance_sq
    norms = torch.stack(torch._foreach_norm(references))
    return Drift(distance_sq, float(norms.square().sum()))


class _Row(NamedTuple):
    """A parameter in a bucket."""

    name: str
    shape: tuple[int, ...]
    weights: Flat
    reference: Tensor


class _Travelling(NamedTuple):
    """A bucket on its way: the difference, what becomes the mean, what was sent, and a sample of the difference."""

    rows: list[_Row]
    difference: Tensor
    mean: Tensor
    sent: Tensor
    own_sample: Tensor
    talk: Talk


class _Flight(NamedTuple):
    """A bucket in the background: what becomes the mean, what was sent, and a sample of the difference.

    Without a talk, its messages have arrived before a resume.
    """

    layout: Layout
    mean: Tensor
    sent: Tensor
    own_sample: Tensor
    talk: Talk | None
