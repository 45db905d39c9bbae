"""The projection of a few measured steps to the whole run: which steps synchronise, and the time and bytes of all.

A period that follows the learning rate cannot be judged from sixty steps. What can be measured there is what a step
and a synchronisation cost; how often the run will synchronise is known from its schedule, because the clock that will
decide it is the one asked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_comm.core.local_update.clock import RoundClock, ends_to_come
from lightning_comm.core.local_update.periods import PeriodRule


@dataclass(frozen=True)
class RunPlan:
    """The plan of a whole run, in optimizer steps.

    Args:
        total_steps: Optimizer steps of the run; at least 1.
        gradient_steps: How many of them send gradients: all of them under DDP, none under local updates, the first
            part under post-local updates.
        round_ends: After which of the other steps parameters are averaged, in order.

    Raises:
        ValueError: If the numbers do not fit each other.

    """

    total_steps: int
    gradient_steps: int
    round_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(
                f"RunPlan: `total_steps` counts optimizer steps, so it must be >= 1; got {self.total_steps!r}. Give "
                "the Trainer a `max_steps` or `max_epochs`."
            )
        if not 0 <= self.gradient_steps <= self.total_steps:
            raise ValueError(
                f"RunPlan: `gradient_steps` must be from 0 to `total_steps`={self.total_steps}; got "
                f"{self.gradient_steps!r}. A phase that is longer than the run ends with it."
            )

    @property
    def synchronisations(self) -> int:
        """How often ranks wait for each other: at each step that sends gradients, and at the end of each round."""
        return self.gradient_steps + len(self.round_ends)


@dataclass(frozen=True)
class StepCosts:
    """The cost of one step and of one synchronisation on one rank, as measured.

    Args:
        step_s: Seconds of a step within a round.
        sync_s: What a synchronisation adds, in seconds.
        gradient_step_s: Seconds of a step that sends gradients.
        step_bytes: Bytes that a rank sends in a step within a round: 0, unless the model or a callback communicates.
        sync_bytes: Bytes that a synchronisation adds.
        gradient_step_bytes: Bytes that a rank sends in a step with gradients.

    """

    step_s: float = 0.0
    sync_s: float = 0.0
    gradient_step_s: float = 0.0
    step_bytes: float = 0.0
    sync_bytes: float = 0.0
    gradient_step_bytes: float = 0.0


@dataclass(frozen=True)
class Projection:
    """The predicted time and bytes of a whole run.

    Args:
        seconds: Time of all steps and synchronisations; without validation, checkpoints and start-up.
        wire_bytes: Bytes that one rank sends.
        synchronisations: How often ranks wait for each other.

    """

    seconds: float
    wire_bytes: float
    synchronisations: int


def round_ends(
    rule: PeriodRule,
    lrs: Sequence[float],
    *,
    gradient_steps: int = 0,
    warmup_steps: int | Literal["auto"] = "auto",
) -> tuple[int, ...]:
    """Return after which optimizer steps a run averages its parameters.

    Args:
        rule: With its coefficient as a number.
        lrs: The learning rate that each step of the run uses, from the first to the last.
        gradient_steps: Steps at the beginning that send gradients instead.
        warmup_steps: As for :class:`~lightning_comm.core.local_update.clock.RoundClock`.

    Note:
        *Communication.* None. It is the clock of the training run that is asked here, with the same numbers.

    Example:
        >>> from lightning_comm.core.local_update import FixedPeriod, QuadraticPeriod
        >>> round_ends(FixedPeriod(4), [0.1] * 10)
        (4, 8, 10)
        >>> round_ends(QuadraticPeriod(alpha=0.1, h_base=2), [0.1] * 6 + [0.05] * 8, warmup_steps=0)
        (2, 4, 6, 10, 14)

    """
    clock = RoundClock(rule, len(lrs), warmup_steps)
    clock.steps_done = min(gradient_steps, len(lrs))
    return ends_to_come(clock, lrs[clock.steps_done :])


def project(plan: RunPlan, costs: StepCosts) -> Projection:
    """Return what the whole run will take, if its steps cost what the measured ones did.

    Example:
        >>> plan = RunPlan(total_steps=10, gradient_steps=0, round_ends=(4, 8, 10))
        >>> project(plan, StepCosts(step_s=1.0, sync_s=5.0, sync_bytes=100.0))
        Projection(seconds=25.0, wire_bytes=300.0, synchronisations=3)

    """
    apart, rounds = plan.total_steps - plan.gradient_steps, len(plan.round_ends)
    return Projection(
        seconds=plan.gradient_steps * costs.gradient_step_s + apart * costs.step_s + rounds * costs.sync_s,
        wire_bytes=plan.gradient_steps * costs.gradient_step_bytes
        + apart * costs.step_bytes
        + rounds * costs.sync_bytes,
        synchronisations=plan.synchronisations,
    )
