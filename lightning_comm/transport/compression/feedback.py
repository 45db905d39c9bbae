"""Error feedback: the part of the entries that was not sent is added to those of the next step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.compression.base import Codec, Conversation, Layout, Slot
from lightning_comm.transport.compression.rounding import largest_entries


class Feedback(Codec):
    """Keeps what a codec drops, by parameter, and adds it to the next step's entries.

    After every step and for each parameter ``entries + residual before = sent + residual after``. A parameter whose
    mean is not finite keeps the residual that it had, on all ranks, so that one bad step does not spoil all later ones.

    A mean may also be thrown away once it has arrived: by DDP, where no rank has used a parameter; by a gradient
    scaler, which skips a step; by code that clears a gradient before an optimizer has stepped with it. Then
    :meth:`take_back` restores the residual of before, or what had been moved out of it would be lost.

    Note:
        *Memory.* One residual as large as the model, and while a bucket is on its way a row as large as the bucket, or
        two, as the method needs. Where means may be thrown away (:attr:`Context.revocable`), a second residual as large
        as the model, from a backward until the optimizer has stepped.

    """

    is_local = True

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec.context)
        self._codec = codec
        self._residuals: dict[str, Tensor] = {}  # rows of buckets, cut by parameter
        self._buckets: dict[tuple[Slot, ...], Tensor] = {}
        self._lengths: dict[tuple[Slot, ...], Tensor] = {}  # of the parameters in each bucket, on its device
        self._before_last: dict[str, Tensor] = {}  # residuals before the last backward
        self._before_first: dict[str, Tensor] = {}  # and before the first one since an optimizer has stepped

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        before = self._residual_of(layout, values)
        after = values + before
        if sent is not None:
            sent.copy_(after)
        yield from self._codec.mean_and_rest(after, layout, values)
        if sent is not None:
            sent.sub_(after)
        self._restore_where_not_finite(layout, values, before, after)
        # rows change places instead of being copied: what was kept before is still there if it is wanted
        self._buckets[layout.slots] = after
        for slot, row, row_before in zip(layout.slots, layout.split(after), layout.split(before), strict=True):
            self._residuals[slot.name] = row
            if self.context.revocable:
                self._before_last[slot.name] = row_before
                self._before_first.setdefault(slot.name, row_before)

    def _restore_where_not_finite(self, layout: Layout, means: Tensor, before: Tensor, after: Tensor) -> None:
        """Put the residual of before in place of that of after, for each parameter that has not become finite numbers.

        The means are the same on all ranks, and so is what they decide. What is left is this rank's own: where that
        is not finite beside a finite mean, this rank alone keeps the residual of before.
        """
        # A sum costs a tenth of a look at each entry, and is finite only if all of them are, and far from the largest
        # number. On other devices its value is not there to be looked at.
        if means.device.type == "cpu" and math.isfinite(float(means.sum())) and math.isfinite(float(after.sum())):
            return
        finite = torch.isfinite(largest_entries(layout, means)) & torch.isfinite(largest_entries(layout, after))
        lengths = self._lengths.get(layout.slots)
        if lengths is None or lengths.device != means.device:
            lengths = torch.tensor([slot.numel for slot in layout.slots])
            lengths = self._lengths[layout.slots] = uploaded(lengths, means.device)
        # for all parameters at once; with the length of the row, since CUDA would be asked for it
        stays = torch.repeat_interleave(finite, lengths, output_size=layout.numel)
        after.copy_(torch.where(stays, after, before))

    def _residual_of(self, layout: Layout, like: Tensor) -> Tensor:
        """Return the bucket's residuals as one row; under a new layout, put together from those of the old one."""
        kept = self._buckets.get(layout.slots)
        if kept is None:
            kept = torch.zeros_like(like)
            for slot, row in zip(layout.slots, layout.split(kept), strict=True):
                before = self._residuals.get(slot.name)
                if before is not None:
                    row.copy_(before)
                self._residuals[slot.name] = row
            moved = {slot.name for slot in layout.slots}
            self._buckets = {
                slots: bucket
                for slots, bucket in self._buckets.items()
                if moved.isdisjoint(slot.name for slot in slots)
            }
            self._residuals = {  # a part of an old bucket must not keep the memory of all of it
                name: row if name in moved or self._is_kept(name) else row.clone()
                for name, row in self._residuals.items()
            }
            self._buckets[layout.slots] = kept
        return kept

    def _is_kept(self, name: str) -> bool:
        return any(slot.name == name for slots in self._buckets for slot in slots)

    @override
    def begin_step(self) -> None:
        self._before_last = {}
        self._codec.begin_step()

    @override
    def end_step(self) -> None:
        super().end_step()
        self._codec.end_step()

    @property
    @override
    def unapplied(self) -> frozenset[str]:
        return frozenset(self._before_first)

    @override
    def take_back(self, names: Iterable[str], *, last_only: bool = False) -> None:
        remembered = self._before_last if last_only else self._before_first
        for name in names:
            before = remembered.get(name)
            if before is None:
                continue
            self._residuals[name].copy_(before)
            last = self._before_last.pop(name, None)
            if not last_only or last is self._before_first.get(name):
                self._before_first.pop(name, None)

    @override
    def applied(self, names: Iterable[str]) -> None:
        for name in names:
            self._before_last.pop(name, None)
            self._before_first.pop(name, None)

    @override
    def rescale(self, factor: float) -> None:
        rows = [*self._residuals.values(), *self._before_last.values(), *self._before_first.values()]
        for row in {id(row): row for row in rows}.values():
            row.mul_(factor)
        self._codec.rescale(factor)

    @override
    def regroup(self, places: Mapping[str, Tensor]) -> None:
        self._buckets = {}
        for rows in (self._residuals, self._before_last, self._before_first):
            for name, row in rows.items():
                moved = places.get(name)
                # -1 finds the zero at the end; a clone, so that a row does not keep its old bucket's memory
                rows[name] = row.clone() if moved is None else torch.cat([row, row.new_zeros(1)])[moved.to(row.device)]
        self._codec.regroup(places)

    @override
    def state_dict(self) -> dict[str, Any]:
        # a gradient is not saved, so for a resumed run a mean that no optimizer has applied is thrown away
        residuals = {name: row.detach().clone() for name, row in {**self._residuals, **self._before_first}.items()}
        return {**super().state_dict(), "residuals": residuals, "codec": self._codec.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._buckets, self._before_last, self._before_first = {}, {}, {}
        self._residuals = dict(state["residuals"])
        self._codec.load_state_dict(state["codec"])
