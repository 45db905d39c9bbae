"""What our strategies share: Lightning's collectives, and how the failure of a rank is told."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from lightning_comm.lightning_internals import close_finished_epoch
from lightning_comm.strategies.interruptions import Interruptions
from lightning_comm.transport.agreement import Agreement, PeerFailure
from lightning_comm.transport.recording import leave_group_at_exit

_T = TypeVar("_T")


class RanksApartStrategy(DDPStrategy):
    """Between Lightning's strategy and ours: every collective of Lightning's goes through :meth:`_together`.

    The one class of ours that others derive from, since Lightning wants these methods on the strategy itself.
    """

    _interruptions: Interruptions | None = None
    _trainer: Trainer | None = None

    @property
    @abstractmethod
    def _agreement(self) -> Agreement | None:
        """How ranks of the current ``fit`` tell each other of failures; ``None`` without one."""

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        leave_group_at_exit()

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and self._agreement is None:
            # not for a tuner within `fit`, which puts back what it has changed; also where another strategy wrote it
            close_finished_epoch(checkpoint.get("loops"))
        return checkpoint

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._together(lambda: DDPStrategy.barrier(self, *args, **kwargs), None)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._together(lambda: DDPStrategy.broadcast(self, obj, src), obj)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        return self._together(lambda: DDPStrategy.reduce(self, tensor, group, reduce_op), tensor)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self._together(lambda: DDPStrategy.all_gather(self, tensor, group, sync_grads), tensor)

    def end_batch(self) -> None:
        """Called by the companion after every training batch and its schedulers, before any other callback."""

    def end_epoch(self) -> None:
        """Called by the companion at the end of a training epoch."""

    def begin_evaluation(self) -> None:
        """Called by the companion when validation starts."""

    def end_evaluation_epoch(self) -> None:
        """Called by the companion when all validation batches are done and their metrics known."""

    def finish(self) -> None:
        """Called by the companion when training ends, before any other callback."""

    def _together(self, collective: Callable[[], _T], alone: _T) -> _T:
        """Note that all ranks meet; once a rank has failed, when no collective would end, do without."""
        if self._interruptions is not None:
            self._interruptions.met = True
        if self._trainer is not None and self._trainer.interrupted:
            return alone
        if self._agreement is None:
            return collective()
        with self._agreement.first_error_shown():
            return collective()

    def report_failure(self, exception: BaseException) -> None:
        """Called by the companion when this rank fails: tell the others, without a collective."""
        if self._agreement is None or isinstance(exception, (PeerFailure, SIGTERMException)):
            return
        with suppress(RuntimeError):  # the store is gone with rank 0, and then everybody knows
            self._agreement.report_failure(f"{type(exception).__name__}: {exception}")
