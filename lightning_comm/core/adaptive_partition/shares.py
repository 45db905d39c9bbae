"""Shares of a global batch in whole samples, for ranks of unequal speed: who computes how much.

Standard library only. Measured seconds come in as numbers and numbers of samples go out, so the callback that changes
shares, the loader that splits a step and the page that shows the gain of other shares all use this file.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

UNBOUNDED = 2**62  # samples; more than any batch, where a rank has no upper bound


class RankCost(NamedTuple):
    """The time of a batch on a rank: ``fixed_s + per_sample_s * samples`` seconds.

    Example:
        >>> RankCost(fixed_s=0.5, per_sample_s=0.25).seconds(4)
        1.5

    """

    fixed_s: float
    per_sample_s: float

    def seconds(self, samples: int) -> float:
        """Return the time that a batch of so many samples takes."""
        return self.fixed_s + self.per_sample_s * samples


def solve_partition(
    costs: Sequence[RankCost], total: int, lo: Sequence[int] | int = 0, hi: Sequence[int] | int = UNBOUNDED
) -> tuple[int, ...]:
    """Return whole numbers of samples that sum to ``total`` and make the slowest rank as fast as can be.

    The samples are dealt out one after the other, each to the rank that would be done with it first, which is exact
    since no rank gets faster by more work. All but the last few are dealt out at once: those that are done before a
    time that bisection finds.

    Args:
        costs: What a batch costs on each rank.
        total: Samples of the global batch.
        lo: The least that each rank takes, one number for all or one for each.
        hi: The most.

    Returns:
        Samples by rank.

    Raises:
        ValueError: If the bounds cannot be met.

    Note:
        *Communication.* None. Equal numbers give equal answers on every rank.

    Example:
        >>> fast, slow = RankCost(0.0, 0.001), RankCost(0.0, 0.003)
        >>> solve_partition([fast, slow], total=64)
        (48, 16)
        >>> solve_partition([fast, slow], total=64, hi=40)
        (40, 24)

    """
    least, most = _bounds(lo, hi, len(costs), total)
    sizes = _done_by(_time_limit(costs, total, least, most), costs, least, most)
    waiting = [(cost.seconds(n + 1), rank) for rank, (cost, n) in enumerate(zip(costs, sizes, strict=True))]
    waiting = [(seconds, rank) for seconds, rank in waiting if sizes[rank] < most[rank]]
    heapq.heapify(waiting)
    for _ in range(total - sum(sizes)):
        _, rank = heapq.heappop(waiting)
        sizes[rank] += 1
        if sizes[rank] < most[rank]:
            heapq.heappush(waiting, (costs[rank].seconds(sizes[rank] + 1), rank))
    return tuple(sizes)


def proportional_sizes(
    total: int, shares: Sequence[float], lo: Sequence[int] | int = 0, hi: Sequence[int] | int = UNBOUNDED
) -> tuple[int, ...]:
    """Split ``total`` samples in proportion to shares, as closely as whole numbers within the bounds can.

    No other numbers make the rank that has the most for its share have less: with shares as speeds it is the fastest.

    Args:
        total: How many samples.
        shares: At least 0 each, and not all 0. A rank with 0 takes its least.
        lo: The least that each rank takes, one number for all or one for each.
        hi: The most.

    Returns:
        Samples by rank, which sum to ``total``.

    Raises:
        ValueError: If the bounds cannot be met or the shares are no ratio.

    Example:
        >>> proportional_sizes(64, [1, 3])
        (16, 48)
        >>> proportional_sizes(10, [1, 1, 1])
        (4, 3, 3)

    """
    largest = max(shares, default=0)
    if not (all(math.isfinite(share) and share >= 0 for share in shares) and largest > 0):
        raise ValueError(
            f"proportional_sizes: `shares` must be finite, at least 0 and not all 0; got {shares!r}. [1, 3] gives the "
            "second rank three times as much as the first."
        )
    return solve_partition([RankCost(0.0, largest / s if s else math.inf) for s in shares], total, lo, hi)


def optimal_seconds(costs: Sequence[RankCost], total: float) -> float:
    """Return how long the slowest rank takes when samples could be divided without end.

    The time T at which all ranks together are done with the batch, each after its fixed time (water filling), or the
    longest fixed time, which no share shortens. Whole samples need at least T and at most T plus the largest
    per-sample time.

    Example:
        >>> optimal_seconds([RankCost(0.0, 0.001), RankCost(0.0, 0.003)], total=64)
        0.048
        >>> optimal_seconds([RankCost(0.5, 0.001), RankCost(0.0, 0.003)], total=64)  # the fixed time is the longest
        0.5

    """
    floor_s = max(cost.fixed_s for cost in costs)
    speed, done = 0.0, 0.0  # samples per second of those at work, and what they would have done before second 0
    for cost in sorted(costs):
        if speed > 0 and (total + done) / speed <= cost.fixed_s:
            break
        if cost.per_sample_s == 0:
            return floor_s
        speed += 1 / cost.per_sample_s
        done += cost.fixed_s / cost.per_sample_s
    return max(floor_s, (total + done) / speed)


def speedup_of_balancing(speeds: Sequence[float]) -> float:
    """Return how much faster the compute of a step gets by shares in proportion to speeds, against even ones.

    The mean speed over the least, where no time is fixed and samples divide without end.

    Args:
        speeds: Samples per second by rank; above 0.

    Example:
        >>> speedup_of_balancing([1, 3]), speedup_of_balancing([1, 1, 1, 0.5])
        (2.0, 1.75)

    """
    return sum(speeds) / len(speeds) / min(speeds)


def step_speedup(
    costs: Sequence[RankCost],
    total: int,
    lo: Sequence[int] | int = 0,
    hi: Sequence[int] | int = UNBOUNDED,
    exposed_s: float = 0.0,
) -> float:
    """Return how much faster a whole step gets by the best shares in whole samples, against even ones.

    Args:
        costs: What a batch costs on each rank.
        total: Samples of the global batch.
        lo: The least that each rank takes, one number for all or one for each.
        hi: The most.
        exposed_s: Seconds of a step that no share changes: exposed communication, optimizer, framework.

    Raises:
        ValueError: If the bounds cannot be met.

    Example:
        >>> costs = [RankCost(0.0, 0.001), RankCost(0.0, 0.003)]
        >>> [round(step_speedup(costs, total=64, lo=1, exposed_s=exposed_s), 3) for exposed_s in (0.0, 0.024)]
        [2.0, 1.667]

    """
    even = proportional_sizes(total, [1.0] * len(costs), lo, hi)
    best = solve_partition(costs, total, lo, hi)
    even_s, best_s = (max(cost.seconds(n) for cost, n in zip(costs, sizes, strict=True)) for sizes in (even, best))
    return (even_s + exposed_s) / (best_s + exposed_s)


def _bounds(lo: Sequence[int] | int, hi: Sequence[int] | int, ranks: int, total: int) -> tuple[list[int], list[int]]:
    least = [lo] * ranks if isinstance(lo, int) else list(lo)
    most = [hi] * ranks if isinstance(hi, int) else list(hi)
    if any(low > high for low, high in zip(least, most, strict=True)) or not sum(least) <= total <= sum(most):
        raise ValueError(
            f"solve_partition: {ranks} ranks must take {total} samples in all, each within its bounds; got `lo`={lo!r} "
            f"(at least {sum(least)} in all) and `hi`={hi!r} (at most {sum(most)}). Change the bounds or the batch."
        )
    return least, most


def _time_limit(costs: Sequence[RankCost], total: int, least: list[int], most: list[int]) -> float:
    """Return a time before which no more than ``total`` samples can be done, and not many fewer."""
    low, high = 0.0, 1.0
    while sum(_done_by(high, costs, least, most)) < total and math.isfinite(high):
        low, high = high, 2 * high
    if not math.isfinite(high):
        return 0.0  # some rank never ends and must still take samples: all are dealt out one by one
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_done_by(middle, costs, least, most)) <= total else (low, middle)
    return low


def _done_by(limit_s: float, costs: Sequence[RankCost], least: list[int], most: list[int]) -> list[int]:
    return [_samples_by(limit_s, cost, low, high) for cost, low, high in zip(costs, least, most, strict=True)]


def _samples_by(limit_s: float, cost: RankCost, low: int, high: int) -> int:
    room_s = limit_s - cost.fixed_s
    if room_s <= 0:
        return low
    samples = room_s / cost.per_sample_s if cost.per_sample_s > 0 else math.inf
    return max(low, min(high, math.floor(min(samples, UNBOUNDED))))
