"""Groups of tensors that share entries in memory: views of each other under different names."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def shared(named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Return the groups of names whose tensors share entries, directly or through others of the group.

    Two tensors share entries if writing to one changes the other. One storage is not enough: the weights of an RNN that
    were flattened into one row do not share entries, and neither do interleaved columns of a matrix.

    Args:
        named: Names and tensors. Tensors without memory (on ``meta``, not yet initialised, no entries) share nothing.

    Returns:
        Names in the order given, groups in the order of their first names.

    Note:
        *Memory.* None where no two tensors' ranges of addresses overlap, or those that do have no gaps. Otherwise 4
        bytes for each entry of the range, for a moment, on the CPU.

    Example:
        >>> matrix = torch.zeros(4, 6)
        >>> shared([("a", matrix), ("b", torch.zeros(4)), ("c", matrix.t())])
        [('a', 'c')]
        >>> shared([("even", matrix[:, ::2]), ("odd", matrix[:, 1::2])])
        []

    """
    groups: list[list[_Range]] = []
    for ranges in _on_each_device(named).values():
        for touching in _runs_that_touch(ranges):
            groups += _exact_groups(touching)
    positions = sorted(sorted((part.position, part.name) for part in group) for group in groups if len(group) > 1)
    return [tuple(name for _, name in group) for group in positions]


def covered(named: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Return the names of tensors whose entries are all entries of another of these, which itself is not returned.

    Example:
        >>> matrix = torch.zeros(4, 6)
        >>> sorted(covered([("transposed", matrix.t()), ("matrix", matrix), ("rows", matrix[1:3])]))
        ['matrix', 'rows']

    """
    ranges = {part.name: part for parts in _on_each_device(named).values() for part in parts}
    inside: set[str] = set()
    for group in shared((name, part.tensor) for name, part in ranges.items()):
        parts = [ranges[name] for name in group]
        whole = max(parts, key=lambda part: (part.end - part.begin, -part.position))
        if _has_no_gaps(whole.tensor):
            inside |= {
                part.name for part in parts if part is not whole and whole.begin <= part.begin <= part.end <= whole.end
            }
    return inside


class SharedMemory:
    """A cache of which parameters share entries, by their addresses."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[set[str], set[str]]] = {}

    def covered(self, parameters: Mapping[str, Tensor]) -> set[str]:
        """Return the names of those whose entries are all entries of another one."""
        return self._of(parameters)[0]

    def shared(self, parameters: Mapping[str, Tensor]) -> set[str]:
        """Return the names of those that share entries with others."""
        return self._of(parameters)[1]

    def _of(self, parameters: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
        key = tuple((name, p.data_ptr(), p.shape, p.stride()) for name, p in parameters.items())
        if key not in self._known:
            if len(self._known) > 8:
                self._known.clear()
            groups = shared(parameters.items())
            self._known[key] = covered(parameters.items()), {name for group in groups for name in group}
        return self._known[key]


class _Range(NamedTuple):
    """The addresses of a tensor's entries."""

    begin: int
    end: int
    position: int
    name: str
    tensor: Tensor


def _on_each_device(named: Iterable[tuple[str, Tensor]]) -> dict[torch.device, list[_Range]]:
    devices: dict[torch.device, list[_Range]] = {}
    for position, (name, tensor) in enumerate(named):
        if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin, size = tensor.data_ptr(), (last + 1) * tensor.element_size()
        devices.setdefault(tensor.device, []).append(_Range(begin, begin + size, position, name, tensor))
    return devices


def _runs_that_touch(ranges: list[_Range]) -> list[list[_Range]]:
    """Split the ranges, in order of address, wherever one begins after all before it have ended."""
    runs: list[list[_Range]] = []
    end = 0
    for each in sorted(ranges, key=lambda part: part.begin):
        if each.begin >= end:
            runs.append([])
        runs[-1].append(each)
        end = max(end, each.end)
    return runs


def _exact_groups(touching: list[_Range]) -> list[list[_Range]]:
    """Group ranges that have an entry in common: each address holds the last group that was seen there."""
    if len(touching) == 1 or all(_has_no_gaps(part.tensor) for part in touching):
        return [touching]
    first = touching[0].begin
    unit = math.gcd(*(number for part in touching for number in (part.tensor.element_size(), part.begin - first)))
    owners = torch.full(((max(part.end for part in touching) - first) // unit,), -1, dtype=torch.int32)
    groups: dict[int, list[_Range]] = {}
    for number, part in enumerate(touching):
        width = part.tensor.element_size() // unit
        strides = [stride * width for stride in part.tensor.stride()]
        cells = owners.as_strided([*part.tensor.shape, width], [*strides, 1], (part.begin - first) // unit)
        groups[number] = [part]
        for owner in torch.bincount(cells.flatten() + 1)[1:].nonzero().flatten().tolist():  # 0: no owner yet
            owners.masked_fill_(owners == owner, number)
            groups[number] += groups.pop(owner)
        cells.fill_(number)
    return list(groups.values())


def _has_no_gaps(tensor: Tensor) -> bool:
    """Whether every address between the first and the last entry belongs to an entry."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride > reach + 1:
                return False
            reach += (size - 1) * stride
    return True
