"""Private names that are replaced on the instances of one run, and put back when it ends."""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Internal:
    """A private name of Lightning or of torch.

    Args:
        owner: Module and class, or function, as one dotted path; or a module.
        name: The attribute: of the class, or one that its methods or the function set.
        why: What we need it for.
        elsewhere: Where in the package it is touched as well, as lower layers cannot import this one; how paths begin.

    """

    owner: str
    name: str
    why: str
    elsewhere: tuple[str, ...] = ()

    def find_owner(self) -> Any:
        """Import and return the class, function or module."""
        module, _, name = self.owner.rpartition(".")
        return getattr(importlib.import_module(module), name) if module else importlib.import_module(name)


class Patches:
    """Attributes replaced on instances, to be put back by :meth:`undo`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[object, str, bool, Any]] = []

    def set(self, owner: object, name: str, value: Any) -> Any:
        """Replace an attribute of an instance and return what was there."""
        before = getattr(owner, name)
        self._replaced.append((owner, name, name in vars(owner), before))
        setattr(owner, name, value)
        return before

    def undo(self) -> None:
        """Put everything back as it was, last first."""
        while self._replaced:
            owner, name, own, before = self._replaced.pop()
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)
