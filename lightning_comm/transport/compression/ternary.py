"""Rounding of entries to three values: -1, 0 or 1, times a scale."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, StartedMessage
from lightning_comm.transport.compression.rounding import largest_entries, round_stochastically

_MOST_RANKS = 127  # whose sum has room in 8 bits


@dataclass(frozen=True)
class Ternary(Compression):
    """Send -1, 0 or 1 an entry, times the largest entry of the parameter on any rank.

    An entry becomes 1 (or -1) with a probability of its share of that maximum, so its expectation is kept; its variance
    is large. No residual is kept. The sums are those of 8-bit numbers.

    Note:
        *Communication.* 1 byte an entry in an all-reduce, and before it 4 bytes a parameter (8 where gradients are
        float64) in another one, which agrees on the maxima; both once a bucket.

        *Memory.* The buckets under way a second time, in 8 bits; no residual.

        *Overlap.* The second all-reduce needs what the first one brings. It is started when the next bucket is ready,
        so all but the last one go on beside the backward.

        *Ranks.* At most 127, since sums of more have no room in 8 bits.

    Example:
        >>> Ternary()
        Ternary()

    """

    @override
    def codec(self, context: Context) -> "TernaryCodec":
        return TernaryCodec(context)


class TernaryCodec(Codec):
    """Agrees on maxima, rounds, and sums in 8 bits."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if self.world_size > _MOST_RANKS:
            raise ValueError(
                f"Ternary: sums of -1, 0 and 1 have room in 8 bits for at most {_MOST_RANKS} ranks; got "
                f"{self.world_size}. Use Int8, which sums in fp32."
            )

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        recorder, purpose = self.context.recorder, self.context.purpose
        scales = largest_entries(layout, values)
        scales = torch.where(torch.isfinite(scales), scales, torch.inf)  # a maximum with NaN is not the same everywhere
        yield StartedMessage(recorder.all_reduce(scales, purpose, op=dist.ReduceOp.MAX), more=True)

        wire = torch.empty(layout.numel, dtype=torch.int8, device=values.device)
        rows = zip(layout.slots, layout.split(values), layout.split(wire), scales, strict=True)
        for slot, row, code, scale in rows:
            generator = self.context.generator(slot.name, self.step, values.device)
            code.copy_(round_stochastically(row, scale, 1, generator))
        if sent is not None:
            _decode(wire, layout, scales, sent)
        yield StartedMessage(recorder.all_reduce(wire, purpose))

        _decode(wire, layout, scales / self.world_size, values)


def _decode(codes: Tensor, layout: Layout, scales: Tensor, into: Tensor) -> None:
    into.copy_(codes)
    for row, scale in zip(layout.split(into), scales, strict=True):
        row.mul_(scale)  # 0 times infinity is NaN: an entry that was not finite on some rank stays so on all
