"""Period rules: the number of local updates of each rank before parameters are averaged.

Standard library only. A learning rate comes in as a number and a period goes out as a number, so the strategy that
trains, the pilot that plans the rest of a run and the pages that show its rounds ask the same rule.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

from lightning_comm.core.arguments import is_number, is_whole, require_steps

#: A number of steps that is longer than any run; the round is cut where the end of the run is known.
ENDLESS = 2**62
_ROUNDING_SLACK = 1e-9  # relative: far above rounding error, far below a change anyone could notice

# Coefficients of QSR as multiples of the peak learning rate. Adam: 0.0175 / 0.008, in the authors' script for ViT-B.
# SGD: 0.2 / 0.8 and 0.25 / 0.8, as reported for the authors' ResNet-152 at `h_base` 2 and 4; their scripts have no such
# run, so these are a start rather than a reference.
_AUTO_RATIO_ADAM = 2.19
_AUTO_RATIO_SGD = {2: 0.25, 4: 0.31}
_AUTO_START_SGD = 0.14  # both SGD settings let the period grow below 14 % of the peak; this carries it to other floors


class PeriodRule(ABC):
    """Maps the learning rate at the start of a round to the length of that round.

    A rule of your own implements :meth:`period_steps`. It has to be a frozen value, since one rule is shared by all
    Trainers that name it.
    """

    @abstractmethod
    def period_steps(self, *, lr: float, step: int) -> int:
        """Return the length, in optimizer steps, at least 1, of a round that starts at ``step``.

        Args:
            lr: The learning rate that the first step of the round will use.
            step: Optimizer steps done before the round.

        """

    def warmup_period_steps(self, *, lr: float, step: int) -> int:
        """Return the length of a round that starts while the learning rate is still rising.

        A rule that would take a small rate in warm-up for one at the end of the run returns its floor here.
        """
        return self.period_steps(lr=lr, step=step)


@dataclass(frozen=True)
class FixedPeriod(PeriodRule):
    """Synchronise every ``steps`` optimizer steps, whatever the learning rate (Local SGD).

    Args:
        steps: The period, in optimizer steps; at least 1. 1 averages after every step.

    Raises:
        ValueError: If ``steps`` is not a whole number of at least 1.

    Note:
        *Communication.* None. One rank asks the rule, and its answer is sent with the synchronisation.

        *Memory.* None.

    Example:
        >>> FixedPeriod(8).period_steps(lr=0.1, step=0)
        8

    References:
        S. Stich. `Local SGD Converges Fast and Communicates Little <https://arxiv.org/abs/1805.09767>`_. ICLR 2019.

    """

    steps: int

    def __post_init__(self) -> None:
        require_steps("FixedPeriod", "steps", self.steps, "1 averages after every step.")

    def period_steps(self, *, lr: float, step: int) -> int:
        """Return ``steps``."""
        return self.steps


@dataclass(frozen=True)
class PowerPeriod(PeriodRule):
    r"""Let the averaging period grow with a power of the inverse learning rate.

    A round that starts at learning rate :math:`\eta` lasts

    .. math:: H(\eta) = \max\bigl(H_{base},\; \lfloor (\alpha / \eta)^{\gamma} \rfloor\bigr)

    optimizer steps. :math:`\gamma = 2` is the quadratic rule, for which :class:`QuadraticPeriod` has a name of its own;
    1 and 3 are the rules that its authors compare it with.

    Args:
        alpha: The learning rate at which the power term equals one step. Same unit as the optimizer's ``lr``; at least
            0. ``0.0`` leaves a constant period.
        exponent: The power :math:`\gamma`; more than 0.
        h_base: The shortest period, in optimizer steps; at least 1. With gradient accumulation one optimizer step
            spans several batches.
        h_max: The longest period, in optimizer steps; at least ``h_base``. ``None`` sets no limit but the end of the
            run.

    Raises:
        ValueError: If an argument is out of range, or a learning rate is negative or not finite.

    Note:
        *Rounding.* ``0.3 / 0.1`` is a little under 3 in binary, and a plain floor of its square is 8. A power within
        one part in 10\ :sup:`9` below a whole number counts as that number, so the answer here is 9. The authors' code
        takes the plain floor; below 10\ :sup:`9` steps the two differ by at most one.

        *Communication.* None. One rank asks the rule, and its answer is sent with the synchronisation.

        *Memory.* None.

    Example:
        >>> PowerPeriod(alpha=0.2, exponent=1.0, h_base=2).period_steps(lr=0.01, step=0)
        20

    """

    alpha: float
    exponent: float
    h_base: int
    h_max: int | None = None

    def __post_init__(self) -> None:
        _check_power_arguments("PowerPeriod", self.alpha, self.h_base, self.h_max)
        if not is_number(self.exponent) or not (math.isfinite(self.exponent) and self.exponent > 0):
            raise ValueError(
                f"PowerPeriod: `exponent` must be finite and > 0; got {self.exponent!r}. 2 is the quadratic rule."
            )

    def period_steps(self, *, lr: float, step: int) -> int:
        """Return the length, in optimizer steps, of a round that starts at learning rate ``lr``."""
        _check_lr("PowerPeriod", lr, step)
        return _power_steps(self.alpha, self.exponent, self.h_base, self.h_max, lr)

    def warmup_period_steps(self, *, lr: float, step: int) -> int:
        """Return ``h_base``: a small rate in warm-up says nothing about the end of the run."""
        return self.h_base


@dataclass(frozen=True)
class QuadraticPeriod(PeriodRule):
    r"""Let the averaging period grow with the inverse square of the learning rate (QSR).

    A round that starts at learning rate :math:`\eta` lasts

    .. math:: H(\eta) = \max\bigl(H_{base},\; \lfloor (\alpha / \eta)^2 \rfloor\bigr)

    optimizer steps, so at half the learning rate ranks synchronise a quarter as often. While the quadratic term is
    small, the floor :math:`H_{base}` holds.

    Args:
        alpha: The learning rate at which the quadratic term equals one step. Same unit as the optimizer's ``lr``; at
            least 0. ``0.0`` leaves a constant period. ``"auto"`` takes the coefficient of the authors' runs with an
            optimizer of this family, scaled to the peak learning rate, once both are known (:meth:`resolve`); it may
            want tuning.
        h_base: The shortest period, in optimizer steps; at least 1. With gradient accumulation one optimizer step
            spans several batches.
        h_max: The longest period, in optimizer steps; at least ``h_base``. ``None`` sets no limit but the end of the
            run, as in the paper. A limit costs little traffic and bounds how long workers stay apart.

    Raises:
        ValueError: If an argument is out of range, or a learning rate is negative or not finite.
        RuntimeError: If a period is asked for while ``alpha`` is still ``"auto"``.

    Note:
        *Rounding.* As in :class:`PowerPeriod`: a square within rounding below a whole number counts as that number.

        *Communication.* None. One rank asks the rule, and its answer is sent with the synchronisation.

        *Memory.* None.

    Example:
        >>> rule = QuadraticPeriod(alpha=0.3, h_base=4)
        >>> [rule.period_steps(lr=lr, step=0) for lr in (0.4, 0.1, 0.05)]
        [4, 9, 36]

    References:
        X. Gu, K. Lyu, S. Arora, J. Zhang, L. Huang. `A Quadratic Synchronization Rule for Distributed Deep Learning
        <https://arxiv.org/abs/2310.14423>`_. ICLR 2024.

    """

    alpha: float | Literal["auto"] = "auto"
    h_base: int = 4
    h_max: int | None = None

    def __post_init__(self) -> None:
        alpha = 0.0 if self.alpha == "auto" else self.alpha
        _check_power_arguments("QuadraticPeriod", alpha, self.h_base, self.h_max, auto=True)

    def resolve(self, *, family: Literal["adam", "sgd"], peak_lr: float) -> "QuadraticPeriod":
        """Return this rule with ``alpha="auto"`` replaced by a number; a rule that has one is returned as it is.

        Args:
            family: What kind of optimizer takes the steps.
            peak_lr: The highest learning rate of the run; more than 0.

        Raises:
            ValueError: If the family is unknown or the rate is not a positive number.

        Example:
            >>> QuadraticPeriod(h_base=4).resolve(family="adam", peak_lr=0.008).alpha
            0.01752

        """
        if self.alpha != "auto":
            return self
        if not is_number(peak_lr) or not (math.isfinite(peak_lr) and peak_lr > 0):
            raise ValueError(
                f"QuadraticPeriod: `alpha='auto'` scales with the peak learning rate, which must be finite and > 0; "
                f"got {peak_lr!r}. Give `alpha` as a number."
            )
        if family == "adam":
            ratio = _AUTO_RATIO_ADAM
        elif family == "sgd":
            ratio = _AUTO_RATIO_SGD.get(self.h_base, _AUTO_START_SGD * math.sqrt(self.h_base + 1))
        else:
            raise ValueError(
                f"QuadraticPeriod: `alpha='auto'` knows the families 'adam' and 'sgd'; got {family!r}. Give `alpha` as "
                "a number: the learning rate below which the period starts to grow, times sqrt(h_base + 1)."
            )
        return replace(self, alpha=ratio * peak_lr)

    def period_steps(self, *, lr: float, step: int) -> int:
        """Return the length, in optimizer steps, of a round that starts at learning rate ``lr``."""
        if self.alpha == "auto":
            raise RuntimeError(
                "QuadraticPeriod: `alpha` is still 'auto', which stands for a number that depends on the optimizer and "
                "its peak learning rate. LocalUpdateStrategy resolves it at the start of a run; elsewhere call "
                "`resolve(family=..., peak_lr=...)`, or give a number."
            )
        _check_lr("QuadraticPeriod", lr, step)
        return _power_steps(self.alpha, 2.0, self.h_base, self.h_max, lr)

    def warmup_period_steps(self, *, lr: float, step: int) -> int:
        """Return ``h_base``: a small rate in warm-up says nothing about the end of the run."""
        return self.h_base


def _power_steps(alpha: float, exponent: float, h_base: int, h_max: int | None, lr: float) -> int:
    if alpha == 0:
        return h_base
    longest = ENDLESS if h_max is None else h_max
    try:
        power = (alpha / lr) ** exponent * (1 + _ROUNDING_SLACK)
    except (ZeroDivisionError, OverflowError):  # a rate of 0, or so small that the power has no float
        return longest
    return max(h_base, math.floor(power)) if power < longest else longest


def _check_power_arguments(where: str, alpha: object, h_base: object, h_max: object, *, auto: bool = False) -> None:
    if not is_number(alpha) or not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(
            f"{where}: `alpha` is a learning rate, so it must be a finite number >= 0{' or `auto`' * auto}; got "
            f"{alpha!r}. It is the rate at which the power term equals one step; 0.0 gives a constant period."
        )
    require_steps(where, "h_base", h_base, "1 averages after every step.")
    if h_max is not None:
        require_steps(where, "h_max", h_max, "None sets no limit.")
        if is_whole(h_max) and is_whole(h_base) and h_max < h_base:
            raise ValueError(
                f"{where}: `h_max` is the longest period, so it must be >= `h_base`={h_base}; got {h_max!r}. None sets "
                "no limit."
            )


def _check_lr(where: str, lr: float, step: int) -> None:
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(
            f"{where}: a learning rate must be finite and >= 0; got {lr!r} at step {step}. Look at the learning-rate "
            "scheduler."
        )
