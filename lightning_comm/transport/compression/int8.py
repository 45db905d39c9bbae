"""Rounding of entries to eight bits, with one scale a parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, StartedMessage
from lightning_comm.transport.compression.feedback import Feedback
from lightning_comm.transport.compression.rounding import largest_entries, round_stochastically, scale_type

_LARGEST = 127


@dataclass(frozen=True)
class Int8(Compression):
    """Send entries as whole numbers from -127 to 127 and one scale a parameter, rounded stochastically.

    A sum of such numbers has no room in 8 bits, and if each rank collected those of all (an all-gather) it would send
    as much as fp32 does from 8 ranks on. So every rank sums one part of the bucket for all: parts are exchanged by an
    all-to-all, summed in fp32 and rounded once more, and an all-gather collects the sums. Both roundings are unbiased,
    and what the first one drops is kept on the rank and sent with the next step's gradient (error feedback).

    Note:
        *Communication.* 2 bytes an entry, of which a rank sends ``2(n-1)/n``, in an all-to-all and an all-gather a
        bucket; and 4 bytes for each parameter, rank and bucket (8 where gradients are float64).

        *Overlap.* The all-gather needs what the all-to-all brings. It is started when the next bucket is ready, so all
        but the last one go on beside the backward.

        *Memory.* A residual as large as the model.

    Example:
        >>> Int8()
        Int8()

    """

    @override
    def codec(self, context: Context) -> Codec:
        codec = Int8Codec(context)
        return Feedback(codec) if context.feedback else codec


class Int8Codec(Codec):
    """Rounds, exchanges parts, sums, rounds again and collects."""

    def _part(self, layout: Layout) -> int:
        return -(-layout.numel // self.world_size)

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        ranks, part, count, recorder = self.world_size, self._part(layout), len(layout.slots), self.context.recorder
        scales = largest_entries(layout, values) / _LARGEST
        scale_bytes = scales.element_size()
        wire = torch.zeros(ranks, part + scale_bytes * count, dtype=torch.int8, device=values.device)
        wire[:, part:] = scales.view(torch.int8)
        whole = torch.zeros(ranks * part, dtype=torch.int8, device=values.device)
        self._round(values, layout, scales, whole, shared=False)
        wire[:, :part] = whole.view(ranks, part)
        if sent is not None:
            _decode(whole, layout, scales, sent)
        arrived, pending = recorder.all_to_all(wire, self.context.purpose)
        yield StartedMessage(pending, more=True)

        all_scales = arrived[:, part:].clone(memory_format=torch.contiguous_format).view(scale_type(values))
        # no mean of entries is larger than 127 of these, and all ranks have them; divided first, or huge ones overflow
        mean_scales = all_scales.div(ranks).sum(0)
        values.zero_()
        for rank in range(ranks):
            self._add_part(values, layout, arrived[rank, :part], all_scales[rank])
        own = whole.zero_()[recorder.rank * part : (recorder.rank + 1) * part]
        self._round(values, layout, mean_scales, whole, shared=True, within=recorder.rank)
        rows, pending = recorder.all_gather(own, self.context.purpose)
        yield StartedMessage(pending)

        _decode(rows.view(-1), layout, mean_scales, values)

    def _round(
        self,
        values: Tensor,
        layout: Layout,
        scales: Tensor,
        into: Tensor,
        *,
        shared: bool,
        within: int | None = None,
    ) -> None:
        """Round the entries, all of them or those in one rank's part."""
        part = self._part(layout)
        first, last = (0, layout.numel) if within is None else (within * part, (within + 1) * part)
        start = 0
        for slot, row, scale in zip(layout.slots, layout.split(values), scales, strict=True):
            begin, end = max(start, first), min(start + slot.numel, last)
            if begin < end:
                # drawn for the whole parameter, so that an entry's random number does not depend on who rounds it
                name = f"{slot.name}/mean" if shared else slot.name
                generator = self.context.generator(name, self.step, values.device, shared=shared)
                rounded = round_stochastically(row, scale, _LARGEST, generator)
                into[begin:end].copy_(rounded[begin - start : end - start])
            start += slot.numel

    def _add_part(self, values: Tensor, layout: Layout, codes: Tensor, scales: Tensor) -> None:
        """Add one rank's entries, divided by the number of ranks, to those of this rank's part."""
        first = self.context.recorder.rank * codes.numel()
        start = 0
        for slot, scale in zip(layout.slots, scales / self.world_size, strict=True):
            begin, end = max(start, first), min(start + slot.numel, first + codes.numel())
            if begin < end:
                values[begin:end].add_(codes[begin - first : end - first].to(values.dtype).mul_(scale))
            start += slot.numel


def _decode(codes: Tensor, layout: Layout, scales: Tensor, into: Tensor) -> None:
    into.copy_(codes[: layout.numel])
    for row, scale in zip(layout.split(into), scales, strict=True):
        row.mul_(scale)
