"""Tensors that a module or callback changes and that are neither parameters nor buffers: nothing averages them.

Examples are a teacher in a list, a centre that is a plain tensor, or a moving average in a callback: each rank would go
on with its own. They are found by where they are kept, and a few of their entries show whether they change.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_comm.lightning_internals import weight_average_of
from lightning_comm.ondevice.content import content, differ

_DEPTH = 4  # containers and objects within each other
_ITEMS = 512  # of a container that are looked at
_FIRST_LOOKS = 3  # copies may be made in the first steps
# packages whose objects are left alone
_FOREIGN = {"builtins", "collections", "functools", "lightning", "lightning_comm", "lightning_fabric", "logging"}
_FOREIGN |= {"pytorch_lightning", "threading", "torch", "torchmetrics"}
_SKIPPED = (Trainer, Optimizer, LRScheduler, Dataset, DataLoader, torch.Generator)

_COMPUTED_FROM = ("_v", "_orig")  # a plain tensor that is computed from parameters with these endings

_Place = Literal["attribute", "list", "module"]
_Found = dict[str, list[Tensor]]  # by the name of an attribute of the module, or of a callback


class UnregisteredState:
    """Warns once of each attribute with tensors that change, and that are neither parameters nor buffers.

    Copies of modules, and tensors of the shape of a parameter, are compared wherever they are found. Others are
    compared only if they exist when training starts, keep their shape, and are not in a list. That includes a centre,
    and excludes outputs that steps leave behind. Metrics of torchmetrics synchronise themselves.

    Args:
        where: The strategy, for the message.
        trainer: The Trainer, whose callbacks are checked.
        module: The model.

    Note:
        *Communication.* None: each rank looks at its own.

    """

    def __init__(self, where: str, trainer: Trainer, module: LightningModule) -> None:
        self._where, self._trainer, self._module = where, trainer, module
        self._warned: set[str] = set()
        self._looks_left = _FIRST_LOOKS
        self._noted = self._look(at_start=True)

    @property
    def is_new(self) -> bool:
        """Whether to look already at the end of a batch, since ranks may meet much later."""
        return self._looks_left > 0

    def look(self) -> None:
        """Look for what has changed since the last look; called where ranks have met."""
        if not self._noted and not self.is_new:
            return
        self._looks_left -= 1
        now = self._look(at_start=False)
        for name in _changed(self._noted, now):
            self._warned.add(name)
            self._warn(name)
        self._noted = {name: entries for name, entries in now.items() if name not in self._warned}

    def _look(self, *, at_start: bool) -> _Found:
        known = {_memory(each) for each in [*self._module.parameters(), *self._module.buffers()]}
        shapes = {each.shape for each in self._module.parameters() if each.numel() > 1}
        found: _Found = {}
        for name, tensor, place in self._tensors():
            stays = place == "attribute" and (at_start or name in self._noted)
            wanted = place == "module" or tensor.shape in shapes or stays
            if wanted and _memory(tensor) not in known and name not in self._warned:
                found.setdefault(name, []).append(_few_entries(tensor))
        return found

    def _tensors(self) -> Iterator[tuple[str, Tensor, _Place]]:
        """Yield tensors with the name of the attribute that they are in, and what they are in there."""
        seen: set[int] = set()
        for path, part in self._module.named_modules():
            if _is_metric(part) or _is_foreign(part):
                continue
            for name, value in vars(part).items():
                computed = any(f"{name}{suffix}" in part._parameters for suffix in _COMPUTED_FROM)
                if name not in _OF_MODULES and not computed:
                    label = f"`{path}.{name}`" if path else f"`{name}`"
                    for tensor, place in _within(value, "attribute", _DEPTH, seen):
                        yield f"{label} of {type(part).__name__}", tensor, place
        for callback in getattr(self._trainer, "callbacks", []):
            for name, value in {} if _is_foreign(callback) else vars(callback).items():
                if isinstance(value, nn.Module) and value is weight_average_of(callback):
                    continue  # handled by strategies
                for tensor, place in _within(value, "attribute", _DEPTH, seen):
                    yield f"`{name}` of the callback {type(callback).__name__}", tensor, place

    def _warn(self, name: str) -> None:
        rank_zero_warn(
            f"{self._where}: {name} changes while training goes on, and is neither a parameter nor a buffer of the "
            "model, so it is not brought together, nor saved: each rank goes on with its own. If training depends on "
            "it, register it in the LightningModule: `self.teacher = ...` for a module (with `requires_grad_(False)`), "
            "`register_buffer` for a tensor."
        )


def _within(value: Any, place: _Place, depth: int, seen: set[int]) -> Iterator[tuple[Tensor, _Place]]:
    """Yield the tensors in a value, and what they are in."""
    if isinstance(value, Tensor):
        # single numbers are scores and losses, for people to read
        if value.numel() > 1 and value.layout == torch.strided and not value.is_meta and value.grad_fn is None:
            yield value, place
    elif isinstance(value, nn.Module):
        if not _is_metric(value) and not isinstance(value, LightningModule):
            yield from ((tensor, "module") for tensor in [*value.parameters(), *value.buffers()])
    elif depth > 0 and not isinstance(value, _SKIPPED) and id(value) not in seen:
        inside, place = _contents(value, place)
        if inside:
            seen.add(id(value))
        for each in inside[:_ITEMS]:
            yield from _within(each, place, depth - 1, seen)


def _contents(value: Any, place: _Place) -> tuple[list[Any], _Place]:
    if isinstance(value, Mapping):
        return list(value.values()), place
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value), "list"
    if _is_foreign(value) or isinstance(value, (type, Callback)):
        return [], place
    return list(getattr(value, "__dict__", {}).values()), place


def _is_foreign(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN


def _is_metric(part: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "torchmetrics" for base in type(part).__mro__)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _few_entries(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return content(flat[:: max(1, flat.numel() // 16)])


def _changed(before: _Found, now: _Found) -> list[str]:
    """Return the names under which something has changed; the host waits for each device once."""
    flags: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, entries in now.items():
        earlier = before.get(name, [])
        if [each.shape for each in earlier] != [each.shape for each in entries]:
            continue  # another thing under the same name, such as what a step has left
        for one, other in zip(earlier, entries, strict=True):
            flags.setdefault(other.device, []).append((name, differ(other, one)))
    found = {
        name
        for group in flags.values()
        for (name, _), is_changed in zip(group, torch.stack([flag for _, flag in group]).tolist(), strict=True)
        if is_changed
    }
    return [name for name in now if name in found]


_OF_MODULES = frozenset(vars(LightningModule()))
