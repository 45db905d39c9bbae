"""The learning rate of each optimizer step, as a plain function of numbers."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, get_args

ScheduleName = Literal["cosine", "step", "constant"]


@dataclass(frozen=True)
class LrSchedule:
    r"""A learning rate that rises linearly in the warm-up, then falls along a cosine or in steps, or stays constant.

    With peak rate :math:`p`, final rate :math:`f` and :math:`w` steps of warm-up, the rate after :math:`t` steps is

    .. math:: f + t\,(p - f) / w \quad (t < w)

    Args:
        lr: The peak rate; more than 0.
        schedule: What follows the warm-up.
        warmup_steps: Optimizer steps until the peak is reached; 0 starts with it.
        final_lr: Where the warm-up starts and the cosine ends; from 0 to ``lr``.
        decay_at_steps: For ``"step"``: the optimizer steps after which the rate is lower.
        decay_factor: For ``"step"``: the factor by which the rate is multiplied each time; more than 0, at most 1.

    Raises:
        ValueError: If an argument is out of range, or has no meaning for the schedule.

    Example:
        >>> cosine = LrSchedule(lr=0.1, warmup_steps=2)
        >>> [round(cosine.rate(step, total_steps=6), 3) for step in range(7)]
        [0.0, 0.05, 0.1, 0.085, 0.05, 0.015, 0.0]

    """

    lr: float
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    final_lr: float = 0.0
    decay_at_steps: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"LrSchedule: `lr` is the peak rate, so it must be finite and > 0; got {self.lr!r}.")
        if self.schedule not in get_args(ScheduleName):
            raise ValueError(
                f"LrSchedule: `schedule` must be one of {get_args(ScheduleName)}; got {self.schedule!r}. 'constant' "
                "leaves the rate at its peak."
            )
        if self.warmup_steps < 0:
            raise ValueError(
                f"LrSchedule: `warmup_steps` counts optimizer steps, so it must be >= 0; got {self.warmup_steps!r}. 0 "
                "starts at the peak."
            )
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(
                f"LrSchedule: `final_lr` must be from 0 to the peak `lr`={self.lr}; got {self.final_lr!r}. It is where "
                "the warm-up starts and the cosine ends."
            )
        if self.schedule == "step" and not self.decay_at_steps:
            raise ValueError(
                "LrSchedule: `decay_at_steps` says after which optimizer steps the rate falls, so schedule 'step' must "
                f"have one; got {self.decay_at_steps!r}. 'constant' leaves the rate at its peak."
            )
        if self.schedule != "step" and self.decay_at_steps:
            raise ValueError(
                f"LrSchedule: `decay_at_steps` belongs to schedule 'step', and this one is {self.schedule!r}; got "
                f"{self.decay_at_steps!r}. Leave it out, or take schedule 'step'."
            )
        if not 0 < self.decay_factor <= 1:
            raise ValueError(
                f"LrSchedule: `decay_factor` multiplies the rate, so it must be > 0 and <= 1; got "
                f"{self.decay_factor!r}. 0.1 divides the rate by ten."
            )

    def check_run_length(self, total_steps: float) -> None:
        """Refuse a run of ``total_steps`` optimizer steps that this schedule has no rates for.

        Raises:
            ValueError: If the end of a cosine is unknown, or the run ends in the warm-up.

        """
        known = 0 <= total_steps < math.inf
        if self.schedule == "cosine" and not known:
            raise ValueError(
                "LrSchedule: `schedule` 'cosine' must know where the run ends; got a run of unknown length. Give the "
                "Trainer a `max_epochs` or `max_steps`, or take schedule 'constant' or 'step'."
            )
        if known and self.warmup_steps >= total_steps:
            raise ValueError(
                f"LrSchedule: `warmup_steps` must be less than the {total_steps:.0f} optimizer steps of the run; got "
                f"{self.warmup_steps!r}. Take a shorter warm-up, or train longer."
            )

    def rate(self, step: int, *, total_steps: float) -> float:
        """Return the rate of the optimizer step that comes after ``step`` others.

        Args:
            step: Optimizer steps done.
            total_steps: Optimizer steps of the whole run. Only a cosine past its warm-up uses it.

        """
        return _rate(step, total_steps=total_steps, **asdict(self))

    def share_of_peak(self, total_steps: float) -> Callable[[int], float]:
        """Return a function that maps a step to its rate divided by the peak, in a run of known length.

        It holds only numbers, so a forecast may call it: it has no side effects and always returns the same.
        """
        rate: Callable[[int], float] = partial(_rate, total_steps=total_steps, **asdict(self))
        peak = self.lr
        return lambda step: rate(step) / peak


def _rate(
    step: int,
    *,
    total_steps: float,
    lr: float,
    schedule: str,
    warmup_steps: int,
    final_lr: float,
    decay_at_steps: tuple[int, ...],
    decay_factor: float,
) -> float:
    if step < warmup_steps:
        return final_lr + step * (lr - final_lr) / warmup_steps
    if schedule == "step":
        return lr * decay_factor ** sum(step >= decay for decay in decay_at_steps)
    if schedule == "constant" or step == warmup_steps:
        return lr
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * done)) / 2
