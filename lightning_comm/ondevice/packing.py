"""Measured times of packing the kept entries of a bucket and unpacking them again."""

import time
from statistics import median

import torch

ROW_BYTES = 4 * 2**20
_SHARES = (0.1, 0.9)
_REPEATS = 5  # after one that is not timed


def packing_times(device: torch.device) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return a small and a large kept share, each with the seconds of gather, zero and scatter of a row of 4 MiB.

    Note:
        *Communication.* None. Takes a few hundredths of a second.

    """
    row = torch.ones(ROW_BYTES // 4, device=device)
    drawn = torch.rand(row.numel(), generator=torch.Generator().manual_seed(0))
    first, last = ((share, _seconds(row, (drawn < share).nonzero().view(-1).to(device))) for share in _SHARES)
    return first, last


def _seconds(row: torch.Tensor, kept: torch.Tensor) -> float:
    samples = []
    for _ in range(_REPEATS + 1):
        _settle(row)
        since = time.perf_counter()
        packed = row.index_select(0, kept)
        row.zero_().scatter_(0, kept, packed)
        _settle(row)
        samples.append(time.perf_counter() - since)
    return median(samples[1:])


def _settle(row: torch.Tensor) -> None:
    if row.is_cuda:
        torch.cuda.synchronize(row.device)
