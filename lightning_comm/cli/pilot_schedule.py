"""The learning rate of every step of the user's whole run, from their own schedulers and without training."""

import math
import warnings

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_comm.strategies.run_length import accumulation, total_steps


class ScheduleUnknown(Exception):
    """The learning rates of the run cannot be known before it; the message says why."""


def use_up_schedule(trainer: Trainer, module: LightningModule, total: int) -> list[float]:
    """Return the learning rate of every optimizer step of the run: the largest over the parameter groups.

    Lightning's own order of calls is followed, so a scheduler moves after as many batches or epochs as it would. The
    Trainer's schedulers are used up by this and then taken away, so call it in a run whose weights nobody wants, before
    its first step. Optimizers take no step.

    Args:
        trainer: In front of its first batch.
        module: The model.
        total: Optimizer steps of the run (:func:`run_length`).

    Raises:
        ScheduleUnknown: If the rates depend on what training will bring.

    Note:
        *Communication.* None. *Time.* About 10 µs a step of the run.

    """
    _check_schedulers(trainer, module)
    epoch_batches, accumulate = trainer.num_training_batches, accumulation(trainer, 0)
    groups = trainer.optimizers[0].param_groups
    rates: list[float] = []
    batch = epoch = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps
        while len(rates) < total:
            batch += 1
            if batch % accumulate == 0 or batch == epoch_batches:
                rates.append(max(float(group["lr"]) for group in groups))
                _move(trainer, "step", batch)
            if batch == epoch_batches:
                batch, epoch = 0, epoch + 1
                accumulate = accumulation(trainer, epoch)
                _move(trainer, "epoch", epoch)
    trainer.lr_scheduler_configs.clear()
    return rates


def _move(trainer: Trainer, interval: str, count: int) -> None:
    for config in trainer.lr_scheduler_configs:
        if config.interval == interval and count % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]  # only a plateau wants a metric, and there is none


def _check_schedulers(trainer: Trainer, module: LightningModule) -> None:
    configs = trainer.lr_scheduler_configs
    if any(config.reduce_on_plateau for config in configs):
        raise ScheduleUnknown("a ReduceLROnPlateau lowers the learning rate when a metric of the run says so")
    if configs and is_overridden("lr_scheduler_step", module):
        raise ScheduleUnknown("the model moves its scheduler itself, in `lr_scheduler_step`")
    if math.isinf(trainer.num_training_batches) and any(config.interval == "epoch" for config in configs):
        raise ScheduleUnknown("a scheduler moves once an epoch, and the length of an epoch is not known")


def run_length(trainer: Trainer, module: LightningModule) -> int:
    """Return how many optimizer steps the user's run takes.

    Raises:
        ScheduleUnknown: If that cannot be known before it.

    """
    if not module.automatic_optimization:
        raise ScheduleUnknown("the model optimizes by hand, so only its code knows how many steps the run takes")
    total = total_steps(trainer)
    if total is None:
        raise ScheduleUnknown("the length of the run is not known; give the Trainer a `max_steps` or `max_epochs`")
    return total
