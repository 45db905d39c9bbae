"""The learning rate of every step of the user's whole run, from their own schedulers and without training."""

from lightning.pytorch import LightningModule, Trainer

from lightning_comm.strategies.common.planned_rates import ScheduleUnknown, check_schedulers, rates_of
from lightning_comm.strategies.common.run_length import total_steps


def use_up_schedule(trainer: Trainer, module: LightningModule, total: int) -> list[float]:
    """Return the learning rate of every optimizer step of the run: the largest over the parameter groups.

    Lightning's own order of calls is followed, so a scheduler moves after as many batches or epochs as it would. The
    Trainer's schedulers are used up by this and then taken away, so call it in a run whose weights are not needed,
    before its first step. Optimizers take no step.

    Args:
        trainer: In front of its first batch.
        module: The model.
        total: Optimizer steps of the run (:func:`run_length`).

    Raises:
        ScheduleUnknown: If the rates depend on what training will bring.

    Note:
        *Communication.* None. *Time.* About 10 µs a step of the run.

    """
    check_schedulers(trainer, module)
    rates = rates_of(trainer, trainer.optimizers[0], trainer.lr_scheduler_configs, total)
    trainer.lr_scheduler_configs.clear()
    return rates


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
