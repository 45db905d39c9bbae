"""Callbacks that a config can name, to let a pilot's trials fail."""

from lightning.pytorch import Callback

from lightning_comm import FixedPeriod, LocalUpdateStrategy


class FailsOnRank1(Callback):
    """As a callback of the user's: raises on one rank, and only under a period of 8 steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy = trainer.strategy
        chosen = isinstance(strategy, LocalUpdateStrategy) and strategy.settings.period == FixedPeriod(8)
        if chosen and batch_idx == 3 and trainer.global_rank == 1:
            raise ArithmeticError("a callback of the user's gave up")
