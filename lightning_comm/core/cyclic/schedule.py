"""The schedule of Cyclic Data Parallelism: turns, versions of the parameters, and messages between workers.

Numbers only. Workers are ranks, counted from 0; stages are counted from 0 at the input; *version v* of a stage is what
it holds after ``v`` optimizer steps. The strategy that trains, the reference on one device and the checker
(:mod:`lightning_comm.core.cyclic.proof`) use this file.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Rule = Literal["v1", "v2"]
TransferKind = Literal["gradient", "parameters"]
TRANSFER_KINDS: tuple[TransferKind, ...] = ("gradient", "parameters")
RULES: tuple[Rule, ...] = ("v1", "v2")


@dataclass(frozen=True, slots=True)
class Turn:
    """The work of a worker in one slot: one stage, forward or backward, of its micro-batch of one step."""

    step: int
    stage: int
    forward: bool


@dataclass(frozen=True, slots=True)
class Transfer:
    """One planned message between neighbours on the ring; the messages themselves are in `transport.cyclic.messages`.

    Args:
        kind: ``"gradient"``: the sum of the gradients of a step so far; ``"parameters"``: a new version.
        source: The worker that sends it.
        target: The worker after it on the ring, that receives it.
        stage: Of which stage.
        step: The step whose gradient it is; parameters are version ``step + 1``.

    """

    kind: TransferKind
    source: int
    target: int
    stage: int
    step: int


@dataclass(frozen=True, slots=True)
class CyclicSchedule:
    r"""The rules of Cyclic Data Parallelism for given numbers of workers and stages.

    A stage's *owner* is the first worker that needs its newest version. It keeps the stage's optimizer state, adds its
    gradient last, and passes the new version on.

    Args:
        workers: N, the number of ranks; at least 1.
        stages: S; a multiple of N, or half of N where N is even.
        rule: ``"v1"``: every worker computes each step with the parameters of one update ago; ``"v2"``: with the newest
            ones where its turn comes late enough for them: worker i (from 0) at stage j if
            :math:`j / S \ge (N - 1 - i) / N`.
        lag: By how many workers later than under ``"v2"`` the newest parameters count as fresh; 0 to N, and N is
            ``"v1"``. Above 0 only where S = N.
        warmup_sync_steps: For this many steps at the start all use the newest parameters, as plain data parallelism
        does.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None.

        *Source.* The paper counts from 1 and has S = N: fresh if i + j >= N + 1. The rule for other S and ``lag`` are
        derived in this project.

    Example:
        >>> schedule = CyclicSchedule(workers=4, stages=4)
        >>> [[schedule.version(worker, stage, step=7) for stage in range(4)] for worker in range(4)]
        [[6, 6, 6, 7], [6, 6, 7, 7], [6, 7, 7, 7], [7, 7, 7, 7]]
        >>> [schedule.owner(stage) for stage in range(4)], schedule.path(stage=1)
        ([3, 2, 1, 0], (3, 0, 1, 2))

    References:
        L. Fournier, E. Oyallon. `Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks
        <https://arxiv.org/abs/2403.08837>`_. 2024.

    """

    workers: int
    stages: int
    rule: Rule = "v2"
    lag: int = 0
    warmup_sync_steps: int = 0

    def __post_init__(self) -> None:
        n, s = self.workers, self.stages
        for name in ("workers", "stages", "lag", "warmup_sync_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"CyclicSchedule: `{name}` must be a whole number; got {value!r}.")
        if n < 1:
            raise ValueError(f"CyclicSchedule: `workers` must be >= 1; got {n!r}. It is the number of ranks.")
        if s < 1 or (s % n and 2 * s != n):
            raise ValueError(
                f"CyclicSchedule: `stages` must be a multiple of the number of workers, {n}, or half of it; got {s!r}. "
                f"Use {n}, {2 * n} or {3 * n}."
            )
        if self.rule not in RULES:
            raise ValueError(f"CyclicSchedule: `rule` must be 'v1' or 'v2'; got {self.rule!r}.")
        if not 0 <= self.lag <= n:
            raise ValueError(
                f"CyclicSchedule: `lag` must be from 0 to the number of workers, {n}; got {self.lag!r}. 0 is rule 'v2' "
                f"as published, and {n} is 'v1'."
            )
        if self.lag and s != n:
            raise ValueError(
                f"CyclicSchedule: `lag`={self.lag} needs as many stages as workers, {n}; got `stages`={s!r}. Give "
                f"`stages={n}`, or leave `lag` at 0."
            )
        if self.warmup_sync_steps < 0:
            raise ValueError(
                f"CyclicSchedule: `warmup_sync_steps` must be >= 0; got {self.warmup_sync_steps!r}. It counts "
                "optimizer steps."
            )

    # ---- versions ------------------------------------------------------------------------------------------------

    def is_fresh(self, worker: int, stage: int) -> bool:
        """Whether a worker uses the newest version of a stage, after the warm-up."""
        behind = self.workers if self.rule == "v1" else self.lag
        return stage * self.workers >= (self.workers - 1 - worker + behind) * self.stages

    @property
    def mean_delay(self) -> float:
        """How many updates old parameters are, on average over workers and stages, after the warm-up.

        Example:
            >>> CyclicSchedule(workers=4, stages=4).mean_delay
            0.375

        """
        pairs = itertools.product(range(self.workers), range(self.stages))
        return sum(not self.is_fresh(*pair) for pair in pairs) / (self.workers * self.stages)

    def version(self, worker: int, stage: int, step: int, flushed_at: int = 0) -> int:
        """Return the version of a stage with which a worker computes a step, forward and backward alike.

        Args:
            worker: Which.
            stage: Of which stage.
            step: The optimizer step, from 0.
            flushed_at: How many steps had been done when all workers last had the newest version of everything.

        """
        if step < self.warmup_sync_steps or self.is_fresh(worker, stage):
            return step
        return max(step - 1, flushed_at)

    # ---- the ring ------------------------------------------------------------------------------------------------

    def owner(self, stage: int) -> int:
        """Return the worker that updates a stage: under ``"v2"`` without lag the first that needs its new version."""
        return self.workers - 1 - stage * self.workers // self.stages

    def owned(self, worker: int) -> tuple[int, ...]:
        """Return the stages that a worker updates; none for every second one where S is half of N."""
        return tuple(stage for stage in range(self.stages) if self.owner(stage) == worker)

    def after(self, worker: int) -> int:
        """Return the next worker on the ring."""
        return (worker + 1) % self.workers

    def path(self, stage: int) -> tuple[int, ...]:
        """Return the workers in the order in which they add their gradients of a stage: from behind its owner to it."""
        return tuple((self.owner(stage) + 1 + k) % self.workers for k in range(self.workers))

    def way_back(self, stage: int) -> tuple[int, ...]:
        """Return the workers in the order in which they get a new version of a stage, the owner first."""
        *others, owner = self.path(stage)
        return (owner, *others)

    def sends(self, worker: int, stage: int, kind: TransferKind) -> bool:
        """Whether a worker passes a stage's gradient, or its new version, on to the next one."""
        way = self.path(stage) if kind == "gradient" else self.way_back(stage)
        return worker != way[-1]

    def receives(self, worker: int, stage: int, kind: TransferKind) -> bool:
        """Whether a worker gets a stage's gradient, or its new version, from the one before it."""
        return self.sends((worker - 1) % self.workers, stage, kind)

    def order(self) -> tuple[int, ...]:
        """Return the stages in the order in which every worker handles their transfers: as backward finishes them."""
        return tuple(reversed(range(self.stages)))

    def transfers(self, step: int) -> Iterator[Transfer]:
        """Yield all transfers of a step, a stage after the other along its path: gradients, then parameters."""
        for stage in self.order():
            for source, target in itertools.pairwise(self.path(stage)):
                yield Transfer("gradient", source, target, stage, step)
            for source, target in itertools.pairwise(self.way_back(stage)):
                yield Transfer("parameters", source, target, stage, step)

    def needed_slot(self, source: int, kind: TransferKind, stage: int, step: int) -> int:
        """Return the slot of the forward that needs a transfer first: where several wait for a link, it goes first.

        That is the earliest among the workers that the new version reaches through this transfer. It is never before
        step ``step + 1`` begins, so what a worker waits for in step ``step - 1`` or earlier is always more urgent.

        Args:
            source: The worker that sends it.
            kind: What it holds.
            stage: Of which stage.
            step: The step whose gradient it is, or of which the new version is made.

        Example:
            >>> schedule = CyclicSchedule(workers=4, stages=4)
            >>> [schedule.needed_slot(source, "parameters", stage=2, step=0) for source in (1, 2, 3)]
            [14, 16, 18]

        """
        targets = self.way_back(stage)
        if kind == "parameters":
            targets = targets[targets.index(source) + 1 :]
        return min(
            (step + (1 if self.version(each, stage, step + 1) == step + 1 else 2)) * 2 * self.stages
            + self.delay_slots * each
            + stage
            for each in targets
        )

    def urgency(self, source: int, kind: TransferKind, stage: int, step: int, flushed_at: int = 0) -> tuple[int, int]:
        """Return what orders the transfers that wait for a link: the smaller goes first.

        A worker that has not passed a flush receives nothing of the steps after it, so all from before it goes first.
        While all workers use the newest version, or all the one before, none is behind another: slots count no delay.

        Args:
            source: The worker that sends it.
            kind: What it holds.
            stage: Of which stage.
            step: The step whose gradient it is, or of which the new version is made.
            flushed_at: As in :meth:`version`.

        """
        if step + 1 < self.warmup_sync_steps or self.lag == self.workers:
            return flushed_at, (step + 1) * 2 * self.stages + stage
        return flushed_at, self.needed_slot(source, kind, stage, step)

    def number(self, kind: TransferKind, stage: int, step: int) -> int:
        """Return a whole number that names a transfer among all that a worker sends."""
        return 2 * (step * self.stages + stage) + (kind == "parameters")

    @property
    def sends_urgent_first(self) -> bool:
        """Whether what waits for a link is put in order, where the backend allows it.

        With two workers no quiet way is left for acknowledgements, and under ``"v1"`` nothing is urgent.
        """
        return self.workers > 2 and self.rule == "v2"

    def sent_bytes(self, worker: int, stage_bytes: list[int]) -> int:
        """Return the payload that a worker sends in a step: gradients of a step, and the versions made of them.

        Over all workers the mean is 2 (N - 1) / N of the model.

        Example:
            >>> CyclicSchedule(workers=4, stages=4).sent_bytes(0, stage_bytes=[100, 100, 100, 100])
            600

        """
        sent = 0
        for stage, size in enumerate(stage_bytes):
            sent += size * (self.sends(worker, stage, "gradient") + self.sends(worker, stage, "parameters"))
        return sent

    # ---- slots ---------------------------------------------------------------------------------------------------

    def turn(self, worker: int, slot: int) -> Turn | None:
        """Return what a worker does in a slot where all stages take equally long; ``None`` before its first turn.

        A step takes each worker 2 S slots, and worker i begins 2 S / N slots after the one before it.
        """
        since = slot - self.delay_slots * worker
        if since < 0:
            return None
        step, phase = divmod(since, 2 * self.stages)
        return Turn(step, phase, True) if phase < self.stages else Turn(step, 2 * self.stages - 1 - phase, False)

    @property
    def delay_slots(self) -> int:
        """By how many slots each worker is behind the one before it."""
        return 2 * self.stages // self.workers

    def live_stages(self, slot: int) -> int:
        """Return how many stages' activations are kept in a slot, over all workers.

        A stage's activations live from the slot of its forward to that of its backward. With S = N this is N (N + 1) /
        2 in every slot, once all workers are at work; in plain data parallelism it is N^2 at the peak.

        Example:
            >>> schedule = CyclicSchedule(workers=4, stages=4)
            >>> [schedule.live_stages(slot) for slot in range(12, 20)]
            [10, 10, 10, 10, 10, 10, 10, 10]

        """
        live = 0
        for worker in range(self.workers):
            turn = self.turn(worker, slot)
            if turn is not None:
                live += turn.stage + 1
        return live
