"""Cuts of a model, whose modules run in some order, into the stages of Cyclic Data Parallelism."""

import math
from collections.abc import Sequence
from fractions import Fraction

STAGES_PER_WORKER = 3  # more stages give smaller messages and finer overlap, but beyond this latency dominates


def default_stages(units: int, workers: int, lag: int = 0) -> int:
    """Return how many stages to cut a model into: three for each worker, if the model has enough modules.

    Args:
        units: How many modules with parameters there are, between which cuts may be.
        workers: N, at least 1.
        lag: The schedule's; above 0 it needs as many stages as workers.

    Raises:
        ValueError: If there are fewer modules than workers.

    Note:
        *Communication.* None.

    Example:
        >>> default_stages(units=54, workers=4), default_stages(units=9, workers=4), default_stages(54, 4, lag=1)
        (12, 8, 4)

    """
    if workers < 1:
        raise ValueError(f"default_stages: `workers` must be >= 1; got {workers!r}. It is the number of ranks.")
    if units < workers:
        raise ValueError(
            f"default_stages: the model has {units} module{'' if units == 1 else 's'} to cut between (`units`), and "
            f"`workers`={workers} need at least one stage each. Use {max(units, 1)} device{'' if units <= 1 else 's'} "
            "at most, or a finer model, built of more modules that have parameters of their own."
        )
    per_worker = 1 if lag else min(STAGES_PER_WORKER, units // workers)
    return per_worker * workers


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Return where each of a number of contiguous groups begins, such that the greatest sum of costs is smallest.

    Of such cuts it is one with the least sum of squares, since the group that decides the greatest sum would otherwise
    leave all others to chance. The answer is exact. Of several, the one whose list of first indices is
    lexicographically smallest is returned, so that all ranks that are given the same costs cut alike.

    Args:
        costs: What each unit costs, in any unit; finite and at least 0.
        parts: How many groups; none is empty.

    Raises:
        ValueError: If a cost is negative or not finite, or there are more groups than units.

    Note:
        *Communication.* None. Costs measured on each rank differ: one rank's must be used on all.

    Example:
        >>> balanced_cuts([4, 1, 1, 1, 5, 2], parts=3)
        [0, 3, 5]

    """
    for index, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(
                f"balanced_cuts: `costs` must be finite and >= 0; got {cost!r} at index {index}. Leave out what could "
                "not be measured, or give 1.0 to each."
            )
    if not 1 <= parts <= len(costs):
        raise ValueError(
            f"balanced_cuts: `parts` must be from 1 to the number of costs, {len(costs)}, since no group may be empty; "
            f"got {parts!r}. Ask for fewer groups."
        )
    sizes = _integers(costs)
    lowest, highest = max(sizes), sum(sizes)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if _fewest_groups(sizes, middle) <= parts:
            highest = middle
        else:
            lowest = middle + 1
    return _most_even(sizes, parts, lowest)


def _integers(costs: Sequence[float]) -> list[int]:
    """Return integers in the very same proportions, so that no sum is rounded."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * scale) for cost in exact]


def _fewest_groups(sizes: Sequence[int], limit: int) -> int:
    """Return how few groups, none above the limit, hold all."""
    groups, total = 1, 0
    for size in sizes:
        if total + size > limit:
            groups, total = groups + 1, 0
        total += size
    return groups


def _most_even(sizes: Sequence[int], parts: int, limit: int) -> list[int]:
    """Return where groups begin that are all within the limit, with the least sum of squares."""
    count = len(sizes)
    squares: list[int | None] = [None] * count + [0]  # of what begins there, in so many groups; None: it cannot be
    ends: list[list[int]] = []  # for one, two, ... groups: where the first of them ends
    for _ in range(parts):
        least: list[int | None] = [None] * (count + 1)
        end = [0] * (count + 1)
        for begin in range(count):
            total = 0
            for after in range(begin + 1, count + 1):
                total += sizes[after - 1]
                if total > limit:
                    break
                rest, so_far = squares[after], least[begin]
                if rest is not None and (so_far is None or rest + total**2 < so_far):
                    least[begin], end[begin] = rest + total**2, after
        squares = least
        ends.append(end)
    firsts = [0]
    for end in reversed(ends[1:]):
        firsts.append(end[firsts[-1]])
    return firsts
