"""The callback that the strategy adds to the Trainer, for the moments at which strategies are not called."""

from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class Accompanied(Protocol):
    """A strategy that is called at these moments."""

    def end_batch(self) -> None:
        """A training batch is over, and so are its schedulers."""

    def end_epoch(self) -> None:
        """A training epoch is over."""

    def begin_evaluation(self) -> None:
        """Validation begins."""

    def finish(self) -> None:
        """Training is over."""

    def report_failure(self, exception: BaseException) -> None:
        """This rank has failed."""


class Companion(Callback):
    """Calls the strategy first of all callbacks: after a batch's learning-rate schedulers, before any checkpoint.

    Added by the strategy in ``connect`` at the head of the Trainer's callbacks. It has no state of its own.
    """

    def __init__(self, strategy: Accompanied) -> None:
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
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strategy.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._strategy.report_failure(exception)
