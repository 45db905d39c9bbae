"""Rows of entries cut into buckets, packed for a message and unpacked again: where tensors travel in pieces."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def cut_into_buckets(rows: list[Tensor], capacity: int) -> Iterator[list[Tensor]]:
    """Cut the rows, one after the other, into lists of views of ``capacity`` entries in all."""
    pieces: list[Tensor] = []
    room = capacity
    for row in rows:
        start = 0
        while start < row.numel():
            piece = row[start : start + room]
            pieces.append(piece)
            start += piece.numel()
            room -= piece.numel()
            if room == 0:
                yield pieces
                pieces, room = [], capacity
    if pieces:
        yield pieces


def pack(pieces: list[Tensor], bucket: Tensor) -> Tensor:
    """Copy the pieces to the front of a bucket; return the part of it that they fill."""
    used = bucket[: sum(piece.numel() for piece in pieces)]
    copy_each(split_like(pieces, used), pieces)
    return used


def write_means(pieces: list[Tensor], sums: Tensor, divisor: Tensor | None) -> None:
    """Write sums, divided if they are to be, to where they belong; the sums may be overwritten.

    A processor does best with one pass over each piece, a device with few kernels. Only two ranks that count equally
    divide here: one need not, and parts of more are weighed before. On a device that is a pass more over the bucket, 24
    bytes an entry with packing instead of 16. To halve when packing would save it, but smallest numbers would lose
    their last digit: the mean of two that are equal would not be that number.
    """
    totals = split_like(pieces, sums)
    if divisor is None:
        copy_each(pieces, totals)
    elif sums.is_cuda:
        sums.div_(divisor)
        copy_each(pieces, totals)
    else:
        for piece, total in zip(pieces, totals, strict=True):
            torch.div(total, divisor, out=piece)


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensor by tensor, in one kernel for each pair of types where a device has such a kernel."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for k, (target, source) in enumerate(zip(targets, sources, strict=True)):
        groups.setdefault((target.dtype, source.dtype), []).append(k)
    for group in groups.values():
        torch._foreach_copy_([targets[k] for k in group], [sources[k] for k in group])


def split_like(pieces: list[Tensor], row: Tensor) -> list[Tensor]:
    """Cut a row into views as long as the pieces."""
    return list(torch.split(row, [piece.numel() for piece in pieces]))
