"""Checksums of tensors, to find out later whether their bits have changed.

Torch's counter of changes would be cheaper, but misses changes through ``.data``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_COLUMNS = 251  # odd, so that exchanged rows are noticed
_WORD_BYTES = 8


class _Words:
    """The memory of a tensor as 64-bit words: sums over columns for most of it, and the remainder as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._key = _place(tensor)
        row = _bytes(tensor)
        self._is_view = row.numel() == 0 or row.data_ptr() == tensor.data_ptr()
        whole = row.numel() // _WORD_BYTES * _WORD_BYTES
        words = row[:whole].view(torch.int64)
        columns = words.numel() // _COLUMNS * _COLUMNS
        self._columns = words[:columns].view(-1, _COLUMNS) if columns else None
        self._rest = [words[columns:]] if columns < words.numel() else []
        self._tail = row[whole:] if whole < row.numel() else None

    def are_of(self, tensor: Tensor) -> bool:
        """Whether these words are still views of the tensor's memory, and not a copy."""
        return self._is_view and self._key == _place(tensor)

    def parts(self) -> list[Tensor]:
        """Return integers that stand for the present contents of the memory; some are views of it."""
        sums = [] if self._columns is None else [self._columns.sum(0)]
        tail = [] if self._tail is None else [self._tail.to(torch.int64)]
        return [*sums, *self._rest, *tail]


def content(tensor: Tensor) -> Tensor:
    """Return integers that stand for the bits of a tensor: the bits themselves if few, otherwise sums over columns.

    Note:
        *Cost.* The tensor is read once; on CUDA the host does not wait.

    """
    return torch.cat([*_Words(tensor).parts(), torch.empty(0, dtype=torch.int64, device=tensor.device)])


def differ(before: Tensor, now: Tensor) -> Tensor:
    """Return, as a boolean on the device of the first, whether two contents differ."""
    same_size = before.shape == now.shape
    return (before != now.to(before.device)).any() if same_size else before.new_ones((), dtype=torch.bool)


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor as a row of bytes, aligned to a word; a copy where the memory has gaps."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not real.is_contiguous():
        real = real.permute(sorted(range(real.ndim), key=real.stride, reverse=True))
    row = real.reshape(-1).contiguous()
    row = row.as_strided(row.shape, (1,))  # a single entry may have stride 0, as in an expanded scalar
    if row.storage_offset() * row.element_size() % _WORD_BYTES:
        row = row.clone()
    return row.view(torch.uint8)


class Contents:
    """Records checksums of groups of tensors, and finds the tensors that were changed since.

    On a CPU a change is found at once. On CUDA the device compares, and the result is read once it is there, so that
    the host never waits in a step.

    Args:
        groups: Names and tensors of each group.

    Note:
        *Memory.* About 4 KB a tensor.

    """

    def __init__(self, groups: Sequence[Mapping[str, Tensor]]) -> None:
        self._names = [list(group) for group in groups]
        self._tensors = [list(group.values()) for group in groups]
        self._strides: list[list[tuple[int, ...]]] = [
            [] for _ in groups
        ]  # the same memory may be read with other strides
        self._words: list[list[_Words]] = [[] for _ in groups]
        self._noted: list[Tensor | None] = [None] * len(groups)
        self._found: dict[str, None] = {}  # names, each once
        self._under_way: list[tuple[int, Tensor, torch.cuda.Event]] = []

    def note(self, group: int) -> None:
        """Record the checksums of a group."""
        parts = [part for each in self._parts(group) for part in each]
        self._noted[group] = torch.cat(parts) if parts else None
        self._strides[group] = [tensor.stride() for tensor in self._tensors[group]]

    def compare(self, group: int) -> None:
        """Compare a group with its recorded checksums."""
        noted = self._noted[group]
        if noted is None:
            return
        strides = zip(self._tensors[group], self._strides[group], strict=True)
        self._add(group, [tensor.stride() != stride for tensor, stride in strides])
        by_tensor = self._parts(group)
        now = torch.cat([part for parts in by_tensor for part in parts])
        sizes = [sum(part.numel() for part in parts) for parts in by_tensor]
        if noted.device.type == "cpu":
            if not torch.equal(noted, now):
                pairs = zip(noted.split(sizes), now.split(sizes), strict=True)  # type: ignore[no-untyped-call]
                self._add(group, [not torch.equal(before, after) for before, after in pairs])
            return
        differ = torch.stack([each.any() for each in torch.split(noted != now, sizes)])
        answer = torch.empty(differ.shape, dtype=torch.bool, pin_memory=True)
        answer.copy_(differ, non_blocking=True)
        self._under_way.append((group, answer, torch.cuda.current_stream(differ.device).record_event()))

    def _parts(self, group: int) -> list[list[Tensor]]:
        tensors, words = self._tensors[group], self._words[group]
        if not words or not all(each.are_of(tensor) for each, tensor in zip(words, tensors, strict=True)):
            words = self._words[group] = [_Words(tensor) for tensor in tensors]
        return [each.parts() for each in words]

    def changed(self, *, wait: bool = False) -> list[str]:
        """Return the names of the tensors that were found changed.

        Args:
            wait: Whether to wait until the device has finished all comparisons.

        """
        while self._under_way and (wait or self._under_way[0][2].query()):  # type: ignore[no-untyped-call]
            group, answer, event = self._under_way.pop(0)
            if wait:
                event.synchronize()
            self._add(group, answer.tolist())
        return list(self._found)

    def _add(self, group: int, differ: Sequence[bool]) -> None:
        self._found |= {name: None for name, each in zip(self._names[group], differ, strict=True) if each}
