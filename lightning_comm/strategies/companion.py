"""The callback that the strategy adds to the Trainer, for the moments at which strategies are not called."""

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_comm.strategies.local_update import LocalUpdateStrategy


class LocalUpdateCompanion(Callback):
    """Calls the strategy first of all callbacks: after a batch's learning-rate schedulers, before any checkpoint.

    Added by :meth:`LocalUpdateStrategy.connect` at the head of the Trainer's callbacks. It has no state of its own.
    """

    def __init__(self, strategy: "LocalUpdateStrategy") -> None:
        self._strategy = strategy

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._strategy.end_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.end_epoch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.begin_evaluation()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.end_evaluation_epoch()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._strategy.report_failure(exception)
