"""Messages with every entry in full: the fallback of other methods, and what they are measured against."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, StartedMessage


@dataclass(frozen=True)
class Full(Compression):
    """Send every entry as it is: one all-reduce.

    Note:
        *Communication.* ``itemsize`` bytes an entry, in one all-reduce a bucket.

    """

    keeps_state = False

    @property
    @override
    def exact(self) -> bool:
        return True

    @override
    def codec(self, context: Context) -> "FullCodec":
        return FullCodec(context)


class FullCodec(Codec):
    """Divides by the number of ranks and sums, in this order, as DDP does."""

    entrywise = True

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        if sent is not None:
            sent.copy_(values)
        yield StartedMessage(self.context.recorder.all_reduce(values.mul_(1 / self.world_size), self.context.purpose))
