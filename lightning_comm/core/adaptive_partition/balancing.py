"""The balancer of a global batch: measured windows in, shares out.

Standard library only and plain floats: every rank feeds the same gathered numbers and takes the same decision.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_comm.core.adaptive_partition.shares import UNBOUNDED, solve_partition
from lightning_comm.core.adaptive_partition.speed import DISTINCT, FORGETTING, SpeedModel

# Windows of evidence (SpeedModel.evidence: 1, 1.8, 2.4, 3, ... below 5). With less evidence, a gain must be larger in
# inverse proportion. The median of 20 steps with 10 % jitter spreads by 2.8 %, so eight equal ranks look 4 % apart from
# their mean after one window, and 1.3 % once smoothed. In the loop of tests/core/adaptive_partition/test_balancing.py,
# with 200 seeds of 75 windows for 4 and 8 ranks, with and without 1 % spikes, shares never moved. Without the factor
# one run in twenty moves after a window.
_CERTAIN_WINDOWS = 3.0


class Forecast(NamedTuple):
    """The cost of the shares in force, and that of the best ones."""

    sizes: tuple[int, ...]
    """The best shares now, samples by rank."""
    busy_now_s: tuple[float, ...]
    """Predicted seconds that each rank is busy in a step with the shares in force."""
    busy_then_s: tuple[float, ...]
    """The same with the best shares."""
    exposed_s: float
    """Seconds of a step beyond those of its slowest rank: exposed communication, optimizer, framework."""
    gain: float
    """Share of the whole step's time that the best shares save."""
    slowest: int
    """The rank that is busy longest with the shares in force."""
    scores: tuple[float, ...]
    """Speed of each rank at an even share, relative to the fastest: 1.0 is best, 0.5 is twice as slow."""


class Balancer:
    """Learns the speed of all ranks from windows of steps and proposes shares that make the step shorter.

    Shares move when a whole step with those in force lasts more than ``1 + min_gain`` times one with the best. While
    the speeds rest on few windows the difference must be larger, three times that after the first window, so jitter is
    averaged before it is acted on.

    Args:
        ranks: How many ranks share the batch.
        total: Samples of the global batch.
        lo: The least that each rank takes, one number for all or one for each.
        hi: The most.
        min_gain: How much longer than the best step, relative, the present one must be for a move; from 0 and below 1.

    Raises:
        ValueError: If the bounds cannot be met or ``min_gain`` is out of range.

    Note:
        *What it reaches.* Within 5 % of the optimum in three windows after the first shares could be applied, or after
        speeds changed. With one size, fixed and per-sample time cannot be told apart: where ranks spend more than three
        quarters of a batch on work that does not depend on its size, or only the per-sample time changed, the possible
        gain is predicted too small, and a step may stay 10 to 15 % above the optimum.

        *Communication.* None: the caller gathers the windows.

    Example:
        >>> balancer = Balancer(ranks=2, total=64, lo=1)
        >>> balancer.observe((32, 32), busy_s=(0.032, 0.096), step_s=0.100)
        >>> balancer.propose()
        (48, 16)
        >>> balancer.observe((48, 16), busy_s=(0.048, 0.048), step_s=0.052)
        >>> print(balancer.propose())
        None
        >>> balancer.forecast().gain
        0.0

    """

    def __init__(
        self,
        ranks: int,
        total: int,
        lo: Sequence[int] | int = 1,
        hi: Sequence[int] | int = UNBOUNDED,
        min_gain: float = 0.05,
    ) -> None:
        if not (math.isfinite(min_gain) and 0 <= min_gain < 1):
            raise ValueError(
                f"Balancer: `min_gain` is relative to the time of a step, so it must be >= 0 and < 1; got "
                f"{min_gain!r}. 0.05 moves shares when a step lasts more than 1.05 times the best one."
            )
        self.ranks, self.total, self.min_gain = ranks, total, min_gain
        self._lo = (lo,) * ranks if isinstance(lo, int) else tuple(lo)
        self._hi = (hi,) * ranks if isinstance(hi, int) else tuple(hi)
        if ranks < 1 or len(self._lo) != ranks or len(self._hi) != ranks:
            raise ValueError(
                f"Balancer: `lo` and `hi` must be one number for all or one for each of `ranks`={ranks!r}, of which "
                f"there is at least 1; got `lo`={lo!r} and `hi`={hi!r}."
            )
        if any(low > high for low, high in zip(self._lo, self._hi, strict=True)) or not (
            0 <= sum(self._lo) <= total <= sum(self._hi)
        ):
            raise ValueError(
                f"Balancer: {ranks} ranks must take `total`={total!r} samples in all, each within its bounds; got "
                f"`lo`={lo!r} (at least {sum(self._lo)} in all) and `hi`={hi!r} (at most {sum(self._hi)}). Change the "
                "bounds or the batch."
            )
        self.models = tuple(SpeedModel() for _ in range(ranks))
        self._sizes: tuple[int, ...] | None = None
        self._caps: tuple[int | None, ...] = (None,) * ranks
        self._exposed: tuple[float, float] = (0.0, 0.0)  # seconds and weight
        self._asked = True  # whether the last window has been answered

    def observe(
        self,
        sizes: Sequence[int],
        busy_s: Sequence[float],
        step_s: float | None = None,
        caps: Sequence[int | None] | None = None,
    ) -> None:
        """Take in one window of all ranks, all of it under the same shares.

        Args:
            sizes: Samples by rank in the window.
            busy_s: Seconds of a step in which each rank was busy; those not finite or not above 0 are ignored.
            step_s: Seconds of a whole step, if known.
            caps: The most that each rank may take at the next move; None for a rank without one.

        Raises:
            ValueError: If the numbers are not those of all ranks.

        """
        caps = (None,) * self.ranks if caps is None else tuple(caps)
        if not len(sizes) == len(busy_s) == len(caps) == self.ranks or sum(sizes) != self.total:
            raise ValueError(
                f"Balancer.observe: `sizes`, `busy_s` and `caps` must have one entry for each of {self.ranks} ranks, "
                f"and `sizes` must sum to {self.total}; got {tuple(sizes)}, {tuple(busy_s)} and {caps}. Start a new "
                "Balancer when the ranks or the batch change."
            )
        for model, samples, seconds in zip(self.models, sizes, busy_s, strict=True):
            model.add(samples, seconds)
        self._sizes, self._caps, self._asked = tuple(sizes), caps, False
        if step_s is not None and math.isfinite(step_s) and all(map(math.isfinite, busy_s)):
            seconds, weight = self._exposed[0], FORGETTING * self._exposed[1]
            exposed_s = max(0.0, step_s - max(busy_s))
            self._exposed = ((weight * seconds + exposed_s) / (weight + 1), weight + 1)

    def forecast(self) -> Forecast | None:
        """Return what the best shares would change, or None while the speed of a rank is not known."""
        costs = [cost for model in self.models if (cost := model.cost()) is not None]
        if self._sizes is None or len(costs) < self.ranks:
            return None
        best = solve_partition(costs, self.total, self._lo, self._most())
        now = tuple(cost.seconds(n) for cost, n in zip(costs, self._sizes, strict=True))
        then = tuple(cost.seconds(n) for cost, n in zip(costs, best, strict=True))
        if max(then) >= max(now):
            best, then = self._sizes, now
        exposed_s = self._exposed[0]
        even = [cost.fixed_s + cost.per_sample_s * self.total / self.ranks for cost in costs]
        return Forecast(
            sizes=best,
            busy_now_s=now,
            busy_then_s=then,
            exposed_s=exposed_s,
            gain=(max(now) - max(then)) / (max(now) + exposed_s),
            slowest=now.index(max(now)),
            scores=tuple(min(even) / seconds for seconds in even),
        )

    def propose(self) -> tuple[int, ...] | None:
        """Return the shares to move to, or None to stay. Each window is answered once."""
        forecast = None if self._asked else self.forecast()
        self._asked = True
        if forecast is None:
            return None
        evidence = sum(model.evidence for model in self.models) / self.ranks
        needed = self.min_gain * max(1.0, _CERTAIN_WINDOWS / evidence)
        return forecast.sizes if forecast.gain > needed / (1 + needed) else None

    def _most(self) -> tuple[int, ...]:
        """Return the most that each rank may take now: its bound and its cap, which never make a batch impossible."""
        assert self._sizes is not None
        rows = list(zip(self._lo, self._hi, self._caps, self._sizes, strict=True))
        capped = tuple(hi if cap is None else max(lo, min(hi, cap)) for lo, hi, cap, _ in rows)
        if sum(capped) >= self.total:
            return capped
        return tuple(max(most, min(hi, held)) for most, (_, hi, _, held) in zip(capped, rows, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return all that decisions rest on, in plain types."""
        return {
            "total": self.total,
            "models": [model.state_dict() for model in self.models],
            "sizes": None if self._sizes is None else list(self._sizes),
            "caps": list(self._caps),
            "exposed": list(self._exposed),
            "asked": self._asked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of ``state_dict``.

        Raises:
            ValueError: If it is of another number of ranks or of another batch.

        """
        if len(state["models"]) != self.ranks or state["total"] != self.total:
            raise ValueError(
                f"Balancer.load_state_dict: the state is of {len(state['models'])} ranks and `total`="
                f"{state['total']!r}, this Balancer of {self.ranks} and {self.total!r}. Start with a new Balancer: it "
                "learns the speeds anew."
            )
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)
        self._sizes = None if state["sizes"] is None else tuple(map(int, state["sizes"]))
        self._caps = tuple(None if cap is None else int(cap) for cap in state["caps"])
        self._exposed = (float(state["exposed"][0]), float(state["exposed"][1]))
        self._asked = bool(state["asked"])


def memory_cap(
    observed: Sequence[tuple[int, int]], total_bytes: int, present: int, share: float = 0.9, growth: float = 1.25
) -> int:
    """Return the most samples that a rank's memory holds, estimated from measured peaks.

    Peaks at sizes that differ by more than 5 % give a line ``m0 + m1 * samples``, raised so that no peak lies above
    it. With one size only, or peaks that do not grow with the size, ``growth`` times what is known to fit.

    Args:
        observed: Pairs of samples and the peak of allocated bytes while such batches were trained on.
        total_bytes: Memory that the rank can have.
        present: Samples that the rank takes now.
        share: Of the memory, what may be filled.
        growth: How much more than ``present`` a rank may take at once while no line is known.

    Returns:
        Samples, at least 1.

    Note:
        *Communication.* None.

    Example:
        >>> memory_cap([(8, 1_800)], total_bytes=10_000, present=8)
        10
        >>> memory_cap([(8, 1_800), (10, 2_000)], total_bytes=10_000, present=10)
        80

    """
    peaks: dict[int, int] = {}
    for samples, peak_bytes in observed:
        peaks[samples] = max(peak_bytes, peaks.get(samples, 0))
    known = max(math.floor(present * growth), present + 1)
    if not peaks or max(peaks) <= (1 + DISTINCT) * min(peaks):
        return known
    mean = sum(peaks) / len(peaks)
    slope = sum((n - mean) * peak for n, peak in peaks.items()) / sum((n - mean) ** 2 for n in peaks)
    if slope <= 0:
        return known
    base = max(peak - slope * n for n, peak in peaks.items())
    return max(1, math.floor((share * total_bytes - base) / slope))
