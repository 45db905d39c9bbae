"""The profile of one rank, in bounded memory, and the figures of a run, made of the profiles of all ranks.

Standard library only. The same code adds up a run while it goes on and one that is read back from files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import median
from typing import Any, NamedTuple

from lightning_comm.core.key_figures import BESIDE_TRAINING, RankFigures, RunFigures, StepFigures, by_purpose
from lightning_comm.core.ledger import CommRecord
from lightning_comm.core.step_timeline import TimelineStep

SCHEMA = "lightning_comm.profile/1"
FEWEST_TO_COMPARE = 9  # steps, before a rank can stand out: 3 sqrt(9) = 9 of 9
_LITTLE = 0.05  # a share by which a rank may be slower before anything is made of it


class ClockPoint(NamedTuple):
    """One comparison with rank 0's clock: at ``local_s``, ``local_s + offset_s`` was the time on rank 0."""

    local_s: float
    offset_s: float
    error_s: float


@dataclass
class Sums:
    """Sums over steps; those of communication only over steps whose times are known."""

    steps: int = 0
    duration_s: float = 0.0
    timed_steps: int = 0
    inferred_steps: int = 0  # timed steps in which ranks did not meet, so that waiting must be inferred
    own_s: float = 0.0
    comm_s: float = 0.0
    exposed_s: float = 0.0
    wait_s: float = 0.0
    lightning_s: float = 0.0
    other_s: float = 0.0
    timed_sent_bytes: int = 0
    sent_bytes: int = 0
    dense_bytes: int = 0

    def add(self, step: StepFigures) -> None:
        """Add one step."""
        self.steps += 1
        self.duration_s += step.duration_s
        self.sent_bytes += step.sent_bytes
        self.dense_bytes += step.dense_bytes
        if step.timed:
            self.timed_steps += 1
            self.inferred_steps += not step.met
            for name in ("own_s", "comm_s", "exposed_s", "wait_s", "lightning_s", "other_s"):
                setattr(self, name, getattr(self, name) + getattr(step, name))
            self.timed_sent_bytes += step.sent_bytes

    def mean_s(self, name: str) -> float:
        """Return the mean of a time over the steps in which it is known."""
        return float(getattr(self, name)) / self.timed_steps if self.timed_steps else 0.0


@dataclass
class RankProfile:
    """What is known of one rank: sums of all steps, a bounded number of single ones, and a few steps to draw.

    Args:
        header: Who and where: ``rank``, ``world_size``, ``host``, ``warmup_steps``, ``environment``, and
            ``link_bytes_per_s`` if a probe measured that.
        keep: How many single steps are kept at most. When there are more, every second one is dropped: those whose
            number is a multiple of a power of two stay, so all ranks keep the same ones.

    Example:
        >>> profile = RankProfile({"rank": 0, "world_size": 1, "warmup_steps": 0}, keep=4)
        >>> for k in range(10):
        ...     profile.add_step(StepFigures(k, k, 1, 0.1 * k, 0.1, {}, {}, 0, 0, 0, 0, 0, 0))
        >>> [step.batch for step in profile.kept], profile.counted.steps
        ([0, 4, 8], 10)

    """

    header: dict[str, Any]
    keep: int = 1000
    kept: list[StepFigures] = field(default_factory=list)
    stride: int = 1
    early: Sums = field(default_factory=Sums)
    counted: Sums = field(default_factory=Sums)
    optimizer_steps: int = 0
    payload_bytes: dict[str, int] = field(default_factory=dict)
    wire_bytes: dict[str, int] = field(default_factory=dict)
    beside_wire_bytes: dict[str, int] = field(default_factory=dict)
    timeline: list[TimelineStep] = field(default_factory=list)
    clock: list[ClockPoint] = field(default_factory=list)
    stopped: str | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.header["rank"])

    @property
    def all_steps(self) -> int:
        """How many steps were measured, those of the warm-up included."""
        return self.early.steps + self.counted.steps

    @property
    def warmup_steps(self) -> int:
        """How many steps are not counted in times: none in a run that has no others."""
        return int(self.header["warmup_steps"]) if self.counted.steps else 0

    @property
    def sums(self) -> Sums:
        """The sums over the steps that count."""
        return self.counted if self.counted.steps else self.early

    def add_step(self, step: StepFigures) -> None:
        """Add one step."""
        (self.early if step.batch < self.header["warmup_steps"] else self.counted).add(step)
        self.optimizer_steps += step.optimizer_steps
        for sums, counts in ((self.payload_bytes, step.payload_bytes), (self.wire_bytes, step.wire_bytes)):
            for purpose, count in counts.items():
                sums[purpose] = sums.get(purpose, 0) + count
        if step.batch % self.stride == 0:
            self.kept.append(step)
            if len(self.kept) > self.keep:
                self.stride *= 2
                self.kept = [each for each in self.kept if each.batch % self.stride == 0]

    def add_beside(self, wire_bytes: Mapping[str, int]) -> None:
        """Add what was sent outside of steps, by purpose."""
        for purpose, count in wire_bytes.items():
            self.beside_wire_bytes[purpose] = self.beside_wire_bytes.get(purpose, 0) + count

    def on_rank_0(self, local_s: float) -> float:
        """Return the time on rank 0's clock; between two comparisons the clocks are taken to drift evenly."""
        if not self.clock:
            return local_s
        first, last = self.clock[0], self.clock[-1]
        passed = last.local_s - first.local_s
        share = (local_s - first.local_s) / passed if passed > 0 else 0.0
        return local_s + first.offset_s + share * (last.offset_s - first.offset_s)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in plain types."""
        return {**asdict(self), "timeline": [list(step) for step in self.timeline]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RankProfile":
        """Return what :meth:`to_dict` gave."""
        profile = cls(**{each.name: saved[each.name] for each in fields(cls)})
        profile.kept = [StepFigures(**step) for step in saved["kept"]]
        profile.early, profile.counted = Sums(**saved["early"]), Sums(**saved["counted"])
        profile.timeline = [TimelineStep.from_row(row) for row in saved["timeline"]]
        profile.clock = [ClockPoint(*point) for point in saved["clock"]]
        return profile


def beside(records: Iterable[CommRecord]) -> dict[str, int]:
    """Return the wire bytes of messages by purpose."""
    return by_purpose((record.purpose, record.wire_bytes) for record in records)


def belongs_to_step(record: CommRecord) -> bool:
    """Whether a message serves training, and not an evaluation or a checkpoint between two steps."""
    return record.purpose not in BESIDE_TRAINING


def inferred_waits(profiles: Sequence[RankProfile]) -> dict[int, dict[int, float]]:
    """Return, for each rank and batch where waiting was not measured, what it must have been.

    The last rank to arrive at a collective does not wait, so what it stands still is transfer. What another rank
    stands still beyond that is waiting.
    """
    known = [
        {step.batch: step for step in profile.kept if step.timed and not step.met}
        for profile in profiles
        if profile.stopped is None
    ]
    shared = set.intersection(*map(set, known)) if len(known) == len(profiles) and known else set()
    least = {batch: min(steps[batch].exposed_s for steps in known) for batch in shared}
    return {
        profile.rank: {batch: steps[batch].exposed_s - least[batch] for batch in sorted(shared)}
        for profile, steps in zip(profiles, known, strict=False)
    }


def with_waits(steps: Iterable[StepFigures], waits: Mapping[int, float]) -> list[StepFigures]:
    """Return steps with their inferred waiting filled in."""
    return [replace(step, wait_s=waits[step.batch]) if step.batch in waits else step for step in steps]


def combine(profiles: Sequence[RankProfile]) -> RunFigures:
    """Return the figures of a run from those of its ranks.

    Args:
        profiles: Those of all ranks, or of the ranks whose files are left.

    Raises:
        ValueError: If there is no profile.

    """
    if not profiles:
        raise ValueError("combine: `profiles` must hold at least one rank; got none. Were there files to read?")
    profiles = sorted(profiles, key=lambda profile: profile.rank)
    waits = inferred_waits(profiles)
    ranks = tuple(_rank_figures(profile, waits.get(profile.rank, {})) for profile in profiles)
    used = [(profile.sums, rank) for profile, rank in zip(profiles, ranks, strict=True) if profile.sums.steps]

    def mean(values: Iterable[float]) -> float:
        listed = list(values)
        return sum(listed) / len(listed) if listed else 0.0

    sending_s = sum(sums.comm_s - rank.wait_s * sums.timed_steps for sums, rank in used)
    timed_bytes = sum(sums.timed_sent_bytes for sums, _ in used)
    slow, slower_by = _slow_rank(profiles)
    total_steps = max(profile.all_steps for profile in profiles)
    whole = [profile for profile in profiles if profile.all_steps == total_steps]  # ranks train in step
    return RunFigures(
        world_size=int(profiles[0].header["world_size"]),
        steps=max(rank.steps for rank in ranks),
        warmup_steps=whole[0].warmup_steps,
        step_s=mean(rank.step_s for _, rank in used),
        sent_bytes=mean(sums.sent_bytes / sums.steps for sums, _ in used),
        dense_bytes=mean(sums.dense_bytes / sums.steps for sums, _ in used),
        comm_s=mean(rank.comm_s for _, rank in used),
        exposed_s=mean(rank.exposed_s for _, rank in used),
        wait_s=mean(rank.wait_s for _, rank in used),
        lightning_s=mean(rank.lightning_s for _, rank in used),
        other_s=mean(rank.other_s for _, rank in used),
        untimed_steps=max(profile.sums.steps - profile.sums.timed_steps for profile in profiles),
        bandwidth_bytes_per_s=timed_bytes / sending_s if sending_s > 0 and timed_bytes > 0 else None,
        link_bytes_per_s=next(filter(None, (each.header.get("link_bytes_per_s") for each in profiles)), None),
        total_payload_bytes=_mean_counts([profile.payload_bytes for profile in whole]),
        total_wire_bytes=_mean_counts([profile.wire_bytes for profile in whole]),
        beside_wire_bytes=_mean_counts([profile.beside_wire_bytes for profile in whole]),
        total_ranks=len(whole) if total_steps else 0,
        total_steps=total_steps,
        total_optimizer_steps=max(profile.optimizer_steps for profile in profiles),
        ranks=ranks,
        slow_rank=slow,
        slower_by=slower_by,
        environment=profiles[0].header.get("environment", {}),
    )


def _rank_figures(profile: RankProfile, waits: Mapping[int, float]) -> RankFigures:
    sums = profile.sums
    counted = [wait for batch, wait in waits.items() if batch >= profile.warmup_steps]
    inferred_s = sums.inferred_steps * sum(counted) / len(counted) if counted else 0.0
    return RankFigures(
        rank=profile.rank,
        host=str(profile.header.get("host", "")),
        steps=sums.steps,
        step_s=sums.duration_s / sums.steps if sums.steps else 0.0,
        own_s=sums.mean_s("own_s"),
        comm_s=sums.mean_s("comm_s"),
        exposed_s=sums.mean_s("exposed_s"),
        wait_s=(sums.wait_s + inferred_s) / sums.timed_steps if sums.timed_steps else 0.0,
        lightning_s=sums.mean_s("lightning_s"),
        other_s=sums.mean_s("other_s"),
        clock_offset_s=profile.clock[-1].offset_s if profile.clock else 0.0,
        clock_error_s=max((point.error_s for point in profile.clock), default=0.0),
        stopped=profile.stopped,
    )


def _slow_rank(profiles: Sequence[RankProfile]) -> tuple[int | None, float]:
    """Return the rank that is slow step by step, and by how much, as a share; ``None`` if no rank stands out.

    A few long steps, or some short ones on a busy machine, make no slow rank, so means are not asked: steps are. In
    most of them the rank must have been busy longer than the others, and in more than chance would bring about.
    """
    own = [
        {s.batch: s.own_s for s in profile.kept if s.timed and s.batch >= profile.warmup_steps}
        for profile in profiles
        if profile.kept
    ]
    ranks = [profile.rank for profile in profiles if profile.kept]
    shared = sorted(set.intersection(*map(set, own))) if len(own) > 1 else []
    if not shared:
        return None, 0.0
    slow = max(range(len(own)), key=lambda k: median(own[k][batch] for batch in shared))
    others_s = [median(steps[batch] for k, steps in enumerate(own) if k != slow) for batch in shared]
    longer = [own[slow][batch] / other_s - 1 for batch, other_s in zip(shared, others_s, strict=True) if other_s > 0]
    ahead = 2 * sum(share > 0 for share in longer) - len(shared)  # steps in which it was slower, less the others
    by = median(longer) if longer else 0.0
    stands_out = by >= _LITTLE and ahead >= max(len(shared) / 2, 3 * math.sqrt(len(shared)))
    return (ranks[slow], by) if stands_out else (None, 0.0)


def _mean_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    purposes = list(dict.fromkeys(purpose for each in counts for purpose in each))
    return {purpose: sum(each.get(purpose, 0) for each in counts) / len(counts) for purpose in purposes}
