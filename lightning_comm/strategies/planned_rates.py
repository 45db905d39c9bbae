"""The learning rate of every optimizer step to come, from the user's own schedulers and without training."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer

from lightning_comm.strategies.run_length import batches_to_come


class ScheduleUnknown(Exception):
    """The learning rates of the run cannot be known before it; the message says why."""


def planned_rates(trainer: Trainer, module: LightningModule, counted: int, steps: int) -> list[float]:
    """Return the learning rate of each of so many steps to come: the largest over the groups of an optimizer.

    Copies of the schedulers are asked, over parameters without entries, so the run is left as it is.

    Args:
        trainer: When training starts, from the beginning or in the middle of a run that is resumed.
        module: The model.
        counted: Which optimizer.
        steps: How many optimizer steps are to come.

    Raises:
        ScheduleUnknown: If the rates depend on what training will bring, or the schedulers cannot be copied.

    Note:
        *Communication.* None. *Time.* About 10 µs a step.

    """
    check_schedulers(trainer, module)
    configs = trainer.lr_scheduler_configs
    kept: dict[int, Any] = {id(module): module, id(trainer): trainer}
    for optimizer in trainer.strategy.optimizers:
        kept[id(optimizer.state)] = defaultdict(dict)
        for group in optimizer.param_groups:
            kept |= {id(each): torch.nn.Parameter(torch.empty(0), each.requires_grad) for each in group["params"]}
    try:
        optimizers, configs = copy.deepcopy((trainer.strategy.optimizers, configs), kept)
    except Exception as error:  # whatever a scheduler of the user's own holds
        raise ScheduleUnknown(f"the schedulers cannot be copied: {error}") from error
    return rates_of(trainer, optimizers[counted], configs, steps)


def rates_of(trainer: Trainer, optimizer: Optimizer, configs: Sequence[LRSchedulerConfig], steps: int) -> list[float]:
    """Return the learning rate of each of so many steps to come, and use the schedulers up.

    Lightning's own order of calls is followed, so a scheduler moves after as many batches or epochs as it would.
    """
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps
        for batch in batches_to_come(trainer, steps):
            if batch.ends_step:
                rates.append(max(float(group["lr"]) for group in optimizer.param_groups))
                _move(configs, "step", batch.number)
            if batch.ends_epoch:
                _move(configs, "epoch", batch.epoch + 1)
    return rates


def _move(configs: Sequence[LRSchedulerConfig], interval: str, count: int) -> None:
    for config in configs:
        if config.interval == interval and count % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]  # only a plateau wants a metric, and there is none


def check_schedulers(trainer: Trainer, module: LightningModule) -> None:
    """Refuse to know the rates where training decides them.

    Raises:
        ScheduleUnknown: If it does.

    """
    configs = trainer.lr_scheduler_configs
    if any(config.reduce_on_plateau for config in configs):
        raise ScheduleUnknown("a ReduceLROnPlateau lowers the learning rate when a metric of the run says so")
    if configs and is_overridden("lr_scheduler_step", module):
        raise ScheduleUnknown("the model moves its scheduler itself, in `lr_scheduler_step`")
    if math.isinf(trainer.num_training_batches) and any(config.interval == "epoch" for config in configs):
        raise ScheduleUnknown("a scheduler moves once an epoch, and the length of an epoch is not known")
