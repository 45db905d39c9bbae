"""The rule by which measured times are judged: the interval of paired ratios, and how far a limit may spread.

Everything that compares times, in this package and in its benchmarks, asks here, so that one measurement cannot count
on one page and be noise on another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median, stdev

CONFIDENCE = 0.95  # with which an interval holds the true ratio
FEWEST_REPEATS = 3  # for an interval: two that happen to agree would look like certainty
CLAIM_REPEATS = 5  # for a speed that is published
LIMIT_SPREAD = 0.02  # where the limit itself spreads more, a share of it means nothing


@dataclass(frozen=True)
class Spread:
    """A figure that was measured several times.

    Example:
        >>> seen = Spread((1.0, 2.0, 3.0, 4.0, 10.0))
        >>> seen.median, seen.range, seen.relative
        (3.0, (1.0, 10.0), 3.0)

    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest."""
        return min(self.values), max(self.values)

    @property
    def relative(self) -> float:
        """The distance of the largest from the smallest as a share of the median."""
        low, high = self.range
        return (high - low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another, from repeats in each of which both were measured.

    A disturbance of a whole repeat, such as a slower machine, is in both times and leaves their ratio as it is. The
    ratio of all repeats is the geometric mean, so that it is the inverse of the ratio the other way round. Its interval
    is Student's, of the logarithms, with one degree of freedom less than there are repeats. It holds the true ratio
    with the probability :data:`CONFIDENCE` where the logarithms of the ratios are independent and normal, whatever
    their spread; a single outlier makes it wide, so it errs towards no decision. The range of the repeats, which needs
    no such assumption, would hold the true median with 75 % only in three repeats, and with 94 % in five.

    Args:
        values: The ratio in each repeat; above 1 is faster.

    Example:
        >>> ratio = Ratio.of({0: 2.0, 1: 2.2, 2: 3.0}, {0: 1.0, 1: 1.0, 2: 1.5})
        >>> ratio.values, round(ratio.mean, 2), [round(end, 2) for end in ratio.interval]
        ((2.0, 2.2, 2.0), 2.06, [1.8, 2.37])
        >>> ratio.faster, Ratio((2.0, 2.0)).interval
        (True, None)

    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, reference_s: Mapping[int, float], own_s: Mapping[int, float]) -> "Ratio | None":
        """Return how many times as fast the second is as the first, in the repeats that both have; ``None`` for none.

        Args:
            reference_s: Seconds by repeat, of what is compared with.
            own_s: Seconds by repeat.

        """
        pairs = tuple(reference_s[repeat] / seconds for repeat, seconds in own_s.items() if repeat in reference_s)
        return cls(pairs) if pairs else None

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return math.exp(fmean(map(math.log, self.values)))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of the true ratio; ``None`` where there are too few repeats."""
        count = len(self.values)
        if count < FEWEST_REPEATS:
            return None
        logs = [math.log(value) for value in self.values]
        half = student_t(count - 1) * stdev(logs) / math.sqrt(count)
        return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)

    @property
    def faster(self) -> bool:
        """Whether the whole interval is above 1."""
        return self.interval is not None and self.interval[0] > 1

    @property
    def slower(self) -> bool:
        """Whether the whole interval is below 1."""
        return self.interval is not None and self.interval[1] < 1

    @property
    def undecided(self) -> bool:
        """Whether the interval contains 1, or is not known."""
        return not (self.faster or self.slower)


@cache
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return how far from 0 Student's t lies at most, to either side, with a given probability.

    Args:
        freedom: Degrees of freedom, a whole number of at least 1.
        confidence: The probability; more than 0, less than 1.

    Example:
        >>> [round(student_t(freedom), 3) for freedom in (1, 2, 4, 9, 99)]
        [12.706, 4.303, 2.776, 2.262, 1.984]

    """
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Return the probability of a smaller angle: finite sums, 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for power in range(3 if odd else 2, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def doubt(limit_s: Sequence[float], fewest: int = FEWEST_REPEATS, what: str = "the limit") -> str | None:
    """Return in a few words why shares of a limit mean nothing, or ``None`` where they do.

    Args:
        limit_s: Its seconds in each repeat.
        fewest: How many repeats it takes: :data:`CLAIM_REPEATS` for what is published.
        what: Its name.

    Example:
        >>> doubt([1.0, 1.01, 1.03]), doubt([1.0, 1.01, 1.02]), doubt([1.0, 1.0])
        ('the limit itself spreads by 3.0 %', None, 'fewer than 3 repeats')

    """
    if len(limit_s) < fewest:
        return f"fewer than {fewest} repeats"
    spread = Spread(tuple(limit_s)).relative
    return f"{what} itself spreads by {100 * spread:.1f} %" if spread > LIMIT_SPREAD else None
