"""What cannot work together and is refused before training starts: argument, value, rule, way out.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it.
"""

import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer

from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod
from lightning_comm.errors import refuse
from lightning_comm.lightning_internals import logged_metrics, weight_average_of
from lightning_comm.ondevice.flat import distinct
from lightning_comm.ondevice.optimizer.state import has_modes
from lightning_comm.strategies.common.model_checks import (
    has_no_optimizer,
    lazy_problems,
    no_optimizer,
    trained_problems,
)
from lightning_comm.strategies.local_update.period_setup import shortest_period
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.transport.averaging import Averaging
from lightning_comm.transport.backends import unsent_problems

_WHERE = "LocalUpdateStrategy"

_CHOICES = {
    "optimizer_state": ("local", "average"),
    "buffers": ("average", "keep"),
    "evaluate_weights": ("average", "local"),
}

_WRAPPERS = ("FullyShardedDataParallel", "DeepSpeedEngine")

# Optimizers that communicate in their `step`, by class name: some exist only in builds with distributed support.
COMMUNICATING = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")


def checked(settings: Settings) -> Settings:
    """Return the settings if each is in range.

    Raises:
        ValueError: If one is not.

    """
    refuse(_WHERE, _setting_problems(settings))
    return settings


def _setting_problems(settings: Settings) -> Iterator[str]:
    period: object = settings.period
    averaging: object = settings.averaging
    if not isinstance(period, PeriodRule):
        yield (
            f"`period` must be a PeriodRule; got {period!r}. Give FixedPeriod(steps=8), "
            "QuadraticPeriod(alpha=..., h_base=4), or a rule of your own that derives from PeriodRule."
        )
    steps = settings.gradient_steps
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    if not whole and not (isinstance(steps, float) and 0.0 <= steps <= 1.0):
        yield (
            f"`gradient_steps` must be a whole number of optimizer steps >= 0, or a share of the run from "
            f"0.0 to 1.0; got {steps!r}. 0 averages parameters from the start."
        )
    try:
        RoundClock(FixedPeriod(1), None, settings.warmup_steps)
    except ValueError as error:
        yield str(error).removeprefix("RoundClock: ")
    for name, choices in _CHOICES.items():
        if getattr(settings, name) not in choices:
            yield (f"`{name}` must be one of {', '.join(map(repr, choices))}; got {getattr(settings, name)!r}.")
    if not isinstance(averaging, Averaging):
        yield f"`averaging` must be an Averaging or None; got {averaging!r}."
    elif averaging.overlap_steps and settings.optimizer_state == "average":
        yield (
            f"`optimizer_state='average'` does not go with `Averaging(overlap_steps="
            f"{averaging.overlap_steps})`: momenta would be averaged at the end of a round, when the weights "
            "that they belong to are still on their way. Leave out one of the two."
        )
    index = settings.counted_optimizer
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        yield (f"`counted_optimizer` is an index, so it must be >= 0; got {index!r}. 0 is the first.")


def module_problems(module: LightningModule) -> Iterator[str]:
    """Yield why replicas of a model cannot be averaged, or that it communicates in its forward."""
    for name, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            yield (
                f"module {name!r} is a SyncBatchNorm, which talks to all ranks in every forward, so nothing "
                "would be saved and ranks could not run apart. Use BatchNorm; its statistics are averaged with the "
                "weights, and BatchNormReestimation brings them up to date before evaluation."
            )
    yield from replica_problems(module)


def device_problems(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    """Yield what would be averaged and lies where the process group does not send from; once the model is in place."""
    models: list[tuple[str, nn.Module | None]] = [("", module)]
    models += [(" of a weight average", weight_average_of(each)) for each in getattr(trainer, "callbacks", [])]
    named = [
        (f"{name!r}{label}", tensor)
        for label, model in models
        if model is not None
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    yield from unsent_problems(named, "keep it where the model is (`device=None` of a weight average)")


def replica_problems(module: LightningModule) -> Iterator[str]:
    """Yield what of a model is not whole on each rank, or synchronises itself."""
    yield from lazy_problems(module)
    for name, part in module.named_modules():
        if isinstance(part, DistributedDataParallel) or type(part).__name__ in _WRAPPERS:
            yield (
                f"module {name!r} is wrapped in {type(part).__name__}, which communicates on its own. Hand "
                "over the plain module."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            yield (
                f"parameter {name!r} is sharded (a DTensor), and this needs the whole model on each rank. "
                "Leave out `fully_shard` and other sharding, or use FSDPStrategy, which synchronises at every step."
            )
        if parameter.requires_grad and not is_lazy(parameter) and distinct(parameter).numel() < parameter.numel():
            yield (
                f"parameter {name!r} of shape {tuple(parameter.shape)} is an expanded view, in which several "
                "entries are one place in memory, and no optimizer can change it in place. Keep the small tensor as "
                "the parameter and expand it in `forward`, or make it whole with `.clone()`."
            )


def trainer_problems(trainer: Trainer, sync_batchnorm: bool, *, one_version: bool = False) -> Iterator[str]:
    """Yield settings and callbacks of the Trainer that communicate, or decide, on each rank by itself.

    Args:
        trainer: The Trainer.
        sync_batchnorm: Whether the Trainer makes BatchNorm talk to all ranks.
        one_version: Whether callbacks that average weights find the same ones on all ranks.

    """
    if sync_batchnorm:
        yield (
            "`Trainer(sync_batchnorm=True)` talks to all ranks in every forward, so nothing would be saved "
            "and ranks could not run apart. Leave it out; BatchNorm statistics are averaged with the weights."
        )
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, ModelPruning):
            yield (
                "the callback ModelPruning chooses a mask from each rank's own weights, so ranks would "
                "prune differently. Prune before training, alike on all ranks, or use plain DDP."
            )
        if isinstance(callback, StochasticWeightAveraging) and not one_version:
            yield (
                "the callback StochasticWeightAveraging averages each rank's own weights and swaps them in "
                "at the end of the run, so ranks would end with different models. Average checkpoints, or under "
                "LocalUpdateStrategy use WeightAveraging or EMAWeightAveraging, whose copies are averaged there."
            )


def check_twin_callbacks(callbacks: list[Any], where: str) -> None:
    """Refuse callbacks of the package ``pytorch_lightning``, which the Trainer of ``lightning`` takes unnoticed."""
    twin = sys.modules.get("pytorch_lightning")
    for callback in callbacks:
        if twin is not None and isinstance(callback, twin.Callback) and not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"{where}: the callback {type(callback).__name__} comes from `pytorch_lightning`, and this Trainer "
                "from `lightning.pytorch`: two packages with classes of their own. Import everything from one: `from "
                "lightning.pytorch.callbacks import ...` instead of `from pytorch_lightning.callbacks import ...`."
            )


def optimizer_problems(module: LightningModule, optimizers: list[Optimizer], settings: Settings) -> Iterator[str]:
    """Yield optimizers that communicate in their ``step``, and a ``counted_optimizer`` that is not there."""
    if has_no_optimizer(optimizers):
        yield no_optimizer(module, "ranks have nothing to average")
        return
    if module.automatic_optimization:
        yield from trained_problems(module, optimizers)
    for optimizer in optimizers:
        if any(base.__name__ in COMMUNICATING for base in type(optimizer).__mro__):
            yield (
                f"the optimizer {type(optimizer).__name__} communicates in its `step`, where ranks run apart."
                " Use the plain optimizer inside it."
            )
        if settings.optimizer_state == "average" and isinstance(optimizer, LBFGS):
            yield (
                "`optimizer_state='average'` needs states that have a mean, and LBFGS keeps a history. Use "
                "'local', as the authors of QSR do."
            )
    if settings.counted_optimizer >= len(optimizers):
        yield (
            f"`counted_optimizer`={settings.counted_optimizer} is not there; `configure_optimizers` returned "
            f"{len(optimizers)} optimizer(s), counted from 0."
        )
    elif not (counted := optimizers[settings.counted_optimizer]).param_groups:
        yield (
            f"`counted_optimizer`={settings.counted_optimizer} is a {type(counted).__name__} without parameter groups, "
            "so it has no learning rate that rounds could follow. Count another one."
        )


def length_problems(trainer: Trainer, module: LightningModule, settings: Settings) -> Iterator[str]:
    """Yield a share of the run where its length cannot be known, as far as that is seen without the data.

    The rest is refused when training starts, by :func:`gradient_steps`.
    """
    share = settings.gradient_steps
    if isinstance(share, int) or share == 0:
        return
    automatic = module.automatic_optimization
    endless = trainer.max_steps == -1 and trainer.max_epochs in (None, -1)
    if not automatic or endless:
        yield _share_of_unknown(share, automatic)


def _share_of_unknown(share: float, automatic: bool) -> str:
    why = (
        "its length is not known before. Give a number of optimizer steps, such as `gradient_steps=500`"
        if automatic
        else "under manual optimization only your code knows how often it steps. Give a number of steps of the "
        "counted optimizer, such as `LocalUpdateStrategy(FixedPeriod(8), gradient_steps=500)`"
    )
    way_out = ", or the Trainer a `max_steps`." if automatic else ", instead of a share or of `post_local_sgd`."
    return f"`gradient_steps`={share!r} is a share of the run, and {why}{way_out}"


def gradient_steps(settings: Settings, total: int | None, *, automatic: bool = True) -> int:
    """Return the length of the gradient phase in optimizer steps.

    Args:
        settings: What the user chose.
        total: Optimizer steps of the run, from its beginning, if known.
        automatic: Whether Lightning steps the optimizer, which decides what helps where the length is not known.

    """
    if isinstance(settings.gradient_steps, int):
        return settings.gradient_steps
    if settings.gradient_steps == 0:
        return 0
    if total is None:
        raise ValueError(f"{_WHERE}: {_share_of_unknown(settings.gradient_steps, automatic)}")
    return round(settings.gradient_steps * total)


def warn_at_start(trainer: Trainer, settings: Settings, total: int | None, world_size: int) -> None:
    """Say what will run, but probably not as meant."""
    rule = settings.period
    grows = type(rule) in (PowerPeriod, QuadraticPeriod) and getattr(rule, "alpha", None) != 0
    if world_size == 1:
        rank_zero_warn(
            f"{_WHERE}: one process only, so there is nothing to synchronise; training goes on as without the "
            "strategy. Give the Trainer `devices=2` or more."
        )
    if grows and not trainer.lr_scheduler_configs:
        rank_zero_warn(
            f"{_WHERE}: {type(rule).__name__} follows the learning rate, and there is no learning-rate scheduler, so "
            "the period stays constant. Return one from `configure_optimizers`, or use FixedPeriod."
        )
    if grows and total is None and getattr(rule, "h_max", None) is None:
        automatic = trainer.lightning_module.automatic_optimization
        rank_zero_warn(
            f"{_WHERE}: the length of the run is not known before, so a round that starts at a small learning rate may "
            f"be very long. Set `h_max` on the rule{', or `max_steps` on the Trainer' if automatic else ''}."
        )
    for optimizer in trainer.optimizers if settings.optimizer_state == "local" else []:
        if has_modes(optimizer) or "Lookahead" in type(optimizer).__name__:
            rank_zero_warn(
                f"{_WHERE}: {type(optimizer).__name__} keeps a second copy of the weights in its state, which stays "
                "local while the weights are averaged. Set `optimizer_state='average'`."
            )
    floor = shortest_period(rule)
    if total is not None and floor is not None and floor > total:
        rank_zero_warn(
            f"{_WHERE}: the shortest period, {floor} steps, is longer than the run of {total}, so ranks are averaged "
            "once, at the end. Give a smaller `h_base` (or `steps`), unless this is a trial run."
        )


def warn_of_uncounted_steps(steps_done: int) -> None:
    """Say that an epoch ended without a step of the counted optimizer, so that nothing is averaged."""
    if steps_done == 0:
        rank_zero_warn(
            f"{_WHERE}: no step of the counted optimizer was seen in a whole epoch, so ranks are not averaged until "
            "the run ends. Step the optimizers that `self.optimizers()` returns, not those of "
            "`use_pl_optimizer=False`, and look at `counted_optimizer`."
        )


def leave_out_other_model(where: str, checkpoint: dict[str, Any], filepath: object) -> None:
    """Leave the optimizers of the last ``fit`` out of a checkpoint that is of another model, and say so.

    Lightning keeps them when another model is evaluated, and would save them with its weights.
    """
    if "optimizer_states" not in checkpoint:
        return  # weights alone were asked for
    checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
    rank_zero_warn(
        f"{where}: {str(filepath)!r} has the weights of the model that was evaluated last, and neither optimizer state "
        "nor what this strategy keeps, since the last `fit` of this Trainer was that of another model. To save the "
        "trained model, call `save_checkpoint` before another one is evaluated."
    )


def warn_of_per_step_sync(trainer: Trainer, where: str) -> None:
    """Name what is logged with a collective on every step, which keeps ranks in step with each other."""
    names = sorted({metric.name for metric in logged_metrics(trainer) if metric.synchronised and metric.on_step})
    if names:
        rank_zero_warn(
            f"{where}: {', '.join(map(repr, names))} is logged with `sync_dist=True` on every step. That is a "
            "collective a step, so ranks cannot run apart and most of the time saved is lost. Log it with "
            "`on_step=False, on_epoch=True`, or without `sync_dist`."
        )
