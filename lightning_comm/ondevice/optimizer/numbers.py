"""Numbers that an optimizer keeps for all of its parameters together: in its groups or attributes."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_comm.ondevice.content import content

_OF_TORCH = frozenset(vars(Optimizer([Parameter(torch.zeros(1))], {}))) | {"_opt_called", "_step_count"}

Numbers = dict[str, Any]


def numbers_of(optimizer: Optimizer, *, scalars_only: bool = False) -> Numbers:
    """Return copies of the numbers in the groups and attributes of an optimizer, by readable names.

    Args:
        optimizer: The optimizer.
        scalars_only: Whether to leave out tensors and containers, which take time to copy and to compare.

    """
    found = {
        f"param_groups[{index}]['{key}']": value
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }
    found |= {f"self.{name}": value for name, value in vars(optimizer).items() if name not in _OF_TORCH}
    found |= {f"state[{key!r}]": value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    if scalars_only:
        return {name: value for name, value in found.items() if is_number(value)}
    return {name: _copy(value, {id(each) for each in _parameters(optimizer)}) for name, value in found.items()}


def is_number(value: object) -> bool:
    """Whether this is a single number; a flag is not, such as one that says whether something was checked."""
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


def changed(before: Numbers, after: Numbers) -> list[str]:
    """Return the names of the numbers that differ or are missing."""
    return [name for name in {**before, **after} if not _same(before.get(name), after.get(name))]


def _copy(value: Any, parameters: set[int]) -> Any:
    """Return a copy of the numbers in a value; ``None`` for everything else."""
    if isinstance(value, Tensor):
        return None if id(value) in parameters else value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copy(each, parameters) for key, each in value.items() if not isinstance(key, Tensor)}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_copy(each, parameters) for each in value]
    return copy.copy(value) if is_number(value) else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(content(one), content(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and bool(one == other)


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
