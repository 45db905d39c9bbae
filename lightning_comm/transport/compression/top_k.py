"""The largest entries of each parameter, with their indices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, StartedMessage
from lightning_comm.transport.compression.feedback import Feedback
from lightning_comm.transport.compression.rounding import scale_type


@dataclass(frozen=True)
class TopK(Compression):
    """Send the largest entries of each parameter with their indices, and keep the rest for later (error feedback).

    Ranks choose different entries, so nothing can be summed on the way and every rank collects those of all. What a
    rank sends therefore grows with the number of ranks: it is less than a dense all-reduce only where ``ratio`` is
    smaller than one over the number of ranks.

    Args:
        ratio: Share of the entries of a parameter that are sent, above 0 and at most 1; at least one entry is.

    Raises:
        ValueError: If the ratio is out of range.

    Note:
        *Communication.* ``8 k`` bytes in one all-gather a bucket, of which each rank sends ``n-1`` copies (``12 k``
        where gradients are float64).

        *Memory.* A residual as large as the model.

    Example:
        >>> TopK(ratio=0.01)
        TopK(ratio=0.01)

    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 < self.ratio <= 1:
            raise ValueError(
                f"TopK: `ratio` is a share of the entries, so it must be > 0 and <= 1; got {self.ratio!r}. 0.01 sends "
                "one in a hundred."
            )

    @override
    def codec(self, context: Context) -> Codec:
        codec = TopKCodec(context, self.ratio)
        return Feedback(codec) if context.feedback else codec


class TopKCodec(Codec):
    """Chooses, collects what all ranks chose, and adds it up."""

    def __init__(self, context: Context, ratio: float) -> None:
        super().__init__(context)
        self._ratio = ratio

    def _count(self, numel: int) -> int:
        return min(numel, max(1, math.ceil(self._ratio * numel)))

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        chosen, start = [], 0
        for slot, row in zip(layout.slots, layout.split(values), strict=True):
            where = torch.topk(row.abs(), self._count(slot.numel), sorted=False).indices
            chosen.append(where.add_(start))
            start += slot.numel
        indices = torch.cat(chosen)
        numbers_type = scale_type(values)
        picked = values.index_select(0, indices).to(numbers_type)
        if sent is not None:
            sent.zero_().index_copy_(0, indices, picked.to(sent.dtype))
        wire = torch.cat([picked.view(torch.int32), indices.to(torch.int32)])
        rows, pending = self.context.recorder.all_gather(wire, self.context.purpose)
        yield StartedMessage(pending)

        values.zero_()
        for row in rows:
            bits, places = row.split([row.numel() - indices.numel(), indices.numel()])
            numbers = bits.clone().view(numbers_type).to(values.dtype)  # a clone, since float64 needs its own alignment
            values.index_add_(0, places, numbers, alpha=1 / self.world_size)  # divided first, or huge ones overflow
