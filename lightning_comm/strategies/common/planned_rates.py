"""The learning rate of every optimizer step to come, from the user's own schedulers and without training."""

import copy
import functools
import math
import types
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer, lr_scheduler

from lightning_comm.strategies.common.pure_functions import why_not_pure
from lightning_comm.strategies.common.run_length import stretches_to_come

_MOST_STEPS = 200_000  # a few seconds
_PLAIN = (int, float, complex, str, bool, type(None), torch.Tensor)


class ScheduleUnknown(Exception):
    """The error of learning rates that cannot be known before the run; its message has the reason."""


def planned_rates(trainer: Trainer, module: LightningModule, counted: int, steps: int) -> list[float]:
    """Return the learning rates of the next steps, for each the largest over the groups of an optimizer.

    Copies of the schedulers are evaluated, over an optimizer of their own, and only those that certainly have no side
    effects: torch's own, with functions that compute from numbers alone. So the run does not change.

    Args:
        trainer: When training starts, from the beginning or in the middle of a run that is resumed.
        module: The model.
        counted: Which optimizer.
        steps: How many optimizer steps are to come.

    Raises:
        ScheduleUnknown: If the rates depend on training itself, if evaluating them might change the run, or if it takes
            long.

    Note:
        *Communication.* None. *Time.* About 10 µs a step, for at most 200,000 steps.

    """
    check_schedulers(trainer, module)
    if is_overridden("optimizer_step", module):
        raise ScheduleUnknown("the model's `optimizer_step` may set the learning rate")
    if any(isinstance(each, BaseFinetuning) for each in getattr(trainer, "callbacks", [])):
        raise ScheduleUnknown("a callback that unfreezes layers adds learning rates of their own")
    if steps > _MOST_STEPS:
        raise ScheduleUnknown(f"{steps:,} steps are too many to ask the schedulers ahead")
    optimizers = trainer.strategy.optimizers
    kept: dict[int, object] = {id(each): _stand_in(each) for each in optimizers}
    for config in trainer.lr_scheduler_configs:
        _check_asked(config.scheduler, kept)
    try:
        schedulers = copy.deepcopy([config.scheduler for config in trainer.lr_scheduler_configs], dict(kept))
        configs = [
            replace(config, scheduler=each)
            for config, each in zip(trainer.lr_scheduler_configs, schedulers, strict=True)
        ]
        stand_in = kept[id(optimizers[counted])]
        assert isinstance(stand_in, Optimizer)
        return rates_of(trainer, stand_in, configs, steps)
    except Exception as error:  # from a user's function, for a step that the run may never reach
        raise ScheduleUnknown(f"asked ahead, the schedulers raise {type(error).__name__}: {error}") from error


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer without parameters, with the numbers of another one's groups."""
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.empty(0))])
    stand_in.param_groups = [
        {"params": [], **{key: copy.deepcopy(each) for key, each in group.items() if _is_plain(each)}}
        for group in optimizer.param_groups
    ]
    return stand_in


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if type(value) in (list, tuple) else type(value) in _PLAIN  # type: ignore[call-overload]


def _check_asked(scheduler: object, optimizers: Mapping[int, object]) -> None:
    """Refuse a scheduler unless it is torch's own, holds numbers, and calls functions without effects."""
    kind = type(scheduler)
    if getattr(lr_scheduler, kind.__name__, None) is not kind:
        raise ScheduleUnknown(f"only {kind.__name__} itself knows the learning rates")
    for name, value in vars(scheduler).items():
        if callable(value) and hasattr(kind, name):
            raise ScheduleUnknown(f"{kind.__name__} has a method `{name}` of the user's own")
        _check_held(kind.__name__, value, optimizers)


def _check_held(where: str, value: object, optimizers: Mapping[int, object]) -> None:
    if isinstance(value, Optimizer):
        if id(value) not in optimizers:
            raise ScheduleUnknown(f"{where} moves the learning rate of an optimizer that Lightning does not know")
    elif isinstance(value, lr_scheduler.LRScheduler):
        _check_asked(value, optimizers)
    elif isinstance(value, (types.FunctionType, functools.partial)):
        if why := why_not_pure(value):
            raise ScheduleUnknown(f"{where}'s {why}")
    elif type(value) in (list, tuple, dict, Counter):
        for each in (*value.keys(), *value.values()) if isinstance(value, dict) else value:  # type: ignore[attr-defined]
            _check_held(where, each, optimizers)
    elif type(value) not in _PLAIN:
        raise ScheduleUnknown(f"{where} holds a {type(value).__name__}, which cannot be asked ahead")


def rates_of(trainer: Trainer, optimizer: Optimizer, configs: Sequence[LRSchedulerConfig], steps: int) -> list[float]:
    """Return the learning rates of the next steps; the schedulers are used up.

    Lightning's own order of calls is followed, so a scheduler moves after as many batches or epochs as it would.
    """
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch misses the optimizer's steps
        for stretch in stretches_to_come(trainer, steps):
            for number in stretch.stepping():
                rates.append(max(float(group["lr"]) for group in optimizer.param_groups))
                _move(configs, "step", number)
            if stretch.ends_epoch:
                _move(configs, "epoch", stretch.epoch + 1)
    return rates


def _move(configs: Sequence[LRSchedulerConfig], interval: str, count: int) -> None:
    for config in configs:
        if config.interval == interval and count % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]  # only a plateau wants a metric, and there is none


def check_schedulers(trainer: Trainer, module: LightningModule) -> None:
    """Refuse schedules whose rates depend on training itself.

    Raises:
        ScheduleUnknown: If there is one.

    """
    configs = trainer.lr_scheduler_configs
    if any(config.reduce_on_plateau for config in configs):
        raise ScheduleUnknown("a ReduceLROnPlateau lowers the learning rate when a metric of the run says so")
    if configs and is_overridden("lr_scheduler_step", module):
        raise ScheduleUnknown("the model moves its scheduler itself, in `lr_scheduler_step`")
    if math.isinf(trainer.num_training_batches) and any(config.interval == "epoch" for config in configs):
        raise ScheduleUnknown("a scheduler moves once an epoch, and the length of an epoch is not known")
