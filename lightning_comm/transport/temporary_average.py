"""An average that temporarily replaces a rank's own weights, as for a validation or a checkpoint."""

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor

from lightning_comm.ondevice.own_values import OwnValues
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.overlapped_average import OverlappedAverage


class TemporaryAverage:
    """Puts the average of the model in place, and this rank's own values back.

    Args:
        model: Averages.
        overlapped: What may be in flight meanwhile.

    Note:
        *Memory.* A second copy of the averaged tensors in between.

        *Cost.* They are read when the average is in place and once more at the end, to see what other code sets in
        between: that stays.

    """

    def __init__(self, model: ModelAverage, overlapped: OverlappedAverage) -> None:
        self._model = model
        self._overlapped = overlapped
        self._kept: OwnValues | None = None

    @property
    def purpose(self) -> str | None:
        """What the average is in place for, between :meth:`enter` and :meth:`leave`; else ``None``."""
        return None if self._kept is None else self._kept.purpose

    @property
    def storages(self) -> set[int]:
        """The addresses of the memory that :meth:`leave` may write to."""
        return set() if self._kept is None else self._kept.storages

    @torch.no_grad()
    def enter(
        self,
        purpose: str,
        weight: float | None = None,
        moderate: Set[str] = frozenset(),
        *,
        broadcast: bool = True,
    ) -> None:
        """Average in place and keep this rank's own values aside, until :meth:`leave`.

        Args:
            purpose: The purpose of the messages in the ledger.
            weight: This rank's weight in the mean.
            moderate: As in :class:`ModelAverage`.
            broadcast: Whether what has no mean is taken from rank 0; not needed where only rank 0 looks.

        """
        self._overlapped.wait()
        tensors = self._model.tensors
        self._kept = OwnValues(purpose, weight, tensors.changed_by_average())
        parameters = tensors.parameters()
        self._correct(parameters, weight)
        self._model.average_for(purpose, parameters, weight, moderate, broadcast=broadcast)
        self._kept.note()

    def _correct(self, parameters: Mapping[str, Tensor], weight: float | None) -> None:
        """Move parameters by the average in flight, if ranks have different weights.

        The average in flight was weighted otherwise than this one. An equal mean is not changed by its landing.
        """
        if weight is not None and self._overlapped.corrections:
            self._overlapped.correct_(parameters)
            self._model.zero_pruned_(parameters)  # some weights have been pruned since it departed

    @torch.no_grad()
    def include(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors that have been renewed for an evaluation go with it, if an average is in place."""
        if self._kept is not None:
            self._kept.note(tensors)

    @torch.no_grad()
    def leave(self) -> None:
        """Put this rank's own values back, if an average is in place, but for what other code has set since."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.put_back()

    def average_copies(self, state: list[Tensor]) -> bool:
        """Average copies of optimizers' state, weighted as the weights that are in place; return whether it was done.

        Not where ranks hold states of different layouts, as before a first step.
        """
        assert self._kept is not None
        return self._model.average_copies(state, self._kept.weight, self._kept.device)

    def own_state(self) -> dict[str, Tensor]:
        """Return what this rank alone holds: its own weights and buffers, also while averaged ones are in place.

        Then it is what :meth:`leave` would leave: new values where other code has set some.
        """
        now = self._model.tensors.state()
        own = now if self._kept is None else self._kept.goes_on_with(now)
        return {name: tensor.detach() for name, tensor in own.items()}

    def own_buffers(self) -> dict[str, Tensor]:
        """Return the part of :meth:`own_state` that may differ right after a synchronisation too."""
        return {name: tensor for name, tensor in self.own_state().items() if name.startswith("buffer:")}
