"""What is noted and logged of the rounds of a run."""

import math
from collections import deque

from lightning.pytorch import Trainer

from lightning_comm.core.ledger import CommLedger
from lightning_comm.lightning_internals import logged_step
from lightning_comm.strategies.settings import Round
from lightning_comm.transport.flat import Drift


class RoundLog:
    """The synchronisations of one ``fit``, on this rank.

    Args:
        trainer: Its loggers are told.
        ledger: Where messages are counted.

    """

    def __init__(self, trainer: Trainer, ledger: CommLedger) -> None:
        self.history: deque[Round] = deque(maxlen=100_000)
        self.rounds = 0
        self._trainer = trainer
        self._ledger = ledger
        self._last_logged_step = -1
        self._batch_step: int | None = None  # Lightning's count at the end of the last batch

    def end_batch(self) -> None:
        """Log what follows at the end of this batch, also when training is over."""
        self._batch_step = logged_step(self._trainer)

    def add(self, *, step: int, period_steps: int, lr: float, wait_s: float, transfer_s: float, drift: Drift) -> None:
        """Note a synchronisation, and log it as often as the Trainer logs."""
        self.rounds += 1
        done = Round(self.rounds, step, period_steps, lr, drift.relative, wait_s, transfer_s)
        self.history.append(done)
        every = getattr(self._trainer, "log_every_n_steps", 1)
        now = logged_step(self._trainer) if self._batch_step is None else self._batch_step
        if self._trainer.is_global_zero and every > 0 and now - self._last_logged_step >= every:
            self._last_logged_step = now
            metrics = {
                "local_update/period_steps": done.period_steps,
                "local_update/synchronisations": done.index,
                "local_update/lr": done.lr,
                "local_update/drift": done.drift if math.isfinite(done.drift) else -1.0,
                "local_update/payload_bytes": self._ledger.payload_bytes(),
                "local_update/wire_bytes": self._ledger.wire_bytes(),
                "local_update/wait_s": done.wait_s,
                "local_update/transfer_s": done.transfer_s,
            }
            for logger in self._trainer.loggers:
                logger.log_metrics(metrics, step=now)
