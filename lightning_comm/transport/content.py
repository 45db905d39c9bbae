"""What tensors contain, bit for bit, in a few numbers each: whether somebody has changed them in between.

A counter of changes would be cheaper, and misses what is done through ``.data``.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_COLUMNS = 251  # odd, so that rows that change places are noticed
_WORD_BYTES = 8


def content(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return whole numbers for the bits of each tensor: the bits themselves if they are few, else sums over columns.

    Note:
        *Cost.* Each tensor is read once; on CUDA the host does not wait.

    """
    return [_sums(_bytes(tensor)) for tensor in tensors]


def _sums(row: Tensor) -> Tensor:
    whole = row.numel() // _WORD_BYTES * _WORD_BYTES
    words = row[:whole].view(torch.int64)
    columns = words.numel() // _COLUMNS * _COLUMNS
    parts = [words[columns:]] if columns < words.numel() else []
    if columns:
        parts.append(words[:columns].view(-1, _COLUMNS).sum(0))
    if whole < row.numel():
        parts.append(row[whole:].to(torch.int64))
    if len(parts) == 1:
        # not a view of the tensor's memory
        return parts[0] if columns else parts[0].clone()
    return torch.cat(parts) if parts else row.new_empty(0, dtype=torch.int64)


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a row of bytes that begins where a word may; a copy where it has gaps."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not real.is_contiguous():
        real = real.permute(sorted(range(real.ndim), key=real.stride, reverse=True))
    row = real.reshape(-1).contiguous()
    if row.storage_offset() * row.element_size() % _WORD_BYTES:
        row = row.clone()
    return row.view(torch.uint8)


class Contents:
    """Notes what groups of tensors contain, and finds those that have been changed since by somebody else.

    On a CPU a change is found at once. On CUDA it is compared there and looked at when the device has got that far, so
    that the host never waits in a step.

    Args:
        groups: Names and tensors of each group.

    Note:
        *Memory.* About 4 KB a tensor.

    """

    def __init__(self, groups: Sequence[Mapping[str, Tensor]]) -> None:
        self._names = [list(group) for group in groups]
        self._tensors = [list(group.values()) for group in groups]
        self._noted: list[Tensor | None] = [None] * len(groups)
        self._found: dict[str, None] = {}  # names, each once
        self._under_way: list[tuple[int, Tensor, torch.cuda.Event]] = []

    def note(self, group: int) -> None:
        """Note what a group contains now."""
        self._noted[group] = torch.cat(content(self._tensors[group])) if self._tensors[group] else None

    def compare(self, group: int) -> None:
        """Compare a group with what was noted of it."""
        noted = self._noted[group]
        if noted is None:
            return
        parts = content(self._tensors[group])
        now, sizes = torch.cat(parts), [part.numel() for part in parts]
        if noted.device.type == "cpu":
            if not torch.equal(noted, now):
                same = [torch.equal(*pair) for pair in zip(torch.split(noted, sizes), parts, strict=True)]
                self._add(group, [not each for each in same])
            return
        differ = torch.stack([each.any() for each in torch.split(noted != now, sizes)])
        answer = torch.empty(differ.shape, dtype=torch.bool, pin_memory=True)
        answer.copy_(differ, non_blocking=True)
        self._under_way.append((group, answer, torch.cuda.current_stream(differ.device).record_event()))

    def changed(self, *, wait: bool = False) -> list[str]:
        """Return the names of the tensors that were found changed.

        Args:
            wait: Whether to wait for the device to compare what it has been given.

        """
        while self._under_way and (wait or self._under_way[0][2].query()):  # type: ignore[no-untyped-call]
            group, answer, event = self._under_way.pop(0)
            event.synchronize()
            self._add(group, answer.tolist())
        return list(self._found)

    def _add(self, group: int, differ: Sequence[bool]) -> None:
        self._found |= {name: None for name, each in zip(self._names[group], differ, strict=True) if each}
