"""The key figures of a step and of a run: bytes, time in communication, the exposed part of it, waiting.

Standard library only. The profiler measures what these types hold, so whatever is predicted in the same types can be
subtracted from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_comm.core.ledger import CommRecord

LIGHTNING = "lightning"  # what the Trainer itself sends: barriers, reduced logs, flags
OTHERS = ("metrics", "user")  # torchmetrics, and the user's own calls
MEETING = "control"  # the rows by which ranks meet: a rank that is early waits for the others there
BESIDE_TRAINING = (  # purposes that belong to no step, and count in none
    "set_up",
    "start",
    "evaluation",
    "batch_norm_statistics",
    "checkpoint",
    "checkpoint_files",
    "instruments",
    "probe",
)


def of_technique(purpose: str) -> bool:
    """Whether messages of this purpose in a step are the technique's own: gradients, parameters, rank status, ….

    It is asked of messages in steps only, so not of those of ``BESIDE_TRAINING``.
    """
    return purpose != LIGHTNING and purpose not in OTHERS


@dataclass(frozen=True)
class StepFigures:
    """One training batch on one rank, from its start to the start of the next one.

    Args:
        batch: Training batches before it in this ``fit``.
        step: Optimizer steps before it, of all optimizers; not a step of the loggers, which count batches that step.
        optimizer_steps: Optimizer steps in it: 0 where it only accumulated gradients, more than one where the module
            optimizes manually and steps several optimizers.
        start_s: When it began, in seconds on this process's monotonic clock.
        duration_s: Its length in seconds: loading, forward, backward, optimizer, callbacks; without validation.
        payload_bytes: The bytes that this rank passed to collectives, by purpose.
        wire_bytes: What this rank sent for it, on average over the ranks, by purpose.
        dense_bytes: What it would have sent for an all-reduce of all gradients in float32 after each backward, as DDP
            sends them: also after one for some of the parameters only. Backwards that accumulate count for nothing.
        comm_s: Seconds in which a message of the technique was under way.
        exposed_s: The part of ``comm_s`` that compute did not hide, waiting included.
        wait_s: The part of ``exposed_s`` that passed in waiting for slower ranks; the rest is transfer.
        lightning_s: Seconds in collectives of Lightning itself. Not in ``comm_s``.
        other_s: Seconds in collectives of metrics and of the user's own code. Not in ``comm_s``.
        timed: Whether all times are known. Bytes always are.
        met: Whether ranks met in an exchange of rank status, so that waiting was measured and need not be inferred.

    """

    batch: int
    step: int
    optimizer_steps: int
    start_s: float
    duration_s: float
    payload_bytes: Mapping[str, int]
    wire_bytes: Mapping[str, int]
    dense_bytes: int
    comm_s: float
    exposed_s: float
    wait_s: float
    lightning_s: float
    other_s: float
    timed: bool = True
    met: bool = False

    @property
    def sent_bytes(self) -> int:
        """What the technique sent from this rank."""
        return sum(count for purpose, count in self.wire_bytes.items() if of_technique(purpose))

    @property
    def own_s(self) -> float:
        """Seconds that this rank did its own work: everything but exposed communication of any kind."""
        return max(0.0, self.duration_s - self.exposed_s - self.lightning_s - self.other_s)


@dataclass(frozen=True)
class StepFrame:
    """The fields of a step that are known before its messages are; see :class:`StepFigures`."""

    batch: int
    step: int
    optimizer_steps: int
    start_s: float
    end_s: float
    dense_bytes: int


def measure_step(frame: StepFrame, records: Sequence[CommRecord]) -> StepFigures:
    """Return the figures of a step from the messages in it.

    Messages may overlap each other, so times are those of the union of their intervals.

    Example:
        >>> sent = [CommRecord("all_reduce", "parameters", 8, 8, 0, start_s=s, duration_s=0.2) for s in (1.0, 1.1)]
        >>> figures = measure_step(StepFrame(0, 0, 1, start_s=0.5, end_s=1.5, dense_bytes=16), sent)
        >>> round(figures.comm_s, 6), figures.sent_bytes, round(figures.own_s, 6)
        (0.3, 16, 0.7)

    """
    technique = [record for record in records if of_technique(record.purpose)]
    meetings = [record for record in technique if record.purpose == MEETING]
    comm_s = union_s(technique)
    return StepFigures(
        batch=frame.batch,
        step=frame.step,
        optimizer_steps=frame.optimizer_steps,
        start_s=frame.start_s,
        duration_s=frame.end_s - frame.start_s,
        payload_bytes=by_purpose((record.purpose, record.payload_bytes) for record in records),
        wire_bytes=by_purpose((record.purpose, record.wire_bytes) for record in records),
        dense_bytes=frame.dense_bytes,
        comm_s=comm_s,
        exposed_s=union_s([exposed_part(record) for record in technique]),
        wait_s=union_s(meetings),
        lightning_s=union_s([record for record in records if record.purpose == LIGHTNING]),
        other_s=union_s([record for record in records if record.purpose in OTHERS]),
        timed=_all_timed(technique),
        met=bool(meetings),
    )


def exposed_part(record: CommRecord) -> CommRecord:
    """Return the part of a message beside which nothing was computed: its end, for which compute waited.

    Example:
        >>> record = CommRecord("all_reduce", "gradients", 8, 8, 0, start_s=1.0, duration_s=0.5, hidden_s=0.375)
        >>> exposed_part(record).start_s, exposed_part(record).duration_s
        (1.375, 0.125)

    """
    return replace(
        record, start_s=record.start_s + record.hidden_s, duration_s=record.duration_s - record.hidden_s, hidden_s=0.0
    )


def _all_timed(records: Sequence[CommRecord]) -> bool:
    """Whether each purpose that has bytes has a time as well, which may stand in a record of its own."""
    with_bytes = {record.purpose for record in records if record.payload_bytes > 0}
    return with_bytes <= {record.purpose for record in records if record.duration_s > 0}


def by_purpose(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the sums of counts by their names."""
    sums: dict[str, int] = {}
    for purpose, count in counts:
        sums[purpose] = sums.get(purpose, 0) + count
    return sums


def intervals(records: Iterable[CommRecord]) -> list[tuple[float, float]]:
    """Return when at least one of the messages was under way: disjoint intervals, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((record.start_s, record.start_s + record.duration_s) for record in records):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def union_s(records: Iterable[CommRecord]) -> float:
    """Return the seconds in which at least one of the messages was under way."""
    return sum(end - start for start, end in intervals(records))


@dataclass(frozen=True)
class RankFigures:
    """One rank over the counted steps of a run; times and bytes are means of one step.

    Args:
        rank: The rank.
        host: The name of its host.
        steps: How many steps are counted.
        step_s: Seconds a step took.
        own_s: Seconds of it in which the rank did its own work.
        comm_s: As in :class:`StepFigures`, and so are the next four.
        exposed_s: As above.
        wait_s: As above; under DDP inferred from all ranks together.
        lightning_s: As above.
        other_s: As above.
        clock_offset_s: What was added to the rank's clock to have rank 0's.
        clock_error_s: By how much that may be wrong at most: half the shortest round trip.
        stopped: Why the profiler stopped on this rank, if it did.

    """

    rank: int
    host: str
    steps: int
    step_s: float
    own_s: float
    comm_s: float
    exposed_s: float
    wait_s: float
    lightning_s: float
    other_s: float
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0
    stopped: str | None = None


@dataclass(frozen=True)
class RunFigures:
    """A run, from all ranks together. Times and bytes are means of one step and rank, unless stated otherwise.

    Args:
        world_size: The number of ranks.
        steps: How many steps are counted: those after the warm-up.
        warmup_steps: How many steps before are left out of times and shares. They are in the totals of bytes.
        step_s: Seconds a step took.
        sent_bytes: What the technique sent.
        dense_bytes: What all-reduces of all gradients in float32 would have sent, as in :class:`StepFigures`.
        comm_s: Seconds in communication of the technique.
        exposed_s: The part that compute did not hide, waiting included.
        wait_s: The part of ``exposed_s`` that was waiting for slower ranks.
        lightning_s: Seconds in Lightning's own collectives.
        other_s: Seconds in collectives of metrics and of the user's own code.
        untimed_steps: Steps whose times of communication are not known, and which count in no mean of them.
        bandwidth_bytes_per_s: What the technique sent, by the seconds in which it was sending and not waiting.
        link_bytes_per_s: What a probe measured for a large all-reduce, if there was one.
        total_payload_bytes: Payload of all steps, warm-up included, by purpose; mean of ``total_ranks``.
        total_wire_bytes: Sent in all steps, warm-up included, by purpose; mean of ``total_ranks``.
        beside_wire_bytes: Sent outside of steps (validation, checkpoints), by purpose; mean of ``total_ranks``.
        total_ranks: How many ranks have measured all steps. Fewer than ``world_size`` where the profiler stopped on a
            rank, or files are missing or cut off; their totals are left out, for they are those of a part of the run.
        total_steps: All steps, warm-up included.
        total_optimizer_steps: The optimizer steps in them.
        ranks: The figures of each rank.
        slow_rank: The rank that stands out as slow: by 5 % or more, and step by step. Its own work takes longer than
            that of the others (median) in three quarters of the steps, and of fewer than 36 steps in so many more that
            chance is left out (three standard deviations; at least 9 steps). ``None`` if there is no such rank.
        slower_by: By how much, as a share of what the others need for the same step; the median of the steps.
        environment: Versions, backend, device.

    """

    world_size: int
    steps: int
    warmup_steps: int
    step_s: float
    sent_bytes: float
    dense_bytes: float
    comm_s: float
    exposed_s: float
    wait_s: float
    lightning_s: float
    other_s: float
    untimed_steps: int
    bandwidth_bytes_per_s: float | None
    link_bytes_per_s: float | None
    total_payload_bytes: Mapping[str, float]
    total_wire_bytes: Mapping[str, float]
    beside_wire_bytes: Mapping[str, float]
    total_ranks: int
    total_steps: int
    total_optimizer_steps: int
    ranks: tuple[RankFigures, ...]
    slow_rank: int | None
    slower_by: float
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share_busy(self) -> float:
        """The share of a step in which a message of the technique was under way."""
        return self.comm_s / self.step_s if self.step_s > 0 else 0.0

    @property
    def share_exposed(self) -> float:
        """The share of a step that training stood still for communication of the technique."""
        return self.exposed_s / self.step_s if self.step_s > 0 else 0.0

    @property
    def transfer_s(self) -> float:
        """The exposed seconds of a step that were not waiting."""
        return max(0.0, self.exposed_s - self.wait_s)

    @property
    def clock_error_s(self) -> float:
        """The largest error of a rank's clock against rank 0's."""
        return max((rank.clock_error_s for rank in self.ranks), default=0.0)

    @property
    def stopped(self) -> dict[int, str]:
        """Why the profiler stopped, for the ranks where it did."""
        return {rank.rank: rank.stopped for rank in self.ranks if rank.stopped is not None}
