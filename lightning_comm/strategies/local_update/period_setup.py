"""The set-up of a period rule in a run: its coefficient, by optimizer and peak rate, and its shortest period."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_comm.core.local_update.periods import FixedPeriod, PeriodRule, PowerPeriod, QuadraticPeriod
from lightning_comm.strategies.common.pure_functions import what_it_changes
from lightning_comm.strategies.local_update.settings import Settings

_AUTO_SOURCES = {
    "adam": "in the script of QSR's authors for ViT-B",
    "sgd": "reported for the ResNet-152 of QSR's authors",
}

_ADAM_LIKE = ("Adam", "Adan", "Adopt", "Lamb", "NAdam", "RAdam")  # with these names or names that begin so


def period_problems(optimizers: list[Optimizer], settings: Settings, saved_alpha: float | None) -> Iterator[str]:
    """Yield a problem if no coefficient is known for the optimizer, and none was given or resumed."""
    period, index = settings.period, settings.counted_optimizer
    if not isinstance(period, QuadraticPeriod) or period.alpha != "auto" or saved_alpha is not None:
        return
    if index < len(optimizers) and optimizers[index].param_groups:
        family = optimizer_family(optimizers[index])
        if family not in _AUTO_SOURCES:
            yield (
                f"`QuadraticPeriod(alpha='auto')` knows the families 'adam' and 'sgd'; got {family!r}. Give `alpha` as "
                "a number: the learning rate below which the period starts to grow, times sqrt(h_base + 1)."
            )


def shortest_period(rule: PeriodRule) -> int | None:
    """Return the shortest round of a rule of ours; ``None`` for one of the user's own, also if it derives from ours."""
    if type(rule) is FixedPeriod:
        return rule.steps
    if isinstance(rule, (PowerPeriod, QuadraticPeriod)) and type(rule) in (PowerPeriod, QuadraticPeriod):
        return rule.h_base
    return None


def optimizer_family(optimizer: Optimizer) -> str:
    """Return ``"adam"`` or ``"sgd"``, by the name of its class or of one that it derives from; else its class name."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    if any(name.startswith(_ADAM_LIKE) for name in names):
        return "adam"
    if any(name.startswith("SGD") for name in names):
        return "sgd"
    return type(optimizer).__name__


def peak_lr(optimizer: Optimizer, configs: list[LRSchedulerConfig], trainer: Trainer, total: int | None) -> float:
    """Return the highest learning rate that the optimizer will have, over all groups.

    Schedulers of torch leave the rate before any scaling in ``initial_lr``, and OneCycleLR its peak in ``max_lr``. A
    LambdaLR may never reach ``initial_lr``, or exceed it, so its factors are evaluated. A learning-rate finder changes
    ``lr`` and leaves the others as they were.

    Raises:
        ValueError: If evaluating a LambdaLR is seen to change its later results, or anything else.

    """
    for config in configs:
        scheduler = config.scheduler
        if type(scheduler) is LambdaLR and scheduler.optimizer is optimizer and total is not None:
            count = total if config.interval == "step" else max(1, trainer.max_epochs or 1)
            bases, factors = scheduler.base_lrs, scheduler.lr_lambdas
            for changed in filter(None, map(what_it_changes, factors)):
                raise ValueError(
                    f"QuadraticPeriod: `alpha='auto'` asks a LambdaLR for all its rates before training, and "
                    f"{changed}, so training would get other ones. Give `alpha` as a number, or a function that "
                    "depends on its argument alone."
                )
            steps = range(0, count + 1, max(1, count // 2000))
            rates = [base * max(_asked(factor, steps)) for base, factor in zip(bases, factors, strict=True)]
            return float(max(rates))
    found = any(isinstance(callback, LearningRateFinder) for callback in getattr(trainer, "callbacks", []))
    keys = ("lr",) if found else ("lr", "initial_lr", "max_lr")
    return max(float(group[key]) for group in optimizer.param_groups for key in keys if key in group)


def _asked(factor: Callable[[int], float], steps: range) -> Iterator[float]:
    """Yield the factors of these steps, up to the first for which the function fails; a run may stop before it."""
    yield factor(steps[0])
    for step in steps[1:]:
        try:
            yield factor(step)
        except Exception:  # training raises it, if it gets that far
            return


def resolved_period(trainer: Trainer, settings: Settings, total: int | None, saved_alpha: float | None) -> PeriodRule:
    """Return the rule with its coefficient as a number: that of the run which is resumed, or one by the family."""
    period = settings.period
    if not isinstance(period, QuadraticPeriod) or period.alpha != "auto":
        return period
    if saved_alpha is not None:
        return replace(period, alpha=saved_alpha)
    optimizer = trainer.strategy.optimizers[settings.counted_optimizer]
    family, peak = optimizer_family(optimizer), peak_lr(optimizer, trainer.lr_scheduler_configs, trainer, total)
    resolved = period.resolve(family=family, peak_lr=peak)  # type: ignore[arg-type]  # it names the families it knows
    alpha = float(resolved.alpha)
    rank_zero_info(
        f"QuadraticPeriod: alpha='auto' is {alpha:.4g}: {alpha / peak:.3g} times the peak learning "
        f"rate ({peak:g}), as {_AUTO_SOURCES[family]}, chosen because the optimizer is {type(optimizer).__name__}. It "
        "may want tuning: a larger alpha communicates less."
    )
    return resolved
