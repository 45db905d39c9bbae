"""Buffers of ranks that run apart become equal again."""

import torch
from torch import Tensor, nn

from lightning_comm.transport.recording import Recorder


def average_buffers(module: nn.Module, recorder: Recorder) -> None:
    """Average floating-point buffers (BatchNorm statistics) over the ranks, and take others from rank 0, in place.

    The sum is taken in the order of ranks, so that it does not depend on how an all-reduce goes about it. What is equal
    on all ranks stays as it is.

    Note:
        *Communication.* One all-gather for each type of buffers, recorded as ``"buffers"``.

    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        if buffer.numel():
            kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        rows, pending = recorder.all_gather(torch.cat([buffer.detach().reshape(-1) for buffer in buffers]), "buffers")
        pending.wait()
        entries = mean_of_rows(rows) if rows.dtype.is_floating_point or rows.dtype.is_complex else rows[0]
        begin = 0
        for buffer in buffers:
            buffer.copy_(entries[begin : begin + buffer.numel()].view(buffer.shape))
            begin += buffer.numel()


def mean_of_rows(rows: Tensor) -> Tensor:
    """Return the mean over the first dimension, added up in its order; exactly the value where all rows agree.

    Example:
        >>> mean_of_rows(torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 6.0]]))
        tensor([0.1000, 3.0000])

    """
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    equal = torch.stack([rows[0] == row for row in rows]).all(0)
    return torch.where(equal, rows[0], total / len(rows))
