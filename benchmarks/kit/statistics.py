"""Statistics of the benchmarks; the rule by which a result counts is that of `lightning_comm.core.judgement`."""

import math
import statistics
from collections.abc import Sequence

from lightning_comm.core.judgement import CLAIM_REPEATS, CONFIDENCE, Spread, doubt, student_t


def paired(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    """Return the ratio of each repeat.

    >>> paired([1.0, 4.0], [2.0, 2.0])
    (0.5, 2.0)
    """
    return tuple(own / other for own, other in zip(above, below, strict=True))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios of each repeat, which is not the ratio of the medians.

    >>> paired_ratio([1.0, 4.0], [2.0, 2.0])
    1.25
    """
    return statistics.median(paired(above, below))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile, with the lowest and the highest value as the ends.

    >>> quartiles([5, 1, 4, 2, 3]), quartiles([5.0])
    ((2.0, 4.0), (5.0, 5.0))
    """
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean by Student's t; infinity for a single value.

    >>> round(half_width([1, 2, 3, 4, 5]), 3), half_width([0.3])
    (1.963, inf)
    """
    count = len(values)
    if count < 2:
        return math.inf
    return student_t(count - 1, CONFIDENCE) * statistics.stdev(values) / math.sqrt(count)


def standing(values: Sequence[float], what: str = "the limit") -> str:
    """Say whether what is measured against some times counts, by the rule that the whole package goes by.

    >>> standing([1.0, 1.0, 1.0, 1.0, 1.01])
    'The limit spreads by 1.0 %, so this counts.'
    >>> standing([1.0, 1.0, 1.0, 1.0, 1.1], "the bound")
    '**inconclusive**: the bound itself spreads by 10.0 %. As measured all the same.'
    """
    if (why := doubt(values, CLAIM_REPEATS, what)) is not None:
        return f"**inconclusive**: {why}. As measured all the same."
    return f"{what.capitalize()} spreads by {100 * Spread(tuple(values)).relative:.1f} %, so this counts."
