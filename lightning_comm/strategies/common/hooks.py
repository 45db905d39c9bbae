"""The hook callback, by which strategies run code at moments at which Lightning calls no strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class FitHooks:
    """What one ``fit`` does at these moments, on every rank and before any other callback.

    Args:
        end_batch: A training batch is over, and so are its schedulers.
        end_epoch: A training epoch is over.
        begin_evaluation: Validation begins, also a sanity check, or an evaluation after the fit.
        finish: Training is over.
        note_failure: This rank has failed; called before it is reported. Nothing may be sent.

    """

    end_batch: Callable[[], None] = _nothing
    end_epoch: Callable[[], None] = _nothing
    begin_evaluation: Callable[[], None] = _nothing
    finish: Callable[[], None] = _nothing
    note_failure: Callable[[], None] = _nothing


class Hooked(Protocol):
    """The holder of the hooks, which the hook callback calls."""

    @property
    def hooks(self) -> FitHooks:
        """Those of the ``fit`` under way, or of the last one."""

    def report_failure(self, exception: BaseException) -> None:
        """Tell the others that this rank ends by an exception."""


class HookCallback(Callback):
    """Calls the hooks first of all callbacks: after a batch's learning-rate schedulers, before any checkpoint.

    Added in the strategy's ``connect`` at the head of the Trainer's callbacks. It has no state of its own.

    Args:
        hooked: The holder of the hooks.

    """

    def __init__(self, hooked: Hooked) -> None:
        self._hooked = hooked

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._hooked.hooks.end_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooked.hooks.end_epoch()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooked.hooks.begin_evaluation()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooked.hooks.finish()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooked.report_failure(exception)


def has_hook_callback(trainer: Trainer) -> bool:
    """Whether the Trainer has the hook callback: not in a trial run of a learning-rate finder.

    The finder removes callbacks for its trial, and restores what the trial has changed.
    """
    return any(isinstance(callback, HookCallback) for callback in getattr(trainer, "callbacks", []))
