"""Frozen parameters, and which of them have changed since all ranks had the same, as those of a teacher do."""

import torch
from torch import Tensor
from torch.nn import Module

from lightning_comm.ondevice.content import content, differ
from lightning_comm.ondevice.optimizer.state import is_averageable


class FrozenParameters:
    """What frozen parameters contained when ranks had the same of them.

    They are equal on all ranks from the start and are not sent, unless somebody changes them. That is found from their
    bits, since what is done through ``.data`` leaves no other trace.

    Args:
        module: The model.

    Attributes:
        changed: The names of those that have changed since on any rank; ranks agree on them.

    Note:
        *Communication.* None. *Cost.* Each question reads the frozen parameters once.

    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._content: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    def begin_round(self, trained: set[str]) -> None:
        """Note those that are not trained from here on, where they are not noted already."""
        self._content = {
            name: self._content[name] if name in self._content else content(parameter)
            for name, parameter in self._module.named_parameters()
            if name not in trained
        }

    def changed_here(self) -> dict[str, Tensor]:
        """Return for each whether it has changed on this rank, as a boolean on one device."""
        named = self._module.named_parameters()
        flags = {name: differ(self._content[name], content(p)) for name, p in named if name in self._content}
        return {name: flag.to(next(iter(flags.values())).device) for name, flag in flags.items()}

    def without_mean(self) -> dict[str, Tensor]:
        """Return those that have changed and can only be taken from one rank, by name."""
        named = self._module.named_parameters()
        return {name: p for name, p in named if name in self.changed and not is_averageable(p)}

    @torch.no_grad()
    def note(self) -> None:
        """Note what those contain that have changed, when they have just been brought together."""
        parameters = dict(self._module.named_parameters())
        self._content |= {name: content(parameters[name]) for name in self.changed}
        self.changed = set()
