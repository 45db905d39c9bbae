"""Snapshots of parameters from when their averaged gradients arrived, to find out later whether a step was taken."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

_WIDTH = 1024


class _Snapshot(NamedTuple):
    version: int  # torch's own count of changes in place, which misses those through `.data`
    places: Tensor
    entries: Tensor


class ParameterSnapshots:
    """Snapshots of parameters by name: torch's count of changes in place, and the entries that a step moves most.

    Args:
        parameters: The parameters by name.

    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters
        self._snapshots: dict[str, _Snapshot] = {}

    def take(self, name: str, mean: Tensor) -> None:
        """Note the entries of a parameter where its averaged gradient is largest, and where the first noted one was."""
        places, earlier = places_of_largest(mean), self._snapshots.get(name)
        if earlier is not None:
            places = torch.cat([earlier.places[: len(places)], places])
        self._take(name, places)

    def renew(self) -> None:
        """Note the present values of all noted entries."""
        for name, snapshot in self._snapshots.items():
            self._take(name, snapshot.places)

    def keep(self, names: Iterable[str]) -> None:
        """Forget all but these."""
        kept = set(names)
        self._snapshots = {name: snapshot for name, snapshot in self._snapshots.items() if name in kept}

    def certainly_changed(self, names: Iterable[str]) -> list[str]:
        """Return those of these parameters that have changed by torch's count since they were noted."""
        return [
            name
            for name in names
            if name in self._snapshots and self._snapshots[name].version != self._parameters[name]._version
        ]

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return those of these parameters that have changed since they were noted.

        On CUDA this waits for the device once, unless torch has counted a change of all of them.
        """
        names = list(names)
        changed = set(self.certainly_changed(names))
        changed |= read_flags(self.doubts(name for name in names if name not in changed))
        return [name for name in names if name in changed]

    def doubts(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return, still on the device, whether the noted entries have changed where torch has counted no change."""
        noted = {name: self._snapshots[name] for name in names if name in self._snapshots}
        return {
            name: (in_memory(self._parameters[name]).index_select(0, snapshot.places) != snapshot.entries).any()
            for name, snapshot in noted.items()
        }

    def _take(self, name: str, places: Tensor) -> None:
        parameter = self._parameters[name]
        self._snapshots[name] = _Snapshot(parameter._version, places, in_memory(parameter).index_select(0, places))


def read_flags(flags: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the flags that are true. On CUDA this waits for the device, once for all of them.

    Example:
        >>> read_flags({"a": torch.tensor(True), "b": torch.tensor(False)})
        {'a'}

    """
    if not flags:
        return set()
    device = next(iter(flags.values())).device
    read = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return {name for name, is_up in zip(flags, read, strict=True) if is_up}


def places_of_largest(row: Tensor) -> Tensor:
    """Return where a row has its largest magnitude: one place for its whole blocks, and one for the remainder.

    In blocks, since that takes a fraction of the time of ``argmax``; does not wait for a device.

    Example:
        >>> places_of_largest(torch.tensor([1.0, -3.0, 2.0]))
        tensor([1])

    """
    whole = row.numel() - row.numel() % _WIDTH
    places = []
    if whole:
        blocks = row[:whole].view(-1, _WIDTH)
        block = torch.maximum(blocks.amax(1), -blocks.amin(1)).argmax()
        places.append(block * _WIDTH + blocks.index_select(0, block.view(1)).view(-1).abs().argmax())
    if whole < row.numel():
        places.append(whole + row[whole:].abs().argmax())
    return torch.stack(places) if places else torch.zeros(0, dtype=torch.long, device=row.device)


def order_in_memory(parameter: Tensor) -> tuple[int, ...]:
    """Return the numbers of the parameter's dimensions in the order in which they lie in memory, as in a bucket of DDP.

    That is the order of its strides where it fills its memory without gaps, and otherwise its own.
    """
    dimensions = tuple(range(parameter.dim()))
    if parameter.is_contiguous() or torch.empty_like(parameter).stride() != parameter.stride():
        return dimensions
    return tuple(sorted(dimensions, key=parameter.stride, reverse=True))


def shape_in_memory(parameter: Tensor) -> tuple[int, ...]:
    """Return the lengths of the parameter's dimensions in the order of :func:`order_in_memory`.

    Example:
        >>> shape_in_memory(torch.zeros(2, 3)), shape_in_memory(torch.zeros(3, 2).T)
        ((2, 3), (3, 2))
        >>> shape_in_memory(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
        (2, 4, 4, 3)

    """
    return tuple(parameter.shape[dimension] for dimension in order_in_memory(parameter))


def in_memory(parameter: Tensor) -> Tensor:
    """Return the parameter's entries as one row, in the order in which they lie in a bucket of DDP."""
    return parameter.detach().permute(order_in_memory(parameter)).reshape(-1)
