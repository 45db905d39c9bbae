"""No messages at all, to measure how fast a step would be without communication."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout


@dataclass(frozen=True)
class NoSync(Compression):
    """Send nothing, to see what removing all communication would give. For diagnosis: ranks drift apart.

    If a step is not much faster with it, no compression can make it so.

    Note:
        *Communication.* None.

        *Memory.* None.

    Example:
        >>> NoSync()
        NoSync()

    """

    keeps_state = False

    @override
    def codec(self, context: Context) -> "NoSyncCodec":
        return NoSyncCodec(context)


class NoSyncCodec(Codec):
    """Leaves each rank its own entries."""

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        if sent is not None:
            sent.copy_(values)
        yield from ()
