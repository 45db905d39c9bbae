"""The logs of a partitioned run: the metrics of each window, and a warning of values logged as plain means."""

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm import lightning_internals


class PartitionLogs:
    """Logs the newest window to the Trainer's loggers, and checks what else is logged.

    Args:
        trainer: The Trainer.

    Note:
        *Communication.* None.

    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._metrics: dict[str, float] = {}  # of the newest window, not logged yet
        self._number_checked = 0

    def put(self, metrics: dict[str, float]) -> None:
        """Keep the metrics of a window until Lightning logs the next time."""
        self._metrics = metrics

    def log(self) -> None:
        """Log the newest window when Lightning logs the metrics of a batch, and at the same step."""
        step = (
            lightning_internals.logged_step(self._trainer) if self._metrics and self._trainer.is_global_zero else None
        )
        if step is None:
            return
        metrics, self._metrics = self._metrics, {}
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def warn_of_plain_means(self) -> None:
        """Warn of values that are logged as the plain mean over ranks, whenever there are new ones."""
        number = lightning_internals.number_of_logged_metrics(self._trainer)
        if number <= self._number_checked:
            return
        self._number_checked = number
        logged = lightning_internals.logged_metrics(self._trainer)
        names = sorted({each.name for each in logged if each.synchronised and each.on_step and not each.is_metric})
        if names and self._trainer.world_size > 1:
            rank_zero_warn(
                f"AdaptivePartition: {', '.join(map(repr, names))} is logged with `sync_dist=True` on every step, as "
                "the plain mean over ranks, which is not the mean over samples where shares differ. Log it times "
                "`AdaptivePartition.weight_of(self.trainer)`, if it is not, or with `on_step=False, on_epoch=True`, "
                "which weighs by `batch_size`."
            )
