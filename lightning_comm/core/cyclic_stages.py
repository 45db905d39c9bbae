"""How a model's modules, in the order in which they run, are grouped into the stages of Cyclic Data Parallelism."""

import math
from collections.abc import Sequence
from fractions import Fraction

STAGES_PER_WORKER = 3  # more stages are smaller messages, finer overlap; beyond this their latency counts


def default_stages(units: int, workers: int, lag: int = 0) -> int:
    """Return how many stages to cut a model into: three for each worker, if it has so many parts to cut between.

    Args:
        units: How many modules with parameters can be told apart.
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
    """Return where each of so many contiguous groups begins, such that the greatest sum of costs is smallest.

    The answer is exact. Of several, the one whose list of first indices is lexicographically smallest is returned, so
    that all ranks that are given the same costs cut alike.

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
        if _groups_from(sizes, middle)[0] <= parts:
            highest = middle
        else:
            lowest = middle + 1
    groups = _groups_from(sizes, lowest)
    firsts = [0]
    for left in range(parts - 1, 0, -1):
        begin = firsts[-1] + 1
        while groups[begin] > left:
            begin += 1
        firsts.append(begin)
    return firsts


def _integers(costs: Sequence[float]) -> list[int]:
    """Return integers in the very same proportions, so that no sum is rounded."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * scale) for cost in exact]


def _groups_from(sizes: Sequence[int], limit: int) -> list[int]:
    """Return for each index how few groups, none above the limit, hold all that comes from there on."""
    count, end, total = len(sizes), len(sizes), 0
    groups = [0] * (count + 1)
    for begin in reversed(range(count)):
        total += sizes[begin]
        while total > limit:
            end -= 1
            total -= sizes[end]
        groups[begin] = 1 + groups[end]
    return groups
