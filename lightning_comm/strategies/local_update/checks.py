"""Refusals and warnings of local updates: argument, value, rule, way out.

Functions named `..._problems` yield all that they find; :mod:`lightning_comm.errors` makes one error of it.
"""

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from lightning_comm.core.local_update.clock import RoundClock
from lightning_comm.core.local_update.periods import FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod
from lightning_comm.errors import refuse
from lightning_comm.ondevice.optimizer.state import has_modes
from lightning_comm.strategies.common.checks import COMMUNICATING
from lightning_comm.strategies.common.model_checks import has_no_optimizer, no_optimizer, trained_problems
from lightning_comm.strategies.local_update.period_setup import shortest_period
from lightning_comm.strategies.local_update.settings import Settings
from lightning_comm.transport.averaging import Averaging

_WHERE = "LocalUpdateStrategy"

_CHOICES = {
    "optimizer_state": ("local", "average"),
    "buffers": ("average", "keep"),
    "evaluate_weights": ("average", "local"),
}


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
    """Yield a problem if ``gradient_steps`` is a share of a run of unknown length, as far as is seen without the data.

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
        automatic: Whether Lightning steps the optimizer; the advice for an unknown length depends on it.

    """
    if isinstance(settings.gradient_steps, int):
        return settings.gradient_steps
    if settings.gradient_steps == 0:
        return 0
    if total is None:
        raise ValueError(f"{_WHERE}: {_share_of_unknown(settings.gradient_steps, automatic)}")
    return round(settings.gradient_steps * total)


def warn_at_start(trainer: Trainer, settings: Settings, total: int | None, world_size: int) -> None:
    """Warn of settings that will run, but probably not as intended."""
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
    """Warn if an epoch ended without a step of the counted optimizer, so that nothing is averaged."""
    if steps_done == 0:
        rank_zero_warn(
            f"{_WHERE}: no step of the counted optimizer was seen in a whole epoch, so ranks are not averaged until "
            "the run ends. Step the optimizers that `self.optimizers()` returns, not those of "
            "`use_pl_optimizer=False`, and look at `counted_optimizer`."
        )
