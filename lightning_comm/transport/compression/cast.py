"""The cast of entries to sixteen bits."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_comm.transport.compression.base import Codec, Compression, Context, Conversation, Layout, StartedMessage

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cast(Compression):
    """Send entries in 16 bits, half of what they take in fp32. The baseline that every other method has to beat.

    Args:
        dtype: ``"bf16"``, with the range of fp32 and 8 bits of precision, or ``"fp16"``, with 11 bits and a largest
            value of 65,504.

    Raises:
        ValueError: If the type is another one.

    Note:
        *Communication.* 2 bytes an entry, in one all-reduce a bucket; sums are rounded to 16 bits on their way.

        *Memory.* The bucket under way a second time, in 16 bits.

        *Beside torch's hooks.* ``bf16_compress_hook`` and ``fp16_compress_hook`` round first and divide by the number
        of ranks then. Here entries are divided first, so that fewer overflow in fp16; on 2, 4, 8, … ranks the two are
        bit for bit the same, as long as nothing overflows or falls below the smallest number of the type.

    Example:
        >>> Cast("bf16")
        Cast(dtype='bf16')

    """

    keeps_state: ClassVar[bool] = False

    dtype: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in _TYPES:
            raise ValueError(f"Cast: `dtype` must be 'bf16' or 'fp16'; got {self.dtype!r}. 'bf16' never overflows.")

    @override
    def codec(self, context: Context) -> "CastCodec":
        return CastCodec(context, _TYPES[self.dtype])


class CastCodec(Codec):
    """Rounds to 16 bits and sums in them."""

    entrywise = True

    def __init__(self, context: Context, dtype: torch.dtype) -> None:
        super().__init__(context)
        self._dtype = dtype

    @override
    def mean(self, values: Tensor, layout: Layout, sent: Tensor | None = None) -> Conversation:
        wire = values.mul_(1 / self.world_size).to(self._dtype)
        if sent is not None:
            sent.copy_(wire).mul_(self.world_size)
        yield StartedMessage(self.context.recorder.all_reduce(wire, self.context.purpose))
        values.copy_(wire)
