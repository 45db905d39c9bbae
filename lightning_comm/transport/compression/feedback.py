"""Error feedback: what a method did not send is added to what it sends next time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Conversation, Layout, Slot


class Feedback(Codec):
    """Keeps what a codec drops, by parameter, and adds it to the next step's entries.

    After every step and for each parameter ``entries + residual before = sent + residual after``. A parameter with an
    entry that is not finite keeps the residual that it had, so that one bad step does not spoil all later ones.

    Note:
        *Memory.* One residual as large as the model, and while a bucket is on its way a row as large as the bucket.

    """

    is_local = True

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec.context)
        self._codec = codec
        self._residuals: dict[str, Tensor] = {}  # rows of buckets, cut by parameter
        self._buckets: dict[tuple[Slot, ...], Tensor] = {}

    @override
    def payload_bytes(self, layout: Layout) -> int:
        return self._codec.payload_bytes(layout)

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        residual = self._residual_of(layout, values)
        before = residual.clone()
        values.add_(residual)
        residual.copy_(values)
        sent = torch.empty_like(values) if sent is None else sent
        yield from self._codec.mean(values, layout, sent)
        residual.sub_(sent)
        rows = zip(layout.split(residual), layout.split(before), strict=True)
        for row, row_before in rows:
            row.copy_(torch.where(torch.isfinite(row).all(), row, row_before))

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
            self._residuals = {  # what is left of a bucket that was cut anew must not hold on to all of it
                name: row if name in moved or self._is_kept(name) else row.clone()
                for name, row in self._residuals.items()
            }
            self._buckets[layout.slots] = kept
        return kept

    def _is_kept(self, name: str) -> bool:
        return any(slot.name == name for slots in self._buckets for slot in slots)

    @override
    def begin_step(self) -> None:
        self._codec.begin_step()

    @override
    def end_step(self) -> None:
        super().end_step()
        self._codec.end_step()

    @override
    def rescale(self, factor: float) -> None:
        for row in self._residuals.values():
            row.mul_(factor)
        self._codec.rescale(factor)

    @override
    def regroup(self, places: Mapping[str, Tensor]) -> None:
        self._buckets = {}
        for name, row in self._residuals.items():
            moved = places.get(name)
            # -1 finds the zero at the end; a clone, since a row must not hold on to the bucket that it lay in
            self._residuals[name] = (
                row.clone() if moved is None else torch.cat([row, row.new_zeros(1)])[moved.to(row.device)]
            )
        self._codec.regroup(places)

    @override
    def state_dict(self) -> dict[str, Any]:
        residuals = {name: row.detach().clone() for name, row in self._residuals.items()}
        return {**super().state_dict(), "residuals": residuals, "codec": self._codec.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._buckets = {}
        self._residuals = dict(state["residuals"])
        self._codec.load_state_dict(state["codec"])
