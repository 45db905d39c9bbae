"""A rank's own values, kept aside while an average is in their place."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter  # type: ignore[attr-defined]

from lightning_comm.ondevice.content import content, differ
from lightning_comm.ondevice.flat import distinct
from lightning_comm.ondevice.shared_memory import shared


class OwnValues:
    """Keeps this rank's own values aside, and restores those that were not changed meanwhile.

    A value that a module, a callback or an optimizer sets while the average is in place, such as a threshold found in
    validation, is meant to last: it is not overwritten. Changes are found by comparing bits, so a tensor that is
    changed and then set back, as weights are that two models swap, counts as unchanged.

    Args:
        purpose: What the average is for.
        weight: The weight of this rank in it.
        places: The tensors, by name, before the average is put in place.

    Note:
        *Memory.* A copy of the tensors, and about 2 KB for each.

        *Cost.* The tensors are read when the average is in place, and once more for each answer.

        *Autograd.* Restoring does not count as a change, since the values are those from before: a loss that was
        computed before can go backward afterwards. In between it cannot, and autograd raises an error.

    """

    def __init__(self, purpose: str, weight: float | None, places: Mapping[str, Tensor]) -> None:
        self.purpose = purpose
        self.weight = weight
        self._places = dict(places)
        self._values = {name: tensor.detach().clone() for name, tensor in places.items()}
        tracked = {name: tensor for name, tensor in places.items() if not tensor.is_inference()}
        self._versions = {name: _unsafe_preserve_version_counter(tensor) for name, tensor in tracked.items()}
        self._noted: dict[
            str, Tensor
        ] = {}  # empty until the average is in place: if that fails, everything is restored

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next((tensor.device for tensor in self._places.values()), torch.device("cpu"))

    @property
    def storages(self) -> set[int]:
        """The addresses of the memory that may be written to when values are restored."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._places.values() if tensor.numel()}

    def note(self, among: Iterable[Tensor] | None = None) -> None:
        """Note what the tensors contain now: from here on, who writes to them sets them.

        Args:
            among: Only these; for those that have been noted and changed as a part of the evaluation.

        """
        only = None if among is None else {id(tensor) for tensor in among}
        for name, tensor in self._places.items():
            if only is None or id(tensor) in only:
                self._noted[name] = content(distinct(tensor.detach()))

    def goes_on_with(self, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for present tensors by name, the values that this rank will hold after :meth:`put_back`."""
        set_since = self._set_since()
        return {
            name: self._values[name] if tensor is self._places.get(name) and name not in set_since else tensor
            for name, tensor in now.items()
        }

    def put_back(self) -> None:
        """Restore the values, except in tensors that were changed meanwhile and those that share entries with them."""
        set_since = self._set_since()
        for name in self._places.keys() - set_since:
            copy_into(self._places[name], self._values[name])
            if name in self._versions:
                self._versions[name].__exit__(None, None, None)

    def _set_since(self) -> set[str]:
        if not self._noted:
            return set()
        flags = [differ(before, content(distinct(self._places[name].detach()))) for name, before in self._noted.items()]
        found = torch.stack([flag.to(self.device) for flag in flags]).tolist()
        names = {name for name, each in zip(self._noted, found, strict=True) if each}
        groups = shared(self._places.items()) if names else []
        return names.union(*(group for group in groups if not names.isdisjoint(group)))


def copy_into(target: Tensor, value: Tensor) -> None:
    """Write a value of the same shape, also where the target is an expanded tensor."""
    target = distinct(target.detach())
    target.copy_(value[tuple(slice(size) for size in target.shape)])
