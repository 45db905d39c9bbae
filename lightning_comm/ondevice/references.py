"""References: for each parameter a row of entries that all ranks hold alike, from which differences are taken."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_comm.ondevice.flat import Flat


class References:
    """The references of a model's parameters, by name, in their accumulation types.

    They are made of parameters that are equal on all ranks, and move by what is the same on all ranks, so ranks never
    tell each other what they are.

    Note:
        *Communication.* None.

        *Memory.* As large as the parameters that have one, in fp32, or in fp64 for float64.

    """

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    @property
    def names(self) -> set[str]:
        """The parameters that have a reference; the same on all ranks."""
        return set(self._rows)

    @property
    def rows(self) -> list[Tensor]:
        """One row for each name."""
        return list(self._rows.values())

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """Return the rows of these parameters, to be moved in place."""
        return [self._rows[name] for name in names]

    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Make all references anew, of these parameters alone."""
        self._rows = {}
        self.add(tensors)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Make references of further parameters; those of the others stay."""
        for name, tensor in tensors.items():
            flat = Flat.of(tensor)
            self._rows[name] = flat.entries.to(flat.accumulation_type, copy=True)

    def drop(self, names: set[str]) -> None:
        """Drop references, because the parameters are averaged in full."""
        self._rows = {name: row for name, row in self._rows.items() if name not in names}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the rows by name."""
        return dict(self._rows)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: The rows, wherever they were read to.
            parameters: Those of this run by name, which may be of another width or on another device.

        """
        self._rows = {}
        for name, row in state.items():
            of = parameters[name]
            self._rows[name] = row.to(of.device, Flat.of(of).accumulation_type, copy=True)
