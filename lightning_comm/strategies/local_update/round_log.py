"""A log of the rounds of a run, for its history and for loggers."""

import math
from collections import deque

from lightning.pytorch import Trainer

from lightning_comm.core.ledger import CommLedger
from lightning_comm.lightning_internals import logged_step
from lightning_comm.ondevice.flat import Drift
from lightning_comm.strategies.local_update.settings import Round
from lightning_comm.transport.overlapped_average import EndedRound


class RoundLog:
    """The synchronisations of one ``fit``, on this rank.

    Loggers receive the newest one when Lightning logs the metrics of a batch, and at the same step, so that both are on
    one axis. Some loggers drop values with a smaller step than the last.

    Args:
        trainer: Has the loggers.
        ledger: Where messages are counted.

    """

    def __init__(self, trainer: Trainer, ledger: CommLedger) -> None:
        self.history: deque[Round] = deque(maxlen=100_000)
        self.rounds = 0
        self._trainer = trainer
        self._ledger = ledger
        self._newest: dict[str, float] = {}  # not logged yet
        self._logged_step: int | None = None  # of the last batch, if its metrics were logged

    def end_batch(self) -> None:
        """Log the newest synchronisation, if Lightning logs this batch; in ``on_train_batch_end``."""
        self._logged_step = logged_step(self._trainer) if self._trainer.is_global_zero else None
        self._log()

    def end_run(self) -> None:
        """Log a synchronisation that came after the last batch, at its step."""
        self._log()

    def add(self, ended: EndedRound, drift: Drift) -> None:
        """Note a synchronisation, to be logged when the batch ends."""
        self.rounds += 1
        done = Round(
            self.rounds, ended.step, ended.period_steps, ended.lr, drift.relative, ended.wait_s, ended.transfer_s
        )
        self.history.append(done)
        if self._trainer.is_global_zero:
            self._newest = {
                "local_update/period_steps": done.period_steps,
                "local_update/synchronisations": done.index,
                "local_update/lr": done.lr,
                "local_update/drift": done.drift if math.isfinite(done.drift) else -1.0,
                "local_update/payload_bytes": self._ledger.payload_bytes(),
                "local_update/wire_bytes": self._ledger.wire_bytes(),
                "local_update/wait_s": done.wait_s,
                "local_update/transfer_s": done.transfer_s,
            }

    def _log(self) -> None:
        if self._logged_step is None or not self._newest:
            return
        metrics, self._newest = self._newest, {}
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=self._logged_step)
