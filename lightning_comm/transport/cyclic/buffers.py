"""An average of buffers, which differ between ranks until all meet at a flush."""

import torch
from torch import Tensor, nn

from lightning_comm.ondevice.flat import distinct
from lightning_comm.transport.recording import Recorder


def average_buffers(module: nn.Module, recorder: Recorder) -> None:
    """Average floating-point buffers (BatchNorm statistics) over the ranks, and take others from rank 0, in place.

    The sum is taken in the order of ranks, so that it does not depend on the algorithm of an all-reduce. Values that
    are equal on all ranks stay as they are.

    Note:
        *Communication.* One all-gather for each type of buffers, recorded as ``"buffers"``.

    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in map(distinct, module.buffers()):
        if buffer.numel():
            kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        rows, pending = recorder.all_gather(torch.cat([buffer.reshape(-1) for buffer in buffers]), "buffers")
        pending.wait()
        entries = mean_of_rows(rows) if rows.dtype.is_floating_point or rows.dtype.is_complex else rows[0]
        begin = 0
        for buffer in buffers:
            buffer.copy_(entries[begin : begin + buffer.numel()].view(buffer.shape))
            begin += buffer.numel()


def mean_of_rows(rows: Tensor) -> Tensor:
    """Return the mean over the first dimension, added up in its order; exactly the value where all rows agree.

    A mean of finite numbers is finite.

    Example:
        >>> mean_of_rows(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 6.0]]))
        tensor([0.1000, 3.0000])

    """
    if rows.is_complex():
        return torch.view_as_complex(mean_of_rows(torch.view_as_real(rows)))
    mean = _sum_in_order(rows) / len(rows)
    equal = torch.stack([rows[0] == row for row in rows]).all(0)
    too_large = ~mean.isfinite() & rows.isfinite().all(0)
    if too_large.any():
        scale = 2.0 ** len(rows).bit_length()  # a power of two, which rounds nothing that is large
        largest = torch.finfo(rows.dtype).max
        scaled = _sum_in_order(rows / scale) / len(rows)
        mean = torch.where(too_large, scaled.clamp(-largest / scale, largest / scale) * scale, mean)
    return torch.where(equal, rows[0], mean)


def _sum_in_order(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
