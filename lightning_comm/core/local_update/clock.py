"""The clock of local updates, which counts steps and ends rounds by a period rule.

Standard library only, and no messages: the strategy that trains and the pilot that plans a run use the same clock.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_comm.core.arguments import is_whole, require_steps
from lightning_comm.core.local_update.periods import ENDLESS, PeriodRule


@dataclass
class RoundClock:
    """Counts optimizer steps and decides when a round is over.

    Deciding a length and beginning a round are two calls, because one rank decides for all.

    Args:
        rule: Gives the length of each new round.
        total_steps: Optimizer steps in the whole run; the last round is cut short to end with it. ``None`` if that is
            not known: then the one who trains has to synchronise at the end.
        warmup_steps: How long rounds have the rule's floor instead of asking for the learning rate. A number of steps,
            or ``"auto"``: the first round, and then as long as a round starts at a higher rate than every earlier one
            did.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_comm.core.local_update import FixedPeriod
        >>> clock = RoundClock(rule=FixedPeriod(4), total_steps=10)
        >>> ends = []
        >>> for step in range(1, 11):
        ...     if not clock.in_round:
        ...         clock.begin(clock.decide(lr=0.1))
        ...     if clock.tick():
        ...         ends.append(step)
        >>> ends
        [4, 8, 10]

    """

    rule: PeriodRule
    total_steps: int | None = None
    warmup_steps: int | Literal["auto"] = "auto"
    steps_done: int = field(default=0, init=False)
    round_started_at: int = field(default=0, init=False)
    round_ends_at: int = field(default=0, init=False)
    highest_lr: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            require_steps("RoundClock", "total_steps", self.total_steps, "None stands for a run of unknown length.")
        if self.warmup_steps != "auto" and (not is_whole(self.warmup_steps) or self.warmup_steps < 0):
            raise ValueError(
                f"RoundClock: `warmup_steps` must be a whole number of optimizer steps >= 0, or 'auto'; got "
                f"{self.warmup_steps!r}. 0 asks the rule from the first round on."
            )

    @property
    def in_round(self) -> bool:
        """Whether a round has begun and is not over."""
        return self.steps_done < self.round_ends_at

    @property
    def steps_into_round(self) -> int:
        """Optimizer steps since the last round ended or, in a round, since it began."""
        return self.steps_done - self.round_started_at

    def decide(self, lr: float) -> int:
        """Return the length of a round that starts now at learning rate ``lr``, cut to the end of the run.

        Call it on one rank and hand the answer to :meth:`begin` on all of them.

        Raises:
            ValueError: If the learning rate is negative or not finite, if the rule asks for a round without end while
                the end of the run is not known, or if the run is over.

        """
        in_warmup = self._in_warmup(lr)
        ask = self.rule.warmup_period_steps if in_warmup else self.rule.period_steps
        steps = ask(lr=lr, step=self.steps_done)
        if not is_whole(steps) or steps < 1:
            raise ValueError(
                f"{type(self.rule).__name__}: a period must be a whole number of at least 1 optimizer step; got "
                f"{steps!r} at step {self.steps_done}, learning rate {lr!r}."
            )
        if self.total_steps is None:
            if steps >= ENDLESS:
                raise ValueError(
                    f"RoundClock: learning rate {lr!r} at step {self.steps_done} asks for a round without end, and the "
                    "length of the run is not known. Give the rule an `h_max`, or under automatic optimization the "
                    "Trainer a `max_steps`."
                )
            return steps
        rest = self.total_steps - self.steps_done
        if rest < 1:
            raise ValueError(
                f"RoundClock: no round can start at step {self.steps_done} of a run of `total_steps`={self.total_steps}"
                ". Give the number of steps that the run really takes, or None."
            )
        return min(steps, rest)

    def begin(self, steps: int, lr: float | None = None) -> None:
        """Start a round of ``steps`` optimizer steps.

        Args:
            steps: The length, as :meth:`decide` gave it on the deciding rank.
            lr: The learning rate that :meth:`decide` was given there. It is remembered for ``warmup_steps="auto"``;
                left out, the rate of the last :meth:`decide` on this object is.

        """
        if steps < 1:
            raise ValueError(f"RoundClock: a round has at least 1 optimizer step; got {steps!r}.")
        rate = self._asked_lr if lr is None else lr
        if rate is not None:
            self.highest_lr = rate if self.highest_lr is None else max(self.highest_lr, rate)
        self.round_started_at = self.steps_done
        self.round_ends_at = self.steps_done + steps

    def tick(self) -> bool:
        """Record one optimizer step; return True if the round is over and parameters must now be averaged."""
        self.steps_done += 1
        return self.steps_done >= self.round_ends_at

    def end_round(self) -> None:
        """End the current round now, because parameters have been averaged early."""
        self.round_started_at = self.round_ends_at = self.steps_done

    def copy(self) -> "RoundClock":
        """Return a clock that stands where this one does, to look ahead with."""
        return copy.copy(self)

    def state_dict(self) -> dict[str, int | float | None]:
        """Return what a resumed run needs to end the current round on the same step."""
        return {
            "steps_done": self.steps_done,
            "round_started_at": self.round_started_at,
            "round_ends_at": self.round_ends_at,
            "highest_lr": self.highest_lr,
        }

    def load_state_dict(self, state: dict[str, int | float | None]) -> None:
        """Restore the count that ``state_dict`` returned."""
        self.steps_done = int(state["steps_done"] or 0)
        self.round_started_at = int(state["round_started_at"] or 0)
        self.round_ends_at = int(state["round_ends_at"] or 0)
        highest = state["highest_lr"]
        self.highest_lr = None if highest is None else float(highest)

    _asked_lr: float | None = field(default=None, init=False, repr=False)

    def _in_warmup(self, lr: float) -> bool:
        self._asked_lr = lr
        if self.warmup_steps == "auto":
            return self.highest_lr is None or lr > self.highest_lr
        return self.steps_done < self.warmup_steps


def ends_to_come(clock: RoundClock, rates: Sequence[float]) -> tuple[int, ...]:
    """Return after which optimizer steps a run will average its parameters, from where its clock stands.

    Args:
        clock: Of the run; it is left as it is.
        rates: The learning rate that each step to come uses; the run ends with the last of them.

    Example:
        >>> from lightning_comm.core.local_update import FixedPeriod
        >>> ends_to_come(RoundClock(FixedPeriod(4)), [0.1] * 10)
        (4, 8, 10)

    """
    first, total = clock.steps_done, clock.steps_done + len(rates)
    clock = clock.copy()
    clock.total_steps = total
    ends = []
    while clock.steps_done < total:
        if not clock.in_round:
            lr = rates[clock.steps_done - first]
            clock.begin(clock.decide(lr), lr)
        clock.steps_done = min(clock.round_ends_at, total)
        ends.append(clock.steps_done)
    return tuple(ends)


@dataclass(frozen=True)
class _EqualRounds(Collection[int]):
    """Steps after which rounds of one length end; the last one is cut to end with the run."""

    whole: range
    last: int

    def __len__(self) -> int:
        return len(self.whole) + (self.last not in self.whole)

    def __iter__(self) -> Iterator[int]:
        yield from self.whole
        if self.last not in self.whole:
            yield self.last

    def __contains__(self, step: object) -> bool:
        return step == self.last or step in self.whole


def ends_of_equal_rounds(clock: RoundClock, length: int, steps: int) -> Collection[int]:
    """Return what :func:`ends_to_come` does where rounds are of one length; by arithmetic, however long the run.

    Args:
        clock: Of the run; a round that has begun keeps its end.
        length: Of the other rounds, in steps.
        steps: Optimizer steps to come.

    Example:
        >>> from lightning_comm.core.local_update import FixedPeriod
        >>> tuple(ends_of_equal_rounds(RoundClock(FixedPeriod(4)), 4, steps=10))
        (4, 8, 10)

    """
    last = clock.steps_done + steps
    first = clock.round_ends_at if clock.in_round else clock.steps_done + length
    return _EqualRounds(range(first, last + 1, length), last) if steps else ()
