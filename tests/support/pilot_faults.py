"""Callbacks that a config can name, to let a pilot's trials fail or end early."""

from lightning.pytorch import Callback

from lightning_comm import FixedPeriod, LocalUpdateStrategy


class FailsOnRank1(Callback):
    """As a callback of the user's: raises on one rank, and only under a period of 8 steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy = trainer.strategy
        chosen = isinstance(strategy, LocalUpdateStrategy) and strategy.settings.period == FixedPeriod(8)
        if chosen and batch_idx == 3 and trainer.global_rank == 1:
            raise ArithmeticError("a callback of the user's gave up")


class EndsTheRun(Callback):
    """As a user's own early stopping: ends the run after some optimizer steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.after
