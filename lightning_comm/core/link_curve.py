"""Measured times of a kind of message by size: interpolated, fitted with two numbers, and how well each predicts.

Standard library only. Seconds, and bytes per second.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, isfinite, log
from statistics import quantiles
from typing import NamedTuple

from lightning_comm.core.collectives import collective_s, schedule

_FIT_STEPS = 50  # far more than it takes to settle


@dataclass(frozen=True)
class Timing:
    """The times of messages of one size.

    Args:
        payload_bytes: The bytes that one rank passes to the call.
        repeats: How many samples there are.
        median_s: Median, in seconds, of the slowest rank's time.
        lower_s: Lower quartile.
        upper_s: Upper quartile.

    """

    payload_bytes: int
    repeats: int
    median_s: float
    lower_s: float
    upper_s: float

    @classmethod
    def of(cls, payload_bytes: int, samples: Sequence[float]) -> "Timing":
        """Return median and quartiles of samples in seconds."""
        lower, median, upper = quartiles(samples)
        return cls(payload_bytes, len(samples), median, lower, upper)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile; of five samples the second, third and fourth.

    Example:
        >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0]), quartiles([7.0])
        ((2.0, 3.0, 4.0), (7.0, 7.0, 7.0))

    """
    if len(samples) == 1:
        return (samples[0],) * 3
    lower, median, upper = quantiles(samples, n=4, method="inclusive")
    return lower, median, upper


@dataclass(frozen=True)
class LinkFit:
    """Two numbers in place of a curve.

    Args:
        latency_s: Seconds that one message takes however small it is; a collective has several (:func:`schedule`).
        bytes_per_s: Wire bytes per second; infinite where the sizes were too small to show it.

    """

    latency_s: float
    bytes_per_s: float

    def time_s(self, kind: str, payload_bytes: float, world_size: int) -> float:
        """Return the seconds that a message takes by these two numbers."""
        return collective_s(kind, payload_bytes, world_size, self.latency_s, self.bytes_per_s)


class FitErrors(NamedTuple):
    """Mean relative errors when each measured size but the ends is predicted from all others."""

    curve: float
    fit: float


@dataclass(frozen=True)
class Curve:
    """Times of one kind of message by size, as measured.

    Args:
        kind: ``"all_reduce"``, ``"all_gather"`` or ``"send"``.
        world_size: The number of ranks that took part.
        points: By rising size; at least one.
        not_measured: Sizes that were asked for and left out, since time or memory did not suffice.

    Raises:
        ValueError: If there is no point, or sizes do not rise.

    Note:
        *Communication.* None.

    Example:
        >>> from lightning_comm.core.collectives import ring_all_reduce_s
        >>> points = [Timing(size, 5, *[ring_all_reduce_s(size, 4, 1e-3, 1e6)] * 3) for size in (4, 4_000, 4_000_000)]
        >>> curve = Curve("all_reduce", 4, tuple(points))
        >>> round(curve.fit.latency_s, 9), round(curve.fit.bytes_per_s)
        (0.001, 1000000)
        >>> round(curve.time_s(40_000_000), 3), curve.extrapolates(40_000_000)
        (60.006, True)

    """

    kind: str
    world_size: int
    points: tuple[Timing, ...]
    not_measured: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        schedule(self.kind, self.world_size)
        sizes = [point.payload_bytes for point in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"Curve: `points` must be at least one, of rising sizes above 0; got sizes {sizes!r}.")
        if not all(isfinite(point.median_s) and point.median_s > 0 for point in self.points):
            raise ValueError(f"Curve: every median must be a number of seconds above 0; got {self.points!r}.")

    @cached_property
    def fit(self) -> LinkFit:
        """Latency and bandwidth that fit best in proportion (:func:`fit_link`); neither is negative."""
        return fit_link(self.kind, self.world_size, self.points)

    @property
    def error(self) -> FitErrors | None:
        """How well sizes are predicted that were not measured; ``None`` below three sizes."""
        misses = []
        for left_out in range(1, len(self.points) - 1):
            point = self.points[left_out]
            rest = Curve(self.kind, self.world_size, self.points[:left_out] + self.points[left_out + 1 :])
            fitted = rest.fit.time_s(self.kind, point.payload_bytes, self.world_size)
            misses.append((rest.time_s(point.payload_bytes) / point.median_s, fitted / point.median_s))
        if not misses:
            return None
        curve, fit = (sum(abs(ratio - 1) for ratio in ratios) / len(misses) for ratios in zip(*misses, strict=True))
        return FitErrors(curve, fit)

    @property
    def bytes_per_s(self) -> float:
        """Wire bytes per second (bus bandwidth) of the largest size; buffers on the way flatter smaller ones."""
        return self.bus_bytes_per_s(self.points[-1])

    def bus_bytes_per_s(self, point: Timing) -> float:
        """Return the wire bytes per second of one size: its payload times the schedule's share, by its time."""
        return schedule(self.kind, self.world_size).wire_share * point.payload_bytes / point.median_s

    def extrapolates(self, payload_bytes: float) -> bool:
        """Whether a size lies outside of those that were measured."""
        return not self.points[0].payload_bytes <= payload_bytes <= self.points[-1].payload_bytes

    def time_s(self, payload_bytes: float) -> float:
        """Return the seconds for a size: interpolated between measured ones, on logarithmic scales.

        Outside, the nearest measured time is continued with the slope of the fit, so that the curve has no jump there.
        """
        sizes = [point.payload_bytes for point in self.points]
        if self.extrapolates(payload_bytes):
            end = self.points[0 if payload_bytes < sizes[0] else -1]
            fit = self.fit
            at_end = fit.time_s(self.kind, end.payload_bytes, self.world_size)
            return end.median_s * fit.time_s(self.kind, payload_bytes, self.world_size) / at_end
        after = bisect_left(sizes, payload_bytes)
        right = self.points[after]
        if right.payload_bytes == payload_bytes:
            return right.median_s
        left = self.points[after - 1]
        position = log(payload_bytes / left.payload_bytes) / log(right.payload_bytes / left.payload_bytes)
        return exp(log(left.median_s) * (1 - position) + log(right.median_s) * position)


def fit_link(kind: str, world_size: int, points: tuple[Timing, ...]) -> LinkFit:
    """Return latency and bandwidth of the straight line that fits the medians best in proportion.

    What is least is the sum of squared logarithms of predicted by measured time. Proportion, since otherwise the
    largest message alone would decide; logarithms, so that twice and half as long count alike: with plain relative
    errors, one message that passed a shaper unhindered outweighs all that did not. Where the best line would need a
    negative latency or bandwidth, that of zero latency, or of infinite bandwidth, is the best that is possible.

    Note:
        *Communication.* None.

    """
    sizes = [float(point.payload_bytes) for point in points]
    times = [point.median_s for point in points]
    line = _least_squares(sizes, times, [1.0] * len(points))
    for _ in range(_FIT_STEPS):  # Gauss-Newton: the logarithm is taken as straight near the line so far
        fitted = line.at(sizes)
        target = _least_squares(sizes, fitted, [1 + log(t / f) for t, f in zip(times, fitted, strict=True)])
        shorter = (line.towards(target, 0.5**halvings) for halvings in range(_FIT_STEPS))
        better = next((new for new in shorter if new.misfit(sizes, times) < line.misfit(sizes, times)), None)
        if better is None:
            break
        line = better
    messages, wire_share = schedule(kind, world_size)
    if not messages:
        return LinkFit(0.0, inf)
    return LinkFit(line.start_s / messages, wire_share / line.s_per_byte if line.s_per_byte else inf)


class _Line(NamedTuple):
    """Seconds at no byte, and seconds a byte."""

    start_s: float
    s_per_byte: float

    def at(self, sizes: Sequence[float]) -> list[float]:
        return [self.start_s + self.s_per_byte * size for size in sizes]

    def towards(self, other: "_Line", share: float) -> "_Line":
        return _Line(*(mine + share * (its - mine) for mine, its in zip(self, other, strict=True)))

    def misfit(self, sizes: Sequence[float], times: Sequence[float]) -> float:
        fitted = self.at(sizes)
        return sum(log(f / t) ** 2 for f, t in zip(fitted, times, strict=True)) if min(fitted) > 0 else inf


def _least_squares(sizes: Sequence[float], units: Sequence[float], targets: Sequence[float]) -> _Line:
    """Return the line, nowhere negative, whose value in the given unit at each size is nearest to the target."""
    a = [1 / unit for unit in units]
    b = [size / unit for size, unit in zip(sizes, units, strict=True)]
    aa, ab, bb = _dot(a, a), _dot(a, b), _dot(b, b)
    at, bt = _dot(a, targets), _dot(b, targets)
    determinant = aa * bb - ab * ab
    if len(sizes) == 1 or at * bb < bt * ab:
        return _Line(0.0, max(0.0, bt / bb))
    if bt * aa <= at * ab:
        return _Line(max(0.0, at / aa), 0.0)
    return _Line((at * bb - bt * ab) / determinant, (bt * aa - at * ab) / determinant)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))
