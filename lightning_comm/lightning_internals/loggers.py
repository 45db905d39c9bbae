"""Private parts of Lightning's logging: what is logged, at which step, and whether it is reduced."""

from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_comm.lightning_internals.patches import Internal

_LOOPS = "lightning.pytorch.loops"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop._TrainingEpochLoop"
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"

INTERNALS = (
    Internal(_EPOCH_LOOP, "_batches_that_stepped", "the axis on which Lightning logs everything"),
    Internal(_EPOCH_LOOP, "_should_accumulate", "metrics of a batch that only accumulates are not logged"),
    Internal(_TRAINER, "_logger_connector", "whether the metrics of this batch are logged"),
    Internal(_TRAINER, "_results", "per-step `sync_dist` logs, unsynchronised monitors and a logged `step`, by name"),
)


def logged_step(trainer: Trainer) -> int | None:
    """Return the step at which Lightning is about to log the metrics of this batch; ``None`` if it does not log them.

    For ``on_train_batch_end`` alone: before it, the metrics are not complete, and after it the step may have been
    logged. The step counts batches that step, whatever the number of optimizers, from 0; where a module logs a metric
    named ``"step"``, Lightning uses its value instead.
    """
    loop, module = trainer.fit_loop.epoch_loop, trainer.lightning_module
    if module.automatic_optimization and loop._should_accumulate():
        return None
    if not (trainer._logger_connector.should_update_logs or getattr(trainer, "fast_dev_run", False)):
        return None
    results = trainer._results
    own = None if results is None else results.metrics(on_step=True)["log"].get("step")
    return int(loop._batches_that_stepped if own is None else own)


@dataclass(frozen=True)
class LoggedMetric:
    """One value that the user logs: its name, and whether and when it is reduced over the ranks.

    A metric of torchmetrics (``is_metric``) reduces itself, by its own counts.
    """

    name: str
    synchronised: bool
    on_step: bool
    is_metric: bool


def number_of_logged_metrics(trainer: Trainer) -> int:
    """Return how many values have been logged in the current stage."""
    return len(trainer._results or ())


def logged_metrics(trainer: Trainer) -> Iterator[LoggedMetric]:
    """Yield what has been logged in the current stage."""
    results = trainer._results
    for result in () if results is None else results.values():
        meta = result.meta
        is_metric = not result.is_tensor
        yield LoggedMetric(meta.name, bool(meta.sync.should) or is_metric, bool(meta.on_step), is_metric)
