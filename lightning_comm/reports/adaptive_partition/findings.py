"""The findings of a partitioned run's windows: the speed of each rank, and what shares by speed save.

Numbers only; :mod:`~lightning_comm.reports.adaptive_partition.text` makes sentences of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lightning_comm.core.adaptive_partition.shares import speedup_of_balancing
from lightning_comm.formats.adaptive_partition import PartitionJournal, Window


@dataclass(frozen=True)
class RankFindings:
    """One rank, medians over the windows under the last shares. ``None`` is not known.

    Args:
        rank: Which.
        samples: Its share of a full global batch.
        busy_s: Seconds of a step in which it was busy, loading included.
        wait_s: Seconds in which it waited for the slowest rank.
        fetch_s: The part of ``busy_s`` in which it waited for its data.
        score: Its speed relative to the fastest: 1.0 is best, 0.5 takes twice as long for a sample.

    """

    rank: int
    samples: int
    busy_s: float | None
    wait_s: float | None
    fetch_s: float | None
    score: float | None = None

    @property
    def speed(self) -> float | None:
        """Samples per second while it is busy."""
        return self.samples / self.busy_s if self.busy_s and self.samples else None

    @property
    def data_share(self) -> float | None:
        """The part of its busy time in which it waited for its data."""
        return self.fetch_s / self.busy_s if self.busy_s and self.fetch_s is not None else None


@dataclass(frozen=True)
class Findings:
    """The findings of all windows of a run. ``None`` is not known.

    Args:
        ranks: Each rank.
        windows: How many windows under the last shares these are medians of.
        step_s: Seconds of a whole step under the last shares.
        expected: Share of the step that better shares would still save, by fitted speeds, fixed costs and bounds.
        start_step_s: Seconds of a step under the shares at the start, if they were measured and changed later.
        start_windows: How many windows that is the median of.

    """

    ranks: tuple[RankFindings, ...]
    windows: int
    step_s: float | None
    expected: float | None
    start_step_s: float | None
    start_windows: int

    @property
    def total(self) -> int:
        """Samples of the global batch."""
        return sum(rank.samples for rank in self.ranks)

    @property
    def speeds(self) -> list[float] | None:
        """The speed of each rank, or ``None`` if that of one is not known."""
        speeds = [rank.speed for rank in self.ranks if rank.speed is not None]
        return speeds if len(speeds) == len(self.ranks) else None

    @property
    def even_ratio(self) -> float | None:
        """How many times as long as with shares by speed the slowest rank is busy with an even split.

        That is mean speed by lowest speed: the fixed costs of a batch and whole samples are not in it.
        """
        return None if self.speeds is None else speedup_of_balancing(self.speeds)

    @property
    def exposed_s(self) -> float | None:
        """Seconds of a step beyond its slowest rank, which no split changes: exposed communication, optimizer."""
        busiest_s = self._busiest_s
        return None if busiest_s is None or self.step_s is None else max(0.0, self.step_s - busiest_s)

    @property
    def even_step_s(self) -> float | None:
        """Seconds of a step with an even split, at the speeds of these windows."""
        if self.speeds is None or self.exposed_s is None:
            return None
        return self.total / len(self.ranks) / min(self.speeds) + self.exposed_s

    @property
    def best_step_s(self) -> float | None:
        """Seconds of a step with shares exactly by speed, at the speeds of these windows."""
        if self.speeds is None or self.exposed_s is None:
            return None
        return self.total / sum(self.speeds) + self.exposed_s

    @property
    def possible(self) -> float | None:
        """Share of the step that better shares would still save: as fitted, or else the closed form."""
        if self.expected is not None:
            return self.expected
        if self.best_step_s is None or not self.step_s:
            return None
        return max(0.0, 1 - self.best_step_s / self.step_s)

    @property
    def _busiest_s(self) -> float | None:
        return max((rank.busy_s for rank in self.ranks if rank.busy_s is not None), default=None)


def findings(journal: PartitionJournal) -> Findings | None:
    """Return the findings of a run's windows, or ``None`` if it has none.

    Note:
        *Communication.* None.

    Example:
        >>> from lightning_comm.formats.adaptive_partition import Change
        >>> run = {"samples": 640, "global_batch_size": 64, "ranks": 2, "seed": 0, "shuffle": True, "tail": "keep"}
        >>> run |= {"sampler": "", "steps_per_epoch": 10, "min_per_rank": [1, 1], "max_per_rank": [None, None]}
        >>> window = Window(0, 19, 2.0, (32, 32), busy_s=(0.032, 0.096), fetch_s=(0.0, 0.0), step_s=0.1)
        >>> found = findings(PartitionJournal(run, "observe", (Change(0, 0, (32, 32), "start"),), (window,)))
        >>> [round(rank.score, 3) for rank in found.ranks], round(found.even_ratio, 3)
        ([1.0, 0.333], 2.0)
        >>> round(found.best_step_s, 3)
        0.052

    """
    if not journal.windows:
        return None
    last = _alike(journal.windows[::-1])
    sizes = last[0].sizes
    plain = [
        RankFindings(
            rank,
            samples,
            _median([window.busy_s[rank] for window in last]),
            _median([window.wait_s[rank] for window in last]),
            _median([window.fetch_s[rank] for window in last]),
        )
        for rank, samples in enumerate(sizes)
    ]
    fastest = max((rank.speed for rank in plain if rank.speed is not None), default=None)
    ranks = tuple(_scored(rank, fastest) for rank in plain)
    start = [window for window in _alike(journal.windows) if window.sizes == journal.changes[0].sizes]
    moved = len(journal.changes) > 1 and sizes != journal.changes[0].sizes
    return Findings(
        ranks=ranks,
        windows=len(last),
        step_s=_median([window.step_s for window in last]),
        expected=_median([window.gain for window in last]),
        start_step_s=_median([window.step_s for window in start]) if moved else None,
        start_windows=len(start),
    )


def _alike(windows: Sequence[Window]) -> list[Window]:
    """Return those at the beginning that have the shares of the first."""
    different = (number for number, window in enumerate(windows) if window.sizes != windows[0].sizes)
    return list(windows[: next(different, len(windows))])


def _scored(rank: RankFindings, fastest: float | None) -> RankFindings:
    score = None if rank.speed is None or fastest is None else rank.speed / fastest
    return RankFindings(rank.rank, rank.samples, rank.busy_s, rank.wait_s, rank.fetch_s, score)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
