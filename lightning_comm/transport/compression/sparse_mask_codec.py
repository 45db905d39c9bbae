"""The codec of a sparse mask: it gathers kept entries, lets another codec send them, and puts them back.

Before there are masks, and in steps that were requested dense, gradients are sent in full and exactly. Otherwise
everything goes through the other codec: gathered; or as the whole bucket, pruned entries being zero, where most of it
is kept and the codec looks at single entries. A codec that looks at a whole row, to draw random numbers for it or to
keep a residual of it, is always given the kept entries: which buckets are sent whole depends on how DDP has cut them,
and a run's results must not depend on that.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from torch.nn import Parameter
from typing_extensions import override

from lightning_comm.ondevice.pruning import Masks
from lightning_comm.transport.compression.base import Codec, Context, Conversation, Layout, Slot
from lightning_comm.transport.compression.full import FullCodec
from lightning_comm.transport.compression.mask_agreement import pack_bits, unpack_bits
from lightning_comm.transport.recording import Pending


class _Plan(NamedTuple):
    """The way a bucket is sent: the places of its kept entries, and the layout of the row for the other codec."""

    kept: Tensor
    pruned: Tensor
    layout: Layout
    gathered: bool


class SparseMaskCodec(Codec):
    """Gathers, lets another codec send, and scatters. Before masks are installed it sends in full and exactly."""

    def __init__(self, context: Context, inner: Codec, dense_above: float | None) -> None:
        super().__init__(context)
        self.is_local = inner.is_local
        self.masks: Masks = {}
        self.pruned_at: int | None = None  # the step of the schedule whose masks these are
        self._inner = inner
        self._full = FullCodec(context)
        self.dense_above = dense_above  # `None` until it is known
        self._rows: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # of the entries that are kept
        self._plans: dict[tuple[Slot, ...], _Plan] = {}
        self._dense_steps = 0
        self.was_dense = False  # whether the last step's gradients were left whole
        self._masks_changed: Callable[[], bool | Tensor] | None = None
        self._outside: Tensor | None = None
        self._flags: tuple[Tensor, Pending | None, int] | None = None
        self._raised = False

    def watch(self, masks_changed: Callable[[], bool | Tensor]) -> None:
        """Tell the other ranks with every step whether masks changed here, or gradients were not zero outside them.

        Args:
            masks_changed: Asked at the end of each step's last bucket. What only the device knows it returns as a
                tensor, so that the host does not wait for it.

        """
        self._masks_changed = masks_changed

    def take_flag(self) -> bool:
        """Return whether any rank's flag was up since this was last asked; the same on all ranks.

        On CUDA this waits for the device, unless :meth:`note_flags` has been called since the last step.
        """
        flags = self.arrived_flags()
        if flags is not None:
            self.note_flags(flags.tolist())
        raised, self._raised = self._raised, False
        return raised

    def arrived_flags(self) -> Tensor | None:
        """Return the ranks' flags of their masks, to be read together with other numbers; ``None`` if there are none.

        Waits for the message, which on CUDA the host does not.
        """
        if self._flags is None:
            return None
        flags, pending, step = self._flags
        if pending is not None:
            self._flags, recorder = None, self.context.recorder
            now, recorder.step = recorder.step, step  # recorded where it was sent
            pending.wait()
            recorder.step = now
            self._flags = flags, None, step
        return flags

    def note_flags(self, flags: Sequence[float]) -> None:
        """Take note of what :meth:`arrived_flags` has returned, once it has been read."""
        self._flags = None
        self._raised |= any(flags)

    def _send_flags(self, masks_changed: bool | Tensor) -> None:
        flags = self.arrived_flags()  # of another backward of the same step: flags that are up stay up
        if flags is None:
            flags = torch.zeros(2, dtype=torch.uint8, device=next(iter(self._rows.values())).device)
        for place, found in enumerate((masks_changed, self._outside)):
            if isinstance(found, Tensor):
                flags[place].logical_or_(found.to(flags.device))
            elif found:
                flags[place].fill_(1)
        self._outside = None
        recorder = self.context.recorder
        self._flags = flags, recorder.all_reduce(flags, "mask flags", ReduceOp.MAX), recorder.step

    def install(self, masks: Masks, named_parameters: Iterable[tuple[str, Parameter]]) -> None:
        """Use these masks from the next step on. Called on all ranks at the same step, with the same masks."""
        parameters = dict(named_parameters)
        rows = {name: in_order_of_memory(mask, parameters[name]) for name, mask in masks.items()}
        if self._rows:
            self._inner.regroup(_places(self._rows, rows))
        self.masks, self._rows = masks, rows
        self._counts, self._plans = counts_of(rows), {}

    def request_dense(self, n_steps: int) -> None:
        """Send the next steps' gradients in full and leave them as they are, for methods that let masks grow.

        Called on all ranks at the same step.

        Raises:
            ValueError: If the number is negative.

        """
        if n_steps < 0:
            raise ValueError(f"SparseMask: `n_steps` counts optimizer steps, so it must be >= 0; got {n_steps!r}.")
        self._dense_steps = n_steps

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        plan = self._plan_of(layout, values.device)
        if plan is not None and self._masks_changed is not None:
            outside = (values.ne(0) & plan.pruned).any()
            self._outside = outside if self._outside is None else self._outside | outside.to(self._outside.device)
        if plan is None or self._dense_steps:
            yield from self._full.mean(values, layout, sent)
            return
        if not plan.gathered:
            # never `values * mask`: infinity times 0 is NaN
            yield from self._inner.mean(values.masked_fill_(plan.pruned, 0), layout, sent)
            return
        row = values.index_select(0, plan.kept)
        sent_row = torch.empty_like(row) if sent is not None else None
        if plan.layout.slots:
            yield from self._inner.mean(row, plan.layout, sent_row)
        values.zero_().scatter_(0, plan.kept, row)  # half the time of `index_copy_`
        if sent is not None and sent_row is not None:
            sent.zero_().scatter_(0, plan.kept, sent_row)

    def _plan_of(self, layout: Layout, device: torch.device) -> _Plan | None:
        if not self._rows:
            return None
        plan = self._plans.get(layout.slots)
        if plan is None:
            mask = torch.ones(layout.numel, dtype=torch.bool, device=device)
            for slot, row in zip(layout.slots, layout.split(mask), strict=True):
                if slot.name in self._rows:
                    row.copy_(self._rows[slot.name])
            inner = self._kept_in(layout)
            gathered = self._is_gathered(inner.numel, layout.numel)
            # once for each bucket and masks: on CUDA the host waits there
            kept = mask.nonzero().view(-1) if gathered else torch.empty(0, dtype=torch.int64, device=device)
            plan = _Plan(kept, ~mask, inner if gathered else layout, gathered)
            self._plans[layout.slots] = plan
        return plan

    def _kept_in(self, layout: Layout) -> Layout:
        """Return the layout of the row of a bucket's kept entries."""
        counts = ((slot.name, self._counts.get(slot.name, slot.numel)) for slot in layout.slots)
        return Layout(tuple(Slot(name, count, (count,)) for name, count in counts if count))

    def _is_gathered(self, kept: int, entries: int) -> bool:
        if kept == entries:
            return False
        dense_above = 1.0 if self.dense_above is None else self.dense_above
        return kept <= dense_above * entries or not self._inner.entrywise

    @override
    def begin_step(self) -> None:
        self._inner.begin_step()

    @override
    def end_step(self) -> None:
        super().end_step()
        self._inner.end_step()
        if self._masks_changed is not None and self._rows:
            self._send_flags(self._masks_changed())
        self.was_dense = self._dense_steps > 0
        self._dense_steps = max(0, self._dense_steps - 1)

    @property
    @override
    def unapplied(self) -> frozenset[str]:
        return self._inner.unapplied

    @override
    def take_back(self, names: Iterable[str], *, last_only: bool = False) -> None:
        self._inner.take_back(names, last_only=last_only)

    @override
    def applied(self, names: Iterable[str]) -> None:
        self._inner.applied(names)

    @override
    def rescale(self, factor: float) -> None:
        self._inner.rescale(factor)

    def mask_state(self) -> dict[str, Any]:
        """Return the masks and what belongs to them, which is the same on all ranks."""
        return {
            "masks": {
                name: (tuple(mask.shape), pack_bits(mask.reshape(-1)).cpu()) for name, mask in self.masks.items()
            },
            "pruned_at": self.pruned_at,
            "dense_above": self.dense_above,
        }

    def load_mask_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`mask_state` returned."""
        self.masks = {
            name: unpack_bits(bits, torch.Size(shape).numel()).view(shape)
            for name, (shape, bits) in state["masks"].items()
        }
        self.pruned_at = state["pruned_at"]
        self.dense_above = state["dense_above"]
        self._rows, self._counts, self._plans = {}, {}, {}  # the resumed run installs the masks next

    @override
    def state_dict(self) -> dict[str, Any]:
        dense_steps = self._dense_steps
        with suppress(RuntimeError):  # on the way out of a run whose other ranks are gone
            self._raised = self.take_flag()
        return {
            **super().state_dict(),
            **self.mask_state(),
            "dense_steps": dense_steps,
            "raised": self._raised,
            "inner": self._inner.state_dict(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.load_mask_state(state)
        self._flags, self._raised = None, bool(state["raised"])
        self._dense_steps = int(state["dense_steps"])
        self._inner.load_state_dict(state["inner"])


def _places(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return where each entry that is kept after was among those kept before, or -1; without a mask all are kept."""
    places = {}
    for name in before.keys() | after.keys():
        old = before[name] if name in before else torch.ones_like(after[name])
        new = after[name] if name in after else torch.ones_like(old)
        places[name] = torch.where(old, old.cumsum(0) - 1, -1)[new]
    return places


def counts_of(masks: dict[str, Tensor]) -> dict[str, int]:
    """Return how many entries each mask keeps, read together."""
    if not masks:
        return {}
    device = next(iter(masks.values())).device
    sums = torch.stack([mask.sum().to(device) for mask in masks.values()])
    return dict(zip(masks, map(int, sums.tolist()), strict=True))


def in_order_of_memory(mask: Tensor, parameter: Tensor) -> Tensor:
    """Return the mask as a row, in the order in which DDP lays the parameter's gradient into a bucket.

    That is the order of the parameter's memory where it fills it without gaps, as channels_last does, and otherwise
    row by row.
    """
    placed = torch.empty_like(parameter, dtype=torch.bool, memory_format=torch.preserve_format).copy_(mask)
    if placed.stride() != parameter.stride():
        return mask.reshape(-1).to(parameter.device)
    return placed.as_strided((placed.numel(),), (1,))
